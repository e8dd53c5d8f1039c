"""How a run talks to its surroundings: a terminal, a node, a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class StepInfo:
    """What a progress display needs after an optimiser step."""

    run: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds_per_step: float
    row: Mapping[str, Any] = field(default_factory=dict)
    """The step's row of metrics.jsonl: loss, learning rate and whatever else was measured."""


class Callbacks:
    """How a run talks to its surroundings. Any method may raise to cancel; the state is saved, then it goes on up."""

    interrupts: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    """Exceptions that mean "cancelled by the user" rather than "failed"."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether this means that the device's memory did not suffice."""
        return isinstance(error, torch.cuda.OutOfMemoryError)

    def wants_finish(self) -> bool:
        """Whether the run shall end with the step just done, as if that were its last; asked after every step."""
        return False

    def on_text(self, text: str) -> None:
        """A phase in words: loading, caching, sampling."""

    def pulse(self) -> None:
        """Long work has come a piece further, a sampler step or a picture: a moment to look for a cancel."""

    def on_end(self, text: str) -> None:
        """How the run ended, in words: the last that is said of it."""
        self.on_text(text)

    def before_step(self, step: int) -> None:
        """A step, or the first drawing, comes next: a moment to look for a cancel."""

    def after_load(self) -> None:
        """Pictures or texts were read and maybe encoded: bring the network back, weights are swapped into it next."""

    def on_step(self, info: StepInfo) -> None:
        """An optimiser step is done."""

    def on_row(self, row: Mapping[str, Any]) -> None:
        """A row with `event` (validation, sample, watch) was written to metrics.jsonl; a sample's files are there."""

    def on_state(self, state: str, step: int, message: str = "") -> None:
        """The run is running, interrupted, failed or finished from here on, as its status.json says."""
