"""What a run will do, said before it starts and after its first steps; and whether its loss rises."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

from ..common.text import count_noun
from ..config.run import RunConfig
from ..data.examples import Dataset

PACE_STEPS = 5
"""Steps after which the time that a run takes is said."""
WINDOW, WINDOWS, SIGMAS = 50, 2, 4.0
"""Steps whose losses are averaged; such averages in a row that must lie above the first one before a run is said to
diverge; standard errors by which they must."""


def plan_text(dataset: Dataset, config: RunConfig, steps_per_epoch: float) -> str:
    """Images, repeats, steps per epoch and epochs of a run, in one line.

    Args:
        dataset: what trains, without held-out images.
        config: the run's.
        steps_per_epoch: optimizer steps in which every image is shown as often as it is repeated.
    """
    images, shown = len(dataset.examples), len(dataset)
    repeats = "" if shown == images else f", {shown} an epoch with repeats"
    each = config.batch_size * config.gradient_accumulation
    return (
        f"plan: {count_noun(images, 'image')}{repeats}, {each} a step; {steps_per_epoch:.4g} steps an epoch, "
        f"{config.steps} steps are {config.steps / steps_per_epoch:.3g} epochs"
    )


def pace_text(steps_left: int, seconds_per_step: float, now: float | None = None) -> str:
    """Seconds a step and the time of day at which a run ends. now: seconds since the epoch, by default the clock's."""
    left = steps_left * seconds_per_step
    end = time.localtime((time.time() if now is None else now) + left)
    day = time.strftime("%H:%M" if left < 86_400 else "%Y-%m-%d %H:%M", end)
    return f"{seconds_per_step:.3g} s a step, {_duration(left)} for the {steps_left} left, until about {day}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


class LossWatch:
    """Watches whether a loss stays above its start, as it does with a learning rate that is too high.

    The losses of single steps scatter with their noise levels. So the means of 50 steps each are compared with that of
    the first 50, and the difference with its standard error.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._recent: list[float] = []
        self._above = 0

    def add(self, loss: float) -> str:
        """Takes a step's loss; returns a warning when the loss has been above its start for long, once, else ""."""
        if len(self._first) < WINDOW:
            self._first.append(loss)
            return ""
        self._recent.append(loss)
        if len(self._recent) < WINDOW or self._above == WINDOWS:
            return ""
        mean, first = statistics.fmean(self._recent), statistics.fmean(self._first)
        self._above = self._above + 1 if mean - first > SIGMAS * _error(self._recent, self._first) else 0
        self._recent = []
        if self._above < WINDOWS:
            return ""
        return (
            f"the loss rises: {first:.4g} in the first {WINDOW} steps, {mean:.4g} in the last {WINDOW}. The learning "
            "rate may be too high; stop and start again with a third of it."
        )


def _error(*groups: Sequence[float]) -> float:
    """Standard error of the difference of two means."""
    return math.sqrt(sum(statistics.variance(group) / len(group) for group in groups))
