"""How to train: optimiser, schedule, loss and noise, shared by every training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_choices, check_range

GROUPS = ("projection", "cross_attention", "self_attention", "rest")
"""Parts of a swapped model that may train at rates and from steps of their own."""


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
