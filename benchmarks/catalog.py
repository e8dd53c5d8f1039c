"""Everything that `python run.py bench` can measure, by name: timings, the two long benchmarks, and the studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import data, demo_model, lora, memory_use, projection_study, reset_study, reward, reward_study, word_study
from .speed import TIMINGS
from .study import Study

LORA, REWARD, DEMO_MODEL, MEMORY, DATA = "lora", "reward", "demo-model", "memory", "data"
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
    """Turns of every variant, after one that is not counted."""
    batch_size: int = 0
    """Pictures or captions at a time; 0: 16, or a study's default, or 1 for `memory`."""
    size: Literal["demo", "sd15", "sdxl"] = "demo"
    """Of `memory`: the model whose shapes are measured."""

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
    long = {DEMO_MODEL: demo_model.DESCRIPTION, REWARD: reward.DESCRIPTION}
    return timings | long | studies | {LORA: lora.DESCRIPTION, MEMORY: memory_use.DESCRIPTION, DATA: data.DESCRIPTION}
