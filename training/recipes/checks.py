"""Checks before a training begins, of what would otherwise fail only after long work."""

from __future__ import annotations

from ..config.run import RunConfig
from ..loop.fused_backward import check_fused_backward
from ..loop.optimizers import check_optimizer
from ..models.block_swap import check_block_swap
from ..models.protocols import TextToImage
from ..objectives.losses import check_objective
from ..runs.folder import RunFolder
from ..runs.metrics_log import check_tensorboard


def check_steps(folder: RunFolder, steps: int) -> None:
    """Raises ValueError when a run has done more steps than it is asked for."""
    done = folder.status()["step"]
    if done > steps:
        raise ValueError(
            f"steps is {steps}; run {folder.name!r} has done {done}. Ask for as many, or choose resume = restart."
        )


def check_fit(model: TextToImage, config: RunConfig) -> None:
    """Raises ValueError when model and settings do not fit: widths, precision, loss weighting, channels, optimizer."""
    check_tensorboard(config.settings)
    if config.learning_rate == 0:
        raise ValueError("learning_rate is 0, with which nothing trains; expected one above 0, such as 1e-5.")
    check_width(model)
    check_pooled(model)
    denoiser, settings = model.denoiser, config.settings
    check_optimizer(settings, config.learning_rate, denoiser.device)
    check_fused_backward(config)
    check_block_swap(denoiser, settings.block_swap)
    if settings.precision == "fp16" and denoiser.device.type != "cuda":
        raise ValueError("precision is 'fp16' without a CUDA device; expected 'fp32' or 'bf16' there.")
    check_objective(settings, denoiser.prediction_type)
    channels = denoiser.input_channels
    if channels != denoiser.latent_channels:
        raise ValueError(
            f"UNet reads {channels} channels; expected {denoiser.latent_channels}. Inpainting and edit models have "
            "inputs that captioned images do not give."
        )


def check_width(model: TextToImage) -> None:
    """Raises ValueError when the text encoder's width differs from that of the UNet's cross-attention."""
    width, expected = model.text_encoder.width, model.denoiser.context_width
    if width != expected:
        raise ValueError(
            f"text encoder's width is {width}; the UNet reads {expected}. Load the text encoder with context_width "
            f"{expected} (or 'auto' with this model connected)."
        )


def check_pooled(model: TextToImage) -> None:
    """Raises ValueError when the UNet needs a pooled output (SDXL) that the text encoder does not have."""
    width, expected = model.text_encoder.pooled_width, model.denoiser.pooled_width
    if expected and width != expected:
        raise ValueError(
            f"text encoder's pooled output is {width or 'none'}; the UNet reads one of {expected}, as SDXL does. Load "
            "the text encoder with context_width 'sdxl' (or 'auto' with this model connected)."
        )
