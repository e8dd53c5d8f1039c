"""Prompts drawn while a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_range, check_size


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """Prompts drawn while training, always from the same noise, so that pictures can be compared over time."""

    prompts: tuple[str, ...] = ()
    """One picture each; an empty tuple draws none."""
    every: int = 100
    """Optimiser steps between two sets of samples, 0 = once per epoch; step 0 and the last step are always drawn."""
    steps: int = 20
    """Sampler steps (deterministic DDIM, arXiv 2010.02502)."""
    cfg: float = 5.0
    """Classifier-free guidance scale (arXiv 2207.12598)."""
    seed: int = 0
    """Seed of the starting noise."""
    width: int = 512
    """Picture width in pixels, a multiple of 8."""
    height: int = 512
    """Picture height in pixels, a multiple of 8."""

    def __post_init__(self) -> None:
        check_range(self, every=(0, 10**7), steps=(1, 1000), cfg=(0, 100), width=(8, 8192), height=(8, 8192))
        check_size(self, "sample size")
