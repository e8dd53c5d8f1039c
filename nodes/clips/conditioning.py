"""ComfyUI's CONDITIONING, a list of [context, options]: weighted sums, and ranges of sampling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...training.models.protocols import Conditioning
from ...training.text_encoder.blend import blend_conditioning

log = logging.getLogger(__name__)

POOLED = "pooled_output"
WHERE = (
    "area",
    "strength",
    "mask",
    "mask_strength",
    "set_area_to_bounds",
    "start_percent",
    "end_percent",
    "clip_start_percent",
    "clip_end_percent",
    "attention_mask",
)
"""Options for where, when and how much an entry counts; entries that differ in one cannot be summed."""

BORDER = 1e-5
"""How much before a percent the border between two ranges lies. Samplers average both sides of a border that a step
hits; a step at exactly that percent is then after the border, and no step is without a conditioning."""


def blend_entries(weights: Sequence[float], entries: Sequence[Sequence]) -> list:
    """One entry whose context and pooled output are sum_i w_i c_i of several (`blend_conditioning`).

    Args:
        weights: w_i, one for each entry.
        entries: [context, options] each, as in a CONDITIONING.

    Returns:
        [context, options], with the first entry's options; any that differ are logged.

    Raises:
        ValueError: when an option of `WHERE` differs.
    """
    options = [entry[1] for entry in entries]
    keys = dict.fromkeys(key for entry_options in options for key in entry_options)
    _check_differing([key for key in keys if not _agree(key, options)])
    blend = blend_conditioning(weights, [Conditioning(entry[0], entry[1].get(POOLED)) for entry in entries])
    return [blend.context, options[0] | ({POOLED: blend.pooled} if POOLED in keys else {})]


def _check_differing(differing: Sequence[str]) -> None:
    """Raises ValueError for options of `WHERE` that differ, and logs others."""
    if wrong := [key for key in differing if key in WHERE]:
        raise ValueError(
            f"the conditionings differ in {', '.join(wrong)}; expected the same. Blend first, and set area, mask, "
            "strength and range behind."
        )
    if others := [key for key in differing if key != POOLED]:
        log.warning("the conditionings differ in %s; the first one's are kept", ", ".join(others))


def blend_conditionings(a: Sequence, b: Sequence, amount: float) -> list:
    """(1 - amount) a + amount b, entry by entry; logs an amount outside 0..1. Raises ValueError for unequal counts."""
    if not a or len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} entries and b {len(b)}; expected as many, one or more. Blend prompts before they are "
            "combined."
        )
    if not 0 <= amount <= 1:
        log.warning("amount is %g: beyond 0 to 1 the blend goes on past a or b, where results soon break", amount)
    return [blend_entries([1 - amount, amount], pair) for pair in zip(a, b, strict=True)]


def step_window(original: Sequence, tuned: Sequence, start_percent: float) -> list:
    """`original` until start_percent (0..1) of sampling and `tuned` from there on, each within its entries' own ranges.

    At 0 `tuned` itself is returned, at 1 `original`. Raises ValueError when no entry is left.
    """
    if not 0 <= start_percent <= 1:
        raise ValueError(f"start_percent is {start_percent}; expected 0 to 1.")
    if start_percent in (0, 1):
        return list(original if start_percent else tuned)
    border = max(start_percent - BORDER, 0.0)
    entries = within(original, 0.0, border) + within(tuned, border, 1.0)
    if not entries:
        raise ValueError(
            f"nothing is left: original has no entry before {start_percent}, tuned none after it. Look at their start "
            "and end percent."
        )
    return entries


def within(conditioning: Sequence, start: float, end: float) -> list:
    """Entries limited to a range of percents of sampling (0..1); those that do not touch it are left out."""
    limited = []
    for context, options in conditioning:
        first = max(start, options.get("start_percent", 0.0))
        last = min(end, options.get("end_percent", 1.0))
        hooks = options.get("clip_start_percent", 0.0), options.get("clip_end_percent", 1.0)
        if max(first, hooks[0]) < min(last, hooks[1]):
            limited.append([context, {**options, "start_percent": first, "end_percent": last}])
    return limited


def _agree(key: str, options: Sequence[dict]) -> bool:
    """Whether all entries have an option, with equal values."""
    values = [entry_options[key] for entry_options in options if key in entry_options]
    return len(values) == len(options) and all(_equal(values[0], value) for value in values[1:])


def _equal(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool((one == two).all())
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return type(one) is type(two) and bool(one == two)
