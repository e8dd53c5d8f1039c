"""Prompts drawn while a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_fields, check_size
from .fields import setting, side_setting


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """Prompts drawn while training, always from the same noise, so that pictures can be compared over time."""

    prompts: tuple[str, ...] = ()
    """One picture each; without prompts none is drawn."""
    every: int = setting(100, low=0, high=10**7)
    """Steps between two sets of samples; 0 is once per epoch. Step 0 and the last step are always drawn."""
    steps: int = setting(20, low=1, high=1000)
    """Sampler steps (DDIM, arXiv 2010.02502)."""
    cfg: float = setting(5.0, low=0, high=100, step=0.1, snap=True)
    """Scale of classifier-free guidance (arXiv 2207.12598)."""
    seed: int = 0
    """Seed of the starting noise."""
    width: int = side_setting(512)
    """Width in pixels, a multiple of 8; 128 for the demo model."""
    height: int = side_setting(512)
    """Height in pixels, a multiple of 8; 128 for the demo model."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_size(self, "sample size")
