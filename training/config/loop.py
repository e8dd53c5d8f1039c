"""What the training loop needs besides a trainable and an objective: steps, rates, and the order of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from .sample_prompts import SamplePrompts
from .training_settings import TrainingSettings


class Batches(Protocol):
    """Endless data order, a pure function of the batch's number (from 1)."""

    def batch(self, number: int) -> list: ...

    def largest(self) -> Any:
        """The slot that takes the most memory, as it would come in training."""
        ...


class TrainingDiverged(ValueError):
    """The loss or its gradient has become infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How far and how fast a loop trains, and what it samples meanwhile."""

    steps: int
    batch_size: int
    learning_rate: float
    settings: TrainingSettings
    samples: SamplePrompts
    seed: int = 0
    """Of what the optimiser's step draws (the rounding of bf16 masters)."""
    steps_per_epoch: float = math.inf
    """Optimiser steps in which every image is drawn once (or `repeats` times)."""
    plan: str = ""
    """What the run will do, in one line for people."""
    memory_hints: str = ""
    """Text of the error when memory runs out: which settings to change."""

    @property
    def sample_every(self) -> int:
        """Steps between samples; an epoch's when the prompts say 0."""
        if self.samples.every or math.isinf(self.steps_per_epoch):
            return self.samples.every or self.steps
        return max(1, round(self.steps_per_epoch))
