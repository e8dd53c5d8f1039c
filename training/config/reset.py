"""Which attention layers of a UNet are reset, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.patterns import TypedPattern
from .checks import check_fields
from .fields import setting


@dataclass(frozen=True, kw_only=True)
class ResetConfig:
    """What RetuneResetAttention re-initialises, and how."""

    layers: Literal["cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention"]
    """cross-attention reads the text; K/V are its two maps whose input is the text; QK are queries and keys of both
    kinds; self-attention reads the picture only."""
    init: Literal["default", "normal", "zero output", "perturb"] = setting("default")
    """default: as a fresh nn.Linear; normal: noise at the tensor's std; zero output: as default, and zeros in the
    output projection; perturb: old weights plus noise."""
    strength: float = setting(1.0, step=0.05, snap=True)
    """Blend between old (0) and new (1) weights; for perturb, noise in units of each tensor's std, up to 10."""
    include_output: bool = setting(False)
    """Reset the output projections of whole-attention choices too; no effect for K/V and QK. 'zero output' zeroes them
    in any case."""
    blocks: str = setting("")
    """Regular expression searched in parameter names, such as middle|output_blocks; empty means everywhere."""
    seed: int = setting(0)
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        TypedPattern("blocks", self.blocks, "middle|output_blocks")
        high = 10.0 if self.init == "perturb" else 1.0
        if not 0 <= self.strength <= high:
            raise ValueError(f"strength is {self.strength}; expected 0.0 to {high}.")
