"""Settings that every run has, and those of a UNet's retraining."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from .checks import check_fields, check_run_name
from .fields import rate_setting, setting
from .guard import GuardRule
from .sample_prompts import SamplePrompts
from .training_settings import FORMER_DEFAULTS, TrainingSettings

LAYERS = ("cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention", "whole UNet")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that every training has."""

    run_name: str
    """Name of the run's folder, in output/retune."""
    steps: int = setting(500, low=1, high=10**8)
    """Optimiser steps in all."""
    batch_size: int = setting(1, low=1, high=10**5)
    """Images per batch."""
    learning_rate: float = rate_setting(1e-5)
    """Peak learning rate."""
    seed: int = setting(0, low=0, high=2**64 - 1, advanced=True)
    """Seed of every random draw of the run."""
    settings: TrainingSettings = TrainingSettings()
    samples: SamplePrompts = SamplePrompts()
    resume: Literal["auto", "restart"] = setting("auto", advanced=True)
    """auto: resume the run of this name if its settings are equal; restart: move the old folder aside. Steps, samples,
    validate_every, save_every, early_stop_after, result, tensorboard, gradient_checkpointing and block_swap may
    change."""

    def __post_init__(self) -> None:
        check_run_name(self.run_name)
        check_fields(self)
        if self.settings.total_batch % self.batch_size:
            raise ValueError(
                f"total_batch is {self.settings.total_batch}; expected a multiple of batch_size, {self.batch_size}. "
                "Choose a batch_size that divides it, or total_batch 0."
            )
        needs_validation = self.settings.early_stop_after or self.settings.result == "best"
        if needs_validation and not self.settings.validation_fraction:
            raise ValueError(
                "validation_fraction is 0; expected more with early_stop_after or result 'best', which go by the loss "
                "of held-out images. 0.05 to 0.1 is usual."
            )

    @property
    def gradient_accumulation(self) -> int:
        """Batches summed up before an optimiser step."""
        return self.settings.total_batch // self.batch_size or self.settings.gradient_accumulation

    @property
    def guard_rule(self) -> GuardRule | None:
        """When a guard ends the run and chooses its result; only reward tuning can have one."""
        return None


@dataclass(frozen=True, kw_only=True)
class TrainModelConfig(RunConfig):
    """Retrain parts of a UNet (and the projection after a text encoder) on captioned images."""

    train: Literal[LAYERS] = setting("cross-attention")  # type: ignore[valid-type]
    """Which layers of the UNet train."""
    train_projection: bool = setting(True)
    """Train the projection of a T5 text encoder as well."""


RESUMABLE = {"run_name", "steps", "samples", "resume", "guard_action"}
"""Fields that may differ when a run resumes."""
RESUMABLE_SETTINGS = {"validate_every", "save_every", "early_stop_after", "result", "tensorboard"}
RESUMABLE_SETTINGS |= {"gradient_checkpointing", "block_swap"}  # same bits, and a run out of memory may need them
RESUMABLE_SETTINGS |= {"shard_weights"}  # equal up to the order of additions, as the number of processes is


def identity(config: Any) -> dict[str, Any]:
    """The part of a config that must be equal for a run to resume, as plain JSON values."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in RESUMABLE}
    if "settings" in values:
        values["settings"] = {k: v for k, v in asdict(values["settings"]).items() if k not in RESUMABLE_SETTINGS}
    return values


def former_identity(config: Any) -> dict[str, Any]:
    """`identity` of the defaults, for settings that did not exist when a run began."""
    values = {f.name: f.default for f in fields(config) if f.name not in RESUMABLE and f.default is not MISSING}
    if "settings" in values:
        settings = asdict(values["settings"]) | FORMER_DEFAULTS
        values["settings"] = {k: v for k, v in settings.items() if k not in RESUMABLE_SETTINGS}
    return values
