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
"""Options that say where, when and how much an entry counts: a sum of two entries has one of each."""

BORDER = 1e-5
"""How much before a percent a border is put. Samplers ask both sides of a border that they hit and average them; a step
at the very percent that was asked for then lies clearly behind it, and no step is without a conditioning."""


def blend_entries(weights: Sequence[float], entries: Sequence[Sequence]) -> list:
    """[context, options], context and pooled output sum_i w_i times those of the entries (`blend_conditioning`).

    Other options are the first entry's. Raises ValueError when one that says where or when differs; any other
    difference is logged.
    """
    options = [entry[1] for entry in entries]
    kept = dict(options[0])
    differing = [key for key in dict.fromkeys(key for one in options for key in one) if not _agree(key, options)]
    if wrong := [key for key in differing if key in WHERE]:
        raise ValueError(
            f"the conditionings differ in {', '.join(wrong)}; expected the same. Blend first, and set area, mask, "
            "strength and range behind."
        )
    if others := [key for key in differing if key != POOLED]:
        log.warning("the conditionings differ in %s; the first one's are kept", ", ".join(others))
    said = blend_conditioning(weights, [Conditioning(entry[0], entry[1].get(POOLED)) for entry in entries])
    return [said.context, kept | ({POOLED: said.pooled} if any(POOLED in one for one in options) else {})]


def blend_conditionings(a: Sequence, b: Sequence, amount: float) -> list:
    """(1 - amount) a + amount b, entry by entry; beyond 0..1 it is logged. Raises ValueError for unequal counts."""
    if not a or len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} entries and b {len(b)}; expected as many, one or more. Blend prompts before they are "
            "combined."
        )
    if not 0 <= amount <= 1:
        log.warning("amount is %g: beyond 0 to 1 the blend goes on past a or b, where results soon break", amount)
    return [blend_entries([1 - amount, amount], pair) for pair in zip(a, b, strict=True)]


def step_window(original: Sequence, tuned: Sequence, start_percent: float) -> list:
    """`original` before start_percent (0..1) of sampling and `tuned` from there on, in the ranges that entries have.

    0 and 1 give back `tuned` and `original` themselves. Raises ValueError when nothing is left.
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
    """The entries cut to a range of percents; those with nothing in it are left out."""
    found = []
    for context, options in conditioning:
        first = max(start, options.get("start_percent", 0.0))
        last = min(end, options.get("end_percent", 1.0))
        by_hooks = max(first, options.get("clip_start_percent", 0.0)), min(last, options.get("clip_end_percent", 1.0))
        if by_hooks[0] < by_hooks[1]:
            found.append([context, {**options, "start_percent": first, "end_percent": last}])
    return found


def _agree(key: str, options: Sequence[dict]) -> bool:
    return all(key in one for one in options) and all(_equal(options[0][key], one[key]) for one in options[1:])


def _equal(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool((one == two).all())
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return type(one) is type(two) and bool(one == two)
