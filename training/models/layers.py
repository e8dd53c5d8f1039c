"""Selects layers of a UNet by name, and resets attention that was trained for another text encoder.

Works on canonical (LDM) parameter names, whose endings are the same in diffusers: `...attn2.to_k.weight`.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.patterns import TypedPattern
from ..common.rng import generator
from ..config.reset import ResetConfig
from .stored import exact

log = logging.getLogger(__name__)

LAYER_PATTERNS = {
    "cross-attention": r"attn2\.to_(q|k|v|out\.0)\.",
    "cross-attention K/V": r"attn2\.to_(k|v)\.",
    "QK": r"attn[12]\.to_(q|k)\.",
    "self-attention": r"attn1\.to_(q|k|v|out\.0)\.",
    "all attention": r"attn[12]\.to_(q|k|v|out\.0)\.",
    "whole UNet": r"",
}
_OUTPUT = re.compile(r"attn[12]\.to_out\.0\.")
_WITH_OUTPUT = {"self-attention": "self-attention", "all attention": "all attention", "QK": "all attention"}
"""Choice of layers -> the choice that adds their output projections; cross-attention for the others."""


def group_of(name: str) -> str:
    """The entry of `config.GROUPS` that a trained parameter belongs to, by its canonical name."""
    if name.startswith("projection."):
        return "projection"
    if re.search(r"\battn2\.", name):
        return "cross_attention"
    return "self_attention" if re.search(r"\battn1\.", name) else "rest"


def select(names: Iterable[str], layers: str, blocks: str = "") -> list[str]:
    """Parameter names that belong to `layers` (a key of LAYER_PATTERNS) inside blocks whose name matches the regex.

    Warns when nothing matched; raises ValueError for an unknown layer choice or a malformed regex.
    """
    if layers not in LAYER_PATTERNS:
        raise ValueError(f"layers is {layers!r}; expected one of {', '.join(LAYER_PATTERNS)}.")
    within = TypedPattern("blocks", blocks, "middle|output_blocks")
    selected = [name for name in names if is_selected(name, layers) and within.search(name)]
    if not selected:
        log.warning("no parameter matched layers %r within blocks %r", layers, blocks)
    return selected


def is_selected(name: str, layers: str) -> bool:
    """Whether a parameter, by its name, belongs to `layers` (a key of LAYER_PATTERNS)."""
    return re.search(LAYER_PATTERNS[layers], name) is not None


@dataclass(frozen=True)
class ResetReport:
    """Every changed tensor with its std before and after."""

    rows: tuple[tuple[str, float, float], ...]

    def __str__(self) -> str:
        lines = [f"{name}: std {before:.4f} -> {after:.4f}" for name, before, after in self.rows]
        return "\n".join([f"{len(self.rows)} tensors reset"] + lines)


def reset_weights(weights: Mapping[str, Tensor], config: ResetConfig) -> tuple[dict[str, Tensor], ResetReport]:
    """New fp32 values for the attention weights that `config` selects, and a report; the input is not changed.

    weights: canonical name -> tensor, for at least the attention layers. Draws depend on (seed, name) only, so both
    implementations of a model get the same values. Raises ValueError when nothing was selected.
    """
    zero = _names_to_reset(weights, config)
    new, rows = {}, []
    for name, becomes_zero in zero.items():
        old = exact(weights[name].detach())
        fan_in = weights[name.rsplit(".", 1)[0] + ".weight"].shape[1]
        value = old * (1 - config.strength) if becomes_zero else _draw(old, fan_in, name, config)
        new[name] = value
        rows.append((name, old.std(correction=0).item(), value.std(correction=0).item()))
    return new, ResetReport(tuple(rows))


def _names_to_reset(names: Iterable[str], config: ResetConfig) -> dict[str, bool]:
    """The selected weights by name -> whether their new value is zero rather than drawn; ValueError for none."""
    names = list(names)
    selected = select(names, config.layers, config.blocks)
    if not config.include_output:
        selected = [name for name in selected if not _OUTPUT.search(name)]
    zero = dict.fromkeys(selected, False)
    if config.init == "zero output":
        whole = select(names, _WITH_OUTPUT.get(config.layers, "cross-attention"), config.blocks)
        zero |= dict.fromkeys([name for name in whole if _OUTPUT.search(name)], True)
    if not zero:
        raise ValueError(
            f"no attention layer matches layers {config.layers!r} within blocks {config.blocks!r}; expected one. "
            "Use a part of a block's name that exists, or a model with cross-attention."
        )
    return zero


def _draw(old: Tensor, fan_in: int, name: str, config: ResetConfig) -> Tensor:
    random = generator(config.seed, "reset", name)
    std = old.std(correction=0).item()
    if config.init == "perturb":
        noise = torch.randn(old.shape, generator=random).to(old.device)
        return old + config.strength * std * noise
    if config.init == "normal":
        fresh = torch.randn(old.shape, generator=random) * std
    else:
        bound = 1 / math.sqrt(fan_in)  # torch.nn.Linear.reset_parameters
        fresh = (torch.rand(old.shape, generator=random) * 2 - 1) * bound
    return torch.lerp(old, fresh.to(old.device), config.strength)
