"""Settings of a run: frozen dataclasses that nodes, the command line and `config.json` share."""

from __future__ import annotations

import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from .guard import GuardRule

LAYERS = ("cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention", "whole UNet")
GROUPS = ("projection", "cross_attention", "self_attention", "rest")
"""Parts of a swapped model that may train at rates and from steps of their own."""
RUN_NAME = re.compile(r"[\w][\w .()+=@-]*", re.UNICODE)
RESERVED_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{p}{i}" for p in ("COM", "LPT") for i in range(1, 10))}


def check_choices(config: Any) -> None:
    """Raises ValueError when a field typed `Literal[...]` holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        if getattr(hint, "__origin__", None) is Literal and getattr(config, name) not in choices:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(str, choices))}.")


def check_range(config: Any, **limits: tuple[float, float]) -> None:
    """Raises ValueError when a named field lies outside its (lowest, highest) limits."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; expected {low} to {high}.")


def check_size(config: Any, what: str) -> None:
    """Raises ValueError unless the fields width and height are multiples of 8. what: whose size it is."""
    if config.width % 8 or config.height % 8:
        raise ValueError(f"{what} is {config.width}x{config.height}; expected multiples of 8.")


def check_run_name(name: str, what: str = "run name") -> None:
    """Raises ValueError unless `name` is a plain folder name on every system (no separators, no `..`)."""
    bad = not RUN_NAME.fullmatch(name) or name.endswith((".", " ")) or ".." in name
    if bad or name.split(".")[0].upper() in RESERVED_NAMES or len(name) > 100:
        raise ValueError(
            f"{what} is {name!r}; expected a plain folder name (letters, digits, space, and .-_()+=@). "
            "Leave out path separators and '..'."
        )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train: optimiser, schedule, loss, noise. Defaults are those most trainers ship for Stable Diffusion."""

    optimizer: Literal["AdamW", "Adafactor", "SGD", "AdamW8bit", "Prodigy", "AdamWScheduleFree", "Lion", "CAME"] = (
        "AdamW"
    )
    """AdamW (arXiv 1711.05101), Adafactor (1804.04235, little memory), SGD with momentum 0.9; with packages of their
    own AdamW8bit (2110.02861), Prodigy (2306.06101), AdamWScheduleFree (2405.15682), Lion (2302.06675), CAME
    (2307.02047)."""
    lr_schedule: Literal[
        "constant", "linear", "cosine", "cosine with restarts", "polynomial", "REX", "warm-up-stable-decay"
    ] = "cosine"
    """Learning rate after warm-up: kept, or lowered to zero just after the last step. warm-up-stable-decay keeps it
    until the last lr_decay_share of the run."""
    warmup_steps: int = 10
    """Steps in which the learning rate rises from zero, linearly."""
    weight_decay: float = 0.01
    """Decoupled weight decay; for SGD an L2 penalty."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    gradient_accumulation: int = 1
    """Batches summed up before an optimiser step."""
    total_batch: int = 0
    """Images per optimiser step, a multiple of the batch size: so many batches are summed up; 0 leaves it to
    gradient_accumulation."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass (autocast). Trained weights and optimiser states are always fp32."""
    ema_decay: float = 0.0
    """Exponential moving average of the trained weights, used for samples and the result; 0 = off."""
    loss: Literal["mse", "huber", "l1", "pseudo-huber", "smooth-l1"] = "mse"
    """Distance between prediction and target; huber, pseudo-huber and smooth-l1 have their knee at huber_c."""
    loss_weighting: Literal["none", "min-SNR", "debiased"] = "min-SNR"
    """Weight by noise level: min-SNR (arXiv 2303.09556) or debiased estimation (arXiv 2310.08442)."""
    snr_gamma: float = 5.0
    """Cap of the signal-to-noise ratio for min-SNR."""
    timestep_sampling: Literal["uniform", "logit-normal", "high noise", "low noise"] = "uniform"
    """Which noise levels are drawn: all alike, mostly the middle ones (arXiv 2403.03206), or mostly the high or the low
    ones (cubic, arXiv 2302.08453)."""
    min_timestep: int = 0
    """Lowest training timestep drawn (0 is nearly clean)."""
    max_timestep: int = 999
    """Highest training timestep drawn (999 is pure noise)."""
    noise_offset: float = 0.0
    """Strength of a per-channel offset added to the noise; lets a model learn very dark and very bright pictures."""
    input_perturbation: float = 0.0
    """Extra noise on the network's input only (arXiv 2301.11706)."""
    caption_dropout: float = 0.1
    """Share of captions replaced by an empty one, so that classifier-free guidance keeps working."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    validation_fraction: float = 0.0
    """Share of the images held out from training to measure the validation loss."""
    validate_every: int = 100
    """Optimiser steps between two validation losses."""
    save_every: int = 100
    """Optimiser steps between two saved states; a killed run goes on from the last one."""
    lr_projection: float = 1.0
    """Learning rate of the text encoder's projection, as a multiple of the run's; 0 keeps it as it is."""
    lr_cross_attention: float = 1.0
    """Learning rate of cross-attention (attn2), as a multiple of the run's; 0 keeps it as it is."""
    lr_self_attention: float = 1.0
    """Learning rate of self-attention (attn1), as a multiple of the run's; 0 keeps it as it is."""
    lr_rest: float = 1.0
    """Learning rate of everything else in the UNet, as a multiple of the run's; 0 keeps it as it is."""
    unfreeze_projection: int = 0
    """Step at which the text encoder's projection begins to train; before, it stays as it is."""
    unfreeze_cross_attention: int = 0
    """Step at which cross-attention (attn2) begins to train; before, it stays as it is."""
    unfreeze_self_attention: int = 0
    """Step at which self-attention (attn1) begins to train; before, it stays as it is."""
    unfreeze_rest: int = 0
    """Step at which everything else in the UNet begins to train; before, it stays as it is."""
    lr_cycles: int = 1
    """Times that lr_schedule "cosine with restarts" goes from the peak to zero."""
    lr_power: float = 1.0
    """Exponent of lr_schedule "polynomial"; 1 is a line, more falls faster at first."""
    lr_decay_share: float = 0.2
    """Share of the steps after the warm-up in which lr_schedule "warm-up-stable-decay" goes down to zero."""
    early_stop_after: int = 0
    """Validations in a row without a lower loss that end the run, with the best weights as its result; 0 = never."""
    result: Literal["last", "best"] = "last"
    """Which weights a run that was not stopped early ends with: the last, or those of the lowest validation loss."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """Knee of the Huber losses over the noise levels: the same, or from 1 at clean images down to huber_c at pure noise
    (sd-scripts' schedules)."""
    huber_c: float = 0.1
    """Knee of the Huber losses: errors below it count squared, larger ones about linearly."""
    multires_iterations: int = 0
    """Layers of coarser noise added to the noise (pyramid noise), 6 to 10 is usual; 0 = off."""
    multires_discount: float = 0.3
    """Strength of each coarser layer of pyramid noise, as a share of the one before."""
    zero_terminal_snr: bool = False
    """Rescale the noise levels so that the last one is pure noise (arXiv 2305.08891); for v-prediction models only, and
    sampling then needs the same levels."""
    timestep_mean: float = 0.0
    """Centre of logit-normal timesteps; above 0 more noise, below 0 less."""
    timestep_std: float = 1.0
    """Spread of logit-normal timesteps; small values keep to the centre."""
    mask_weight: float = 0.1
    """Weight of the area outside an image's mask, for data sets with masks; 0 leaves it out."""
    mask_normalize: bool = True
    """Divide a masked loss by the mask's mean, so that images with a small masked area count as much as others."""
    caption_shuffle: bool = False
    """Put the comma-separated tags of a caption in a new order each time it is shown."""
    keep_tokens: int = 0
    """The first tags of a caption, so many, that are neither shuffled nor left out."""
    tag_dropout: float = 0.0
    """Share of a caption's comma-separated tags that is left out each time it is shown."""
    tensorboard: bool = False
    """Write events for TensorBoard into the run's folder; needs the package tensorboard."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(
            self,
            warmup_steps=(0, 10**7),
            weight_decay=(0, 10),
            max_grad_norm=(0, 10**6),
            gradient_accumulation=(1, 10**5),
            total_batch=(0, 10**7),
            ema_decay=(0, 0.999999),
            snr_gamma=(0.01, 1000),
            min_timestep=(0, 999),
            max_timestep=(0, 999),
            noise_offset=(0, 1),
            input_perturbation=(0, 1),
            caption_dropout=(0, 1),
            validation_fraction=(0, 0.5),
            validate_every=(1, 10**7),
            save_every=(1, 10**7),
            lr_cycles=(1, 10**5),
            lr_power=(0.01, 100),
            lr_decay_share=(0.001, 1),
            early_stop_after=(0, 10**7),
            huber_c=(1e-6, 1),
            multires_iterations=(0, 20),
            multires_discount=(0, 1),
            timestep_mean=(-10, 10),
            timestep_std=(0.01, 10),
            mask_weight=(0, 1),
            keep_tokens=(0, 1000),
            tag_dropout=(0, 1),
            **{f"lr_{group}": (0, 1000) for group in GROUPS},
            **{f"unfreeze_{group}": (0, 10**8) for group in GROUPS},
        )
        if self.min_timestep > self.max_timestep:
            raise ValueError(
                f"min_timestep is {self.min_timestep}, above max_timestep {self.max_timestep}; expected min <= max."
            )
        if self.optimizer == "AdamWScheduleFree" and self.ema_decay:
            raise ValueError(
                f"ema_decay is {self.ema_decay}; expected 0 with AdamWScheduleFree, which averages the weights itself."
            )

    @property
    def varies_captions(self) -> bool:
        """Whether an image's caption changes from one showing to the next (dropping all of it aside)."""
        return self.caption_shuffle or self.tag_dropout > 0


PRESETS: dict[str, dict[str, Any]] = {
    "custom": {},
    "T5 swap": {"lr_schedule": "cosine", "warmup_steps": 20, "loss_weighting": "min-SNR", "snr_gamma": 5.0},
    "T5 swap, source notes": {
        "optimizer": "AdamW",
        "lr_schedule": "cosine",
        "total_batch": 64,
        "loss_weighting": "min-SNR",
        "snr_gamma": 5.0,
    },
}
"""Named groups of settings; a preset other than "custom" wins over the values it names."""
PRESET_RUNS: dict[str, dict[str, Any]] = {"T5 swap, source notes": {"learning_rate": 4e-5, "steps": 10_000}}
"""What some presets say of the run besides: the best that their source reports."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """Prompts drawn while training, always from the same noise, so that pictures can be compared over time."""

    prompts: tuple[str, ...] = ()
    """One picture each; an empty tuple draws none."""
    every: int = 100
    """Optimiser steps between two sets of samples, 0 = once per epoch; step 0 and the last step are always drawn."""
    steps: int = 20
    """Sampler steps (deterministic DDIM, arXiv 2010.02502)."""
    cfg: float = 5.0
    """Classifier-free guidance scale (arXiv 2207.12598)."""
    seed: int = 0
    """Seed of the starting noise."""
    width: int = 512
    """Picture width in pixels, a multiple of 8."""
    height: int = 512
    """Picture height in pixels, a multiple of 8."""

    def __post_init__(self) -> None:
        check_range(self, every=(0, 10**7), steps=(1, 1000), cfg=(0, 100), width=(8, 8192), height=(8, 8192))
        check_size(self, "sample size")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training on captioned images is asked for."""

    run_name: str
    """Folder name of the run."""
    steps: int = 500
    """Optimiser steps in all."""
    batch_size: int = 1
    """Images per batch."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    seed: int = 0
    """Names every random draw of the run."""
    settings: TrainingSettings = TrainingSettings()
    samples: SamplePrompts = SamplePrompts()
    resume: Literal["auto", "restart"] = "auto"
    """auto: go on with the run of this name if its settings are equal; restart: move the old folder aside."""

    def __post_init__(self) -> None:
        check_run_name(self.run_name)
        check_choices(self)
        check_range(self, steps=(1, 10**8), batch_size=(1, 10**5), learning_rate=(0, 10), seed=(0, 2**64 - 1))
        if self.settings.total_batch % self.batch_size:
            raise ValueError(
                f"total_batch is {self.settings.total_batch}; expected a multiple of batch_size, {self.batch_size}. "
                "Choose a batch_size that divides it, or total_batch 0."
            )
        wants_validation = self.settings.early_stop_after or self.settings.result == "best"
        if wants_validation and not self.settings.validation_fraction:
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
    """Retrain parts of a UNet (and the projection behind a text encoder) on captioned images."""

    train: Literal[LAYERS] = "cross-attention"  # type: ignore[valid-type]
    """Which layers of the UNet train."""
    train_projection: bool = True
    """Whether the text encoder's projection trains too (it has one after RetuneLoadT5)."""


RESUMABLE = {"run_name", "steps", "samples", "resume", "guard_action"}
"""Fields that may differ when a run goes on."""
RESUMABLE_SETTINGS = {"validate_every", "save_every", "early_stop_after", "result", "tensorboard"}
RESUMABLE_SETTINGS |= {"gradient_checkpointing"}  # it gives the same bits, and a run that ran out of memory may need it


def identity(config: Any) -> dict[str, Any]:
    """The part of a config that must be equal for a run to go on, as plain JSON values."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in RESUMABLE}
    if "settings" in values:
        values["settings"] = {k: v for k, v in asdict(values["settings"]).items() if k not in RESUMABLE_SETTINGS}
    return values


def former_identity(config: Any) -> dict[str, Any]:
    """What `identity` takes for settings that an earlier version of the program did not have: their defaults."""
    values = {f.name: f.default for f in fields(config) if f.name not in RESUMABLE and f.default is not MISSING}
    if "settings" in values:
        values["settings"] = {k: v for k, v in asdict(values["settings"]).items() if k not in RESUMABLE_SETTINGS}
    return values
