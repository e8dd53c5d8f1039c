"""Everything that `python run.py bench` can measure, by name: timings, the two long benchmarks, and the studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import data, demo_model, gpu, lora, memory_use, projection_study, reset_study, reward, reward_study, word_study
from .comparisons import COMPARISONS
from .speed import TIMINGS
from .study import Study

LORA_LOSS, REWARD_METHODS, DEMO_MODEL = "lora-loss", "reward-methods", "demo-model"
MEMORY, DATA, GPU = "memory", "data", "gpu"
STUDIES: dict[str, Study] = {
    "reset-study": reset_study.STUDY,
    "projection-start": projection_study.STUDY,
    "reward-study": reward_study.STUDY,
    "word-study": word_study.STUDY,
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure and how often."""

    name: str = ""
    """Which benchmark or study; empty lists them."""
    rounds: int = 7
    """Turns of every variant, or steps in each of its processes; one more comes first and is not counted."""
    batch_size: int = 0
    """Pictures or captions at a time; 0: 16, a study's own, or 1 for `memory`, `data` and what runs in processes."""
    size: Literal["demo", "sd15", "sdxl"] = "demo"
    """The model whose shapes are measured, with random weights: of `memory`, `gpu` and what runs in processes."""

    def __post_init__(self) -> None:
        if self.name and self.name not in descriptions():
            raise ValueError(f"benchmark is {self.name!r}; expected one of {', '.join(descriptions())}.")
        if self.rounds < 1 or self.batch_size < 0:
            raise ValueError(
                f"rounds and batch_size are {self.rounds} and {self.batch_size}; expected 1 and 0 or more."
            )


def descriptions() -> dict[str, str]:
    """Name -> a sentence on what is measured."""
    timings = {name: function.__doc__ for name, function in TIMINGS.items()}
    studies = {name: study.description for name, study in STUDIES.items()}
    sized = {name: comparison.description for name, comparison in COMPARISONS.items()}
    sized |= {MEMORY: memory_use.DESCRIPTION, DATA: data.DESCRIPTION, GPU: gpu.DESCRIPTION}
    long = {DEMO_MODEL: demo_model.DESCRIPTION, LORA_LOSS: lora.DESCRIPTION, REWARD_METHODS: reward.DESCRIPTION}
    return sized | timings | long | studies
