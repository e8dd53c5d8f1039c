"""The log of a running training: metrics.jsonl and, if asked for, events for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ..common.callbacks import Callbacks
from ..common.files import writing
from ..config.training_settings import TrainingSettings
from .folder import RunFolder

FLUSH_SECONDS = 5
"""Seconds between writes of TensorBoard's events."""


def check_tensorboard(settings: TrainingSettings) -> None:
    """Raises ValueError when events are asked for and the package that writes them is not installed."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard is on, but the package is not installed; expected it. `pip install tensorboard` in this "
            "Python, or turn tensorboard off: the run has its own chart and report."
        )


class MetricsLog:
    """Writes a run's rows. Begin it at the step that the run resumes from, and close it at the end."""

    def __init__(self, folder: RunFolder, settings: TrainingSettings, callbacks: Callbacks):
        self._folder, self._wanted, self._callbacks = folder, settings.tensorboard, callbacks
        self._events: TensorboardEvents | None = None

    def begin(self, step: int) -> None:
        if self._wanted:
            self._events = TensorboardEvents(self._folder, step)

    def add(self, row: dict[str, Any]) -> None:
        self._folder.add_row(row)
        self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        """Passes on a row that is in metrics.jsonl."""
        if self._events is not None:
            self._events.add(row)
        if "event" in row:
            self._callbacks.on_row(row)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class TensorboardEvents:
    """A run's rows as TensorBoard's events, in <run>/tensorboard.

    When a run resumes from an earlier step than it had reached, TensorBoard discards the later events (purge_step).
    """

    def __init__(self, folder: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder.path / "tensorboard"
        first = not any(self._path.glob("events.*"))
        self._folder = folder
        with writing(self._path):
            purge = None if first else step
            self._writer = SummaryWriter(str(self._path), purge_step=purge, flush_secs=FLUSH_SECONDS)
        for row in folder.rows():
            if first or row["step"] >= step:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        kind, step = row.get("event", "train"), row["step"]
        with writing(self._path):
            for name, value in figures(row):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            if "grid" in row:
                self._add_samples(row)

    def _add_samples(self, row: Mapping[str, Any]) -> None:
        from ..data.images import load_image

        self._writer.add_image("samples", load_image(self._folder.samples / row["grid"]), row["step"])
        self._writer.add_text("prompts", "\n\n".join(row["prompts"]), row["step"])

    def close(self) -> None:
        with writing(self._path):
            self._writer.close()


def figures(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a row but the step, by name; those in lists and dictionaries by "name/key"."""
    for name, value in row.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and (prefix or name != "step"):
            yield f"{prefix}{name}", value
