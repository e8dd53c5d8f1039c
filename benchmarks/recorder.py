"""What a variant's process measures: seconds between the ends of its steps, and peak memory of its phases."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..training.common.callbacks import Callbacks, StepInfo
from ..training.common.rng import generator
from ..training.data.dataset import from_images
from ..training.data.examples import Dataset
from .anonymous_memory import PeakMemory
from .processes import Case

LOADING, PREPARING, TRAINING, ENDING = "loading", "preparing", "training", "ending"
CAPTION = "a red circle on the left"


class Recorder:
    """Marks of a variant; `figures` is what its process prints."""

    def __init__(self, case: Case, memory: PeakMemory):
        self.case, self.memory, self.trained = case, memory, 0
        self.first_step: float | None = None
        self.estimate: int | None = None
        self._marks: list[float] = []

    def begin(self, phase: str) -> None:
        self.memory.begin(phase)

    def expect(self, needed: int) -> None:
        """A run said how many bytes it takes in addition to what it has."""
        self.estimate = self.memory.now() + needed

    def step(self) -> None:
        """A step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())
        if self.first_step is None:
            self.first_step = time.time() - self.case.began

    def figures(self) -> dict[str, Any]:
        """Seconds of all steps but the first, peak bytes by phase, the bytes that the run said before its first step,
        and seconds from the process's start."""
        seconds = [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        peaks = self.memory.gpu_peaks if torch.cuda.is_available() else self.memory.peaks
        return {
            "seconds": seconds,
            "first step": self.first_step,
            "loading": peaks.get(LOADING),
            "preparing": peaks.get(PREPARING),
            "training": peaks.get(TRAINING),
            "estimate": self.estimate,
            "trained": self.trained,
        }


class Marks(Callbacks):
    """Passes the steps of a run on to a recorder."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def on_memory(self, text: str, needed: int) -> None:
        self.recorder.expect(needed)

    def before_step(self, step: int) -> None:
        if step == 1:
            self.recorder.begin(TRAINING)

    def on_step(self, info: StepInfo) -> None:
        self.recorder.step()
        if info.step == info.steps:
            self.recorder.begin(ENDING)


def pictures(case: Case) -> Dataset:
    """As many captioned pictures as a batch has, of noise."""
    return from_images(list(noise_images(case)), [CAPTION] * case.batch_size)


def noise_images(case: Case) -> Tensor:
    """(B, 3, side, side) in 0..1."""
    shape = (case.batch_size, 3, case.pixels, case.pixels)
    return torch.rand(shape, generator=generator(0, "bench pictures"))


def captions_of(case: Case) -> list[str]:
    """As many different captions as a batch has."""
    return [f"{CAPTION}, number {number}" for number in range(case.batch_size)]
