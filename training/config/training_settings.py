"""How to train: optimiser, schedule, loss and noise, shared by every training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_fields
from .fields import setting

GROUPS = ("projection", "cross_attention", "self_attention", "rest")
"""Parts of a model that may each have a learning rate and a first step."""
STEP_BY_TENSOR = ("AdamW", "Adafactor", "SGD", "AdamW8bit")
"""Optimizers whose update of one tensor depends on no other tensor, and on no count of all of them."""
ELEMENTWISE = ("AdamW", "SGD", "Lion")
"""Optimizers whose update of one number depends on no other number."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train: optimiser, schedule, loss, noise. Defaults are those most trainers ship for Stable Diffusion."""

    optimizer: Literal["AdamW", "Adafactor", "SGD", "AdamW8bit", "Prodigy", "AdamWScheduleFree", "Lion", "CAME"] = (
        setting("AdamW")
    )
    """AdamW; Adafactor needs less memory; SGD with momentum 0.9. The others need a package of their own, which an error
    names: see the help page of Training Settings."""
    lr_schedule: Literal[
        "constant", "linear", "cosine", "cosine with restarts", "polynomial", "REX", "warm-up-stable-decay"
    ] = setting("cosine")
    """Learning rate after the warm-up: constant, or lowered towards zero at the end."""
    warmup_steps: int = setting(10, low=0, high=10**7)
    """Steps in which the learning rate rises from zero."""
    weight_decay: float = setting(0.01, low=0, high=10, step=0.001, advanced=True)
    """Weight decay; decoupled for AdamW."""
    max_grad_norm: float = setting(1.0, low=0, high=10**6, step=0.1, snap=True, advanced=True)
    """Longer gradients are scaled down to this norm; 0 leaves them alone."""
    gradient_accumulation: int = setting(1, low=1, high=10**5)
    """Batches per optimiser step: a larger batch without more memory."""
    total_batch: int = setting(0, low=0, high=10**7, advanced=True)
    """Images per optimiser step, a multiple of batch_size: batches are summed up to it; 0 leaves it to
    gradient_accumulation."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = setting("auto")
    """Arithmetic of the forward pass (autocast). auto: bf16 where the GPU has it, fp16 on older ones (fp32 for reward
    tuning and fused_backward), fp32 on a CPU. Optimiser states are always fp32, trained weights
    unless bf16 is chosen for them."""
    ema_decay: float = setting(0.0, low=0, high=0.999999, step=0.0001, advanced=True)
    """Exponential moving average of the trained weights, used for samples and result; 0 is off, 0.999 is usual."""
    loss: Literal["mse", "huber", "l1", "pseudo-huber", "smooth-l1"] = setting("mse", advanced=True)
    """Distance between prediction and target; pseudo-huber and smooth-l1 are sd-scripts' huber and smooth_l1."""
    loss_weighting: Literal["none", "min-SNR", "debiased"] = setting("min-SNR", advanced=True)
    """Weight of the noise levels: min-SNR (arXiv 2303.09556), debiased (arXiv 2310.08442), or none, which flow models
    need."""
    snr_gamma: float = setting(5.0, low=0.01, high=1000, step=0.5, snap=True, advanced=True)
    """Cap of the signal-to-noise ratio for min-SNR."""
    timestep_sampling: Literal["uniform", "logit-normal", "high noise", "low noise"] = setting("uniform", advanced=True)
    """Draw all noise levels equally often, mostly the middle ones (arXiv 2403.03206), or mostly high or low ones
    (arXiv 2302.08453)."""
    min_timestep: int = setting(0, low=0, high=999, advanced=True)
    """Lowest noise level drawn; 0 is nearly clean."""
    max_timestep: int = setting(999, low=0, high=999, advanced=True)
    """Highest noise level drawn; 999 is nearly pure noise."""
    noise_offset: float = setting(0.0, low=0, high=1, step=0.01, snap=True, advanced=True)
    """Per-channel offset of the noise, for very dark or bright pictures; 0.05 is usual."""
    input_perturbation: float = setting(0.0, low=0, high=1, step=0.01, snap=True, advanced=True)
    """Extra noise on the network's input (arXiv 2301.11706); 0.1 is usual."""
    caption_dropout: float = setting(0.1, low=0, high=1, step=0.01, snap=True, advanced=True)
    """Share of captions replaced by an empty one, so that classifier-free guidance keeps working."""
    gradient_checkpointing: bool = setting(False)
    """Recompute activations in the backward pass: less memory, about a third slower."""
    validation_fraction: float = setting(0.0, low=0, high=0.5, step=0.01, snap=True)
    """Share of the images held out to measure the validation loss."""
    validate_every: int = setting(100, low=1, high=10**7, advanced=True)
    """Steps between two validation losses."""
    save_every: int = setting(100, low=1, high=10**7, advanced=True)
    """Steps between two saved states; a killed run resumes from the last one."""
    lr_projection: float = setting(1.0, low=0, high=1000, step=0.01, advanced=True)
    """Learning rate of the text encoder's projection, as a multiple of the run's; 0 does not train it."""
    lr_cross_attention: float = setting(1.0, low=0, high=1000, step=0.01, advanced=True)
    """Learning rate of cross-attention (attn2), as a multiple of the run's; 0 does not train it."""
    lr_self_attention: float = setting(1.0, low=0, high=1000, step=0.01, advanced=True)
    """Learning rate of self-attention (attn1), as a multiple of the run's; 0 does not train it."""
    lr_rest: float = setting(1.0, low=0, high=1000, step=0.01, advanced=True)
    """Learning rate of everything else in the UNet, as a multiple of the run's; 0 does not train it."""
    unfreeze_projection: int = setting(0, low=0, high=10**8, advanced=True)
    """Step at which the text encoder's projection begins to train."""
    unfreeze_cross_attention: int = setting(0, low=0, high=10**8, advanced=True)
    """Step at which cross-attention (attn2) begins to train."""
    unfreeze_self_attention: int = setting(0, low=0, high=10**8, advanced=True)
    """Step at which self-attention (attn1) begins to train."""
    unfreeze_rest: int = setting(0, low=0, high=10**8, advanced=True)
    """Step at which everything else in the UNet begins to train."""
    lr_cycles: int = setting(1, low=1, high=10**5, advanced=True)
    """Times that lr_schedule 'cosine with restarts' goes from the peak to zero."""
    lr_power: float = setting(1.0, low=0.01, high=100, step=0.1, advanced=True)
    """Exponent of lr_schedule 'polynomial'; 1 is a line, more falls faster at first."""
    lr_decay_share: float = setting(0.2, low=0.001, high=1, step=0.01, advanced=True)
    """Share of the steps after the warm-up in which lr_schedule 'warm-up-stable-decay' goes down to zero."""
    early_stop_after: int = setting(0, low=0, high=10**7, advanced=True)
    """Validations in a row without a lower loss that end the run, with its best weights as the result; 0 trains all
    steps."""
    result: Literal["last", "best"] = setting("last", advanced=True)
    """The last weights, or those of the lowest validation loss."""
    huber_schedule: Literal["constant", "exponential", "snr"] = setting("constant", advanced=True)
    """Knee of the Huber losses: huber_c at all noise levels, or down to it from 1 at clean images."""
    huber_c: float = setting(0.1, low=1e-6, high=1, step=0.01, advanced=True)
    """Knee of the Huber losses: smaller errors count squared."""
    multires_iterations: int = setting(0, low=0, high=20, step=1, advanced=True)
    """Layers of coarser (pyramid) noise; 0 is off, 6 to 10 usual."""
    multires_discount: float = setting(0.3, low=0, high=1, step=0.05, advanced=True)
    """Strength of each coarser layer of pyramid noise, as a share of the layer before."""
    zero_terminal_snr: bool = setting(False, advanced=True)
    """Make the last noise level pure noise (arXiv 2305.08891). For v-prediction models only; sample with the same
    levels, in ComfyUI by ModelSamplingDiscrete with zsnr on."""
    timestep_mean: float = setting(0.0, low=-10, high=10, step=0.1, advanced=True)
    """Centre of logit-normal timesteps; above 0 more noise."""
    timestep_std: float = setting(1.0, low=0.01, high=10, step=0.1, advanced=True)
    """Spread of logit-normal timesteps."""
    mask_weight: float = setting(0.1, low=0, high=1, step=0.05, advanced=True)
    """Weight of the area outside an image's mask."""
    mask_normalize: bool = setting(True, advanced=True)
    """Divide a masked loss by the mask's mean, so that small areas count as much."""
    caption_shuffle: bool = setting(False, advanced=True)
    """Put a caption's comma-separated tags in a new order each time it is shown."""
    keep_tokens: int = setting(0, low=0, high=1000, step=1, advanced=True)
    """First tags that are neither shuffled nor left out."""
    tag_dropout: float = setting(0.0, low=0, high=1, step=0.01, advanced=True)
    """Share of a caption's tags left out each time it is shown."""
    tensorboard: bool = setting(False, advanced=True)
    """Write events for TensorBoard into the run's folder; needs the package tensorboard."""
    block_swap: int = setting(0, low=0, high=1000, step=1, advanced=True)
    """Blocks of the UNet, from the last one back, whose frozen weights stay in RAM and come to the GPU while they are
    used; slower, same result. SD1.5 has 38 blocks, SDXL 87."""
    fused_backward: bool = setting(False, advanced=True)
    """Use and free each gradient as soon as it is there: 4 bytes less for each trained weight. For AdamW, Adafactor,
    SGD and AdamW8bit without gradient accumulation; max_grad_norm then clips each tensor by itself."""
    shard_weights: bool = setting(False, advanced=True)
    """Divide trained weights, gradients and optimiser states among the processes of `accelerate launch` (FSDP2): less
    memory on each card. For the `train` command with AdamW, SGD or Lion; ComfyUI has one process."""
    compile_blocks: bool = setting(False, advanced=True)
    """Compile the UNet's blocks one by one (torch.compile): minutes at the start and at each new picture size, then
    faster steps. Needs Triton on a GPU, a C++ compiler on a CPU. For the command line."""
    channels_last: bool = setting(False, advanced=True)
    """Hold the UNet's convolutions channels last in memory: same result but for the last digits; slower on a CPU, not
    measured on GPUs. For the command line."""
    master_weights: Literal["fp32", "bf16"] = setting("fp32", advanced=True)
    """How the UNet's trained weights are held. bf16, for retraining alone: 2 bytes less for each weight, and 2 for its
    gradient; updates are computed in fp32 and rounded up or down at random, right on average. With AdamW, Adafactor,
    SGD or AdamW8bit, without ema_decay."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_timestep > self.max_timestep:
            raise ValueError(
                f"min_timestep is {self.min_timestep}, above max_timestep {self.max_timestep}; expected min <= max."
            )
        if self.optimizer == "AdamWScheduleFree" and self.ema_decay:
            raise ValueError(
                f"ema_decay is {self.ema_decay}; expected 0 with AdamWScheduleFree, which averages the weights itself."
            )

        self._check_fused_backward()
        self._check_master_weights()

    def _check_master_weights(self) -> None:
        wrong = {
            f"optimizer {self.optimizer}": self.optimizer not in STEP_BY_TENSOR,
            f"ema_decay {self.ema_decay:g}": self.ema_decay > 0,
            "precision fp16": self.precision == "fp16",
            "shard_weights on": self.shard_weights,
        }
        found = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
        if self.master_weights == "bf16" and found:
            raise ValueError(
                f"master_weights is 'bf16' with {found}; expected {', '.join(STEP_BY_TENSOR)}, which update each "
                "tensor by itself, no average, precision bf16 or fp32, and whole weights. Set master_weights to 'fp32'."
            )

    def _check_fused_backward(self) -> None:
        if self.fused_backward and self.optimizer not in STEP_BY_TENSOR:
            raise ValueError(
                f"fused_backward is on with optimizer {self.optimizer}; expected one of {', '.join(STEP_BY_TENSOR)}, "
                "which update each tensor by itself."
            )
        if self.fused_backward and self.precision == "fp16":
            raise ValueError(
                "fused_backward is on with precision fp16, whose overflows are known only when all gradients are "
                "there; expected bf16 or fp32."
            )

    @property
    def varies_captions(self) -> bool:
        """Whether an image's caption differs between epochs, by its tags (caption_dropout aside)."""
        return self.caption_shuffle or self.tag_dropout > 0


FORMER_DEFAULTS = {"precision": "fp32"}
"""Defaults that were others when a setting came: what a run means that does not record it."""
_CARD = {
    "optimizer": "AdamW",
    "precision": "auto",
    "gradient_accumulation": 4,
    "total_batch": 0,
    "ema_decay": 0.0,
    "gradient_checkpointing": True,
    "block_swap": 0,
    "fused_backward": False,
}
"""What decides on memory; for adapters and words, and pictures of the model's size one by one."""
CARDS: dict[str, dict[str, Any]] = {
    "SD1.5 6 GB": _CARD,
    "SDXL 8 GB": _CARD | {"block_swap": 60},
    "SDXL 12 GB": _CARD,
    "SDXL 24 GB": _CARD | {"gradient_accumulation": 1},
}
"""Presets by the memory of the graphics card."""
_SDXL_RUN = {"resolution": 1024, "sample_width": 1024, "sample_height": 1024, "batch_size": 1}
CARD_RUNS: dict[str, dict[str, Any]] = {
    "SD1.5 6 GB": {"resolution": 512, "sample_width": 512, "sample_height": 512, "batch_size": 1},
    "SDXL 8 GB": _SDXL_RUN,
    "SDXL 12 GB": _SDXL_RUN,
    "SDXL 24 GB": _SDXL_RUN | {"batch_size": 4},
}
"""What the command line sets besides: sizes of pictures and batch."""
_FUSED = {"gradient_accumulation": 1, "fused_backward": True}
CARD_RETRAINING: dict[str, dict[str, Any]] = {
    "SD1.5 6 GB": {"train": "cross-attention"},
    "SDXL 8 GB": {"train": "cross-attention K/V", "optimizer": "Adafactor", **_FUSED},
    "SDXL 12 GB": {"train": "cross-attention K/V", "block_swap": 40, **_FUSED},
    "SDXL 24 GB": {"train": "cross-attention", "batch_size": 1, **_FUSED},
}
"""What the command line sets besides for retraining, whose trained weights need most of the memory."""
CARD_WORDS: dict[str, dict[str, Any]] = {
    "SD1.5 6 GB": {},
    "SDXL 8 GB": {"block_swap": 87},
    "SDXL 12 GB": {"block_swap": 40},
    "SDXL 24 GB": {},
}
"""What the command line sets besides for new words, which train through text encoders in fp32."""
_REWARD = {"train": "UNet LoRA", "learning_rate": 1e-4, "method": "last K", "stop_gradient": True}
CARD_REWARDS: dict[str, dict[str, Any]] = {
    "SD1.5 6 GB": _REWARD | {"width": 512, "height": 512},
    "SDXL 8 GB": _REWARD
    | {"width": 768, "height": 768, "sample_width": 768, "sample_height": 768, "resolution": 768, "block_swap": 87},
    "SDXL 12 GB": _REWARD | {"width": 1024, "height": 1024, "block_swap": 60},
    "SDXL 24 GB": _REWARD | {"width": 1024, "height": 1024},
}
"""What the command line sets besides for rewards: their gradients come through decoder and reward, and a LoRA of the
UNet is what leaves room for them."""
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
    **CARDS,
}
"""Named groups of settings; those of a preset other than "custom" replace the user's."""
PRESET_RUNS: dict[str, dict[str, Any]] = {"T5 swap, source notes": {"learning_rate": 4e-5, "steps": 10_000}}
"""The learning rate and steps of some presets: the best that their source reports."""
