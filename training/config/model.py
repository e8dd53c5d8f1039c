"""Which text-to-image model a command opens, and what is done to it before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .checks import check_fields
from .fields import setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A text-to-image model and what is done to it before training."""

    model: str
    """diffusers folder, .safetensors checkpoint, or "demo"."""
    tokenizer: Path | None = None
    """CLIP tokenizer folder, for a single-file checkpoint."""
    t5: str | None = None
    """T5 file or folder that replaces CLIP, or "demo"; None keeps CLIP."""
    t5_tokenizer: Path | None = None
    """tokenizer.json or spiece.model of the T5, when it is not in the same folder."""
    comfyui: Path | None = None
    """An installed ComfyUI, to take tokenizers from."""
    projection: Literal["orthogonal", "truncate", "mlp", "resampler", "timestep resampler"] = setting("orthogonal")
    """Start of the projection to the UNet's width: a random orthogonal map, the identity cut or padded, orthogonal plus
    a small trainable network, or a trainable resampler to 64 tokens as in ELLA, which may depend on the noise level."""
    projection_seed: int = 0
    """Seed of the random projection."""
    target_std: float | None = None
    """Scale the T5's output to this std; None matches the CLIP that it replaces."""
    max_tokens: int = setting(256)
    """Longer prompts are cut, with a warning."""
    pad: Literal["none", "max_tokens"] = setting("none")
    """none: the context is as long as the prompt. max_tokens: always padded, and pads are attended. Train and sample
    the same way."""
    fit: Path | None = None
    """Text file of prompts, one a line: the projection is fitted on them to the text encoder that the T5 replaces."""
    fit_method: Literal["ridge", "mean-covariance", "distillation"] = setting("ridge")
    """ridge: nearest to the reference encoder, but with a smaller std, since what the T5 cannot predict is left out.
    mean-covariance: with its mean and covariance, so the same std, and as near as that allows. distillation: a small
    network over all tokens learns the reference's outputs from the prompts, in minutes; much nearer: the best start."""
    fit_steps: int = setting(1600, low=1, high=10**6)
    """Optimizer steps of the distillation."""
    reset: str | None = None
    """Layers to reset; None keeps all."""
    reset_seed: int = 0
    """Seed of the random weights of the reset."""
    tuned: tuple[str, ...] = ()
    """Results of earlier runs that are put into the model, in this order and after all else: folders of `reward`,
    `train` or `lora` runs, or their files (a LoRA of any trainer too). FILE:0.5 goes half the way."""
    device: str = ""
    """Such as cuda or cpu; empty takes what accelerate finds on the command line, and the CPU elsewhere."""
    prediction: Literal["auto", "eps", "v", "flow"] = setting("auto")
    """What the UNet predicts, where the model tells it wrong. auto: as its scheduler, its keys v_pred and
    edm_vpred.sigma_max, its metadata or a YAML file beside it have it; what was decided and why is printed."""
    noise_levels: Literal["auto", "scaled linear", "zero terminal SNR"] = setting("auto")
    """Noise levels at which the UNet was trained, where the model tells them wrong. scaled linear: Stable Diffusion's;
    zero terminal SNR: those up to pure noise (ztsnr)."""

    def __post_init__(self):
        check_fields(self)
