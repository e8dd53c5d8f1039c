"""Where the figures of a run go while it trains: metrics.jsonl and, where it is asked for, events for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ..common.callbacks import Callbacks
from ..config.training_settings import TrainingSettings
from .folder import RunFolder

FLUSH_SECONDS = 5
"""How old TensorBoard's view of a run may be."""


def check_tensorboard(settings: TrainingSettings) -> None:
    """Raises ValueError when events are asked for and the package that writes them is not there."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard is on, but the package is not installed; expected it. `pip install tensorboard` in this "
            "Python, or turn tensorboard off: the run has its own chart and report."
        )


class MetricsLog:
    """Takes a run's rows. Begin it at the step that the run goes on from, and close it at the end."""

    def __init__(self, folder: RunFolder, settings: TrainingSettings, callbacks: Callbacks):
        self._folder, self._wanted, self._callbacks = folder, settings.tensorboard, callbacks
        self._events: TensorboardEvents | None = None

    def begin(self, step: int) -> None:
        if self._wanted:
            self._events = TensorboardEvents(self._folder, step)

    def add(self, row: dict[str, Any]) -> None:
        self._folder.add_row(row)
        if self._events is not None:
            self._events.add(row)
        if "event" in row:
            self._callbacks.on_row(row)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class TensorboardEvents:
    """A run's rows as TensorBoard's events, in <run>/tensorboard; it shows them as metrics.jsonl has them.

    Where a run goes on at an earlier step than it had come to, TensorBoard is told to forget what came after it.
    """

    def __init__(self, folder: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder.path / "tensorboard"
        first = not any(path.glob("events.*"))
        self._folder = folder
        self._writer = SummaryWriter(str(path), purge_step=None if first else step, flush_secs=FLUSH_SECONDS)
        for row in folder.rows():
            if first or row["step"] >= step:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        kind, step = row.get("event", "train"), row["step"]
        for name, value in figures(row):
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        if "grid" in row:
            from ..data.images import load_image

            self._writer.add_image("samples", load_image(self._folder.samples / row["grid"]), step)
            self._writer.add_text("prompts", "\n\n".join(row["prompts"]), step)

    def close(self) -> None:
        self._writer.close()


def figures(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a row under their names, those in lists and dictionaries below with a stroke between; no step."""
    for name, value in row.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from figures(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and (before or name != "step"):
            yield f"{before}{name}", value
