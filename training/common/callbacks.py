"""The interface between a run and its caller: a terminal, a node, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class StepInfo:
    """Progress after an optimiser step."""

    run: str
    """Name of the run."""
    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    loss: float
    learning_rate: float
    seconds_per_step: float
    row: Mapping[str, Any] = field(default_factory=dict)
    """The step's row of metrics.jsonl: loss, learning rate and further measurements."""


class Callbacks:
    """Reports of a run to its caller; by default they do nothing.

    Any method may raise to cancel the run: its state is saved, then the exception propagates.
    """

    interrupts: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    """Exceptions that mean "cancelled by the user" rather than "failed"."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the device ran out of memory."""
        return isinstance(error, torch.cuda.OutOfMemoryError)

    def wants_finish(self) -> bool:
        """Whether the run ends now as if the step just done were its last; called after every step."""
        return False

    def on_text(self, text: str) -> None:
        """A phase begins: text for people, such as loading, caching or sampling."""

    def on_memory(self, text: str, needed: int) -> None:
        """What the run will take of the device's memory was computed.

        Args:
            text: for people, shown before the first step.
            needed: bytes in addition to what it has.
        """
        self.on_text(text)

    def managed_bytes(self, device: torch.device) -> int:
        """Bytes of models on a device that the caller unloads where a run needs their memory; none of those that the
        run computes with in a step."""
        return 0

    def idle_networks(self) -> Sequence[nn.Module]:
        """The networks of the models that `managed_bytes` counts: parts of the run's own model may be among them."""
        return ()

    def versions(self) -> Mapping[str, str]:
        """Programs by name that a run computes with besides its libraries, and their versions."""
        return {}

    def pulse(self) -> None:
        """A part of long work is done, such as a sampler step or a picture; called to allow a cancel."""

    def on_end(self, text: str) -> None:
        """The run has ended: text for people. Called last."""
        self.on_text(text)

    def before_step(self, step: int) -> None:
        """A step, or the drawing of the first samples, is next; called to allow a cancel."""

    def after_load(self) -> None:
        """Pictures or texts were loaded and perhaps encoded; the network is needed on its device next."""

    def on_step(self, info: StepInfo) -> None:
        """An optimiser step is done."""

    def on_row(self, row: Mapping[str, Any]) -> None:
        """A row with `event` (validation, sample, watch) was written to metrics.jsonl, after the files of a sample."""

    def on_state(self, state: str, step: int, message: str = "") -> None:
        """The run's state, as in its status.json, became running, interrupted, failed or finished."""
