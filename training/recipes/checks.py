"""Checks before a training begins, of what would otherwise fail only after long work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..common.distributed import world
from ..config.embedding import EmbeddingConfig
from ..config.reward import RewardTuneConfig
from ..config.run import RunConfig
from ..config.training_settings import FORMER_DEFAULTS, TrainingSettings
from ..formats.embedding_save import expect_file_names
from ..loop.fused_backward import check_fused_backward
from ..loop.memory import retrains_whole_unet
from ..loop.optimizers import PACKAGES, check_optimizer, library
from ..loop.precision import default_precision, has_bf16
from ..loop.rounding import check_master_weights
from ..loop.sharding import check_sharding
from ..models.block_swap import check_block_swap
from ..models.compiled import check_compiler
from ..models.diffusers import DiffusersDenoiser
from ..models.protocols import Denoiser, TextToImage
from ..objectives.losses import check_objective
from ..runs.folder import RunConflict, RunFolder
from ..runs.metrics_log import check_tensorboard

log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=RunConfig)


def check_steps(folder: RunFolder, steps: int) -> None:
    """Raises RunConflict when a run has done more steps than it is asked for."""
    done = folder.status()["step"]
    if done > steps:
        raise RunConflict(
            f"steps is {steps}; run {folder.name!r} has done {done}. Ask for as many, or choose resume = restart.",
            setting="steps",
            before=done,
        )


def check_settings(config: RunConfig, device: torch.device) -> None:
    """Raises ValueError for settings that do not go together, or not on a device, whatever the model is.

    To be called before a model is loaded and a data set is read.
    """
    settings = config.settings
    check_tensorboard(settings)
    if config.learning_rate == 0:
        raise ValueError("learning_rate is 0, with which nothing trains; expected one above 0, such as 1e-5.")
    if isinstance(config, EmbeddingConfig):
        expect_file_names(config.tokens)
    if settings.optimizer in PACKAGES:
        library(settings.optimizer)
    world().share(config.batch_size)
    check_fused_backward(config)
    check_master_weights(config)
    check_sharding(config)
    if settings.block_swap and retrains_whole_unet(config):
        raise ValueError(
            f"block_swap is {settings.block_swap} with train = {config.train}; expected 0, since frozen weights alone "
            "stay in RAM. Set it to 0, or train fewer layers."
        )
    _check_compiling(settings)
    if settings.precision == "fp16" and isinstance(config, RewardTuneConfig):
        raise ValueError(
            "precision is 'fp16' for a reward tuning; expected 'bf16' or 'fp32': gradients through decoder, reward and "
            "sampler are too small for fp16."
        )
    check_precision(settings.precision, device)


def check_fit(model: TextToImage, config: RunConfig) -> None:
    """Raises ValueError when model and settings do not fit: widths, precision, loss weighting, channels, optimizer."""
    denoiser, settings = model.denoiser, config.settings
    check_settings(config, denoiser.device)
    check_width(model)
    check_pooled(model)
    check_optimizer(settings, config.learning_rate, denoiser.device)
    check_block_swap(denoiser, settings.block_swap)
    check_speed(denoiser, settings)
    check_objective(settings, denoiser.prediction_type)
    channels = denoiser.input_channels
    if channels != denoiser.latent_channels:
        raise ValueError(
            f"UNet reads {channels} channels; expected {denoiser.latent_channels}. Inpainting and edit models have "
            "inputs that captioned images do not give."
        )


def check_speed(denoiser: Denoiser, settings: TrainingSettings) -> None:
    """Raises ValueError for compile_blocks or channels_last where they do not apply; warns where they are slower."""
    for name in ("compile_blocks", "channels_last"):
        if getattr(settings, name) and not isinstance(denoiser, DiffusersDenoiser):
            raise ValueError(
                f"{name} is on in ComfyUI, whose layers move and cast their weights themselves; expected it on the "
                f"command line. Set {name} off."
            )
    _check_compiling(settings)
    if settings.compile_blocks:
        check_compiler(denoiser.device)
    if settings.channels_last and denoiser.device.type == "cpu":
        log.warning("channels_last is slower on a CPU")


def _check_compiling(settings: TrainingSettings) -> None:
    """Raises ValueError for compile_blocks or channels_last beside another setting that moves or divides weights."""
    for name in ("compile_blocks", "channels_last"):
        if getattr(settings, name) and settings.shard_weights:
            raise ValueError(f"{name} is on with shard_weights; expected one of them. Set one off.")
    if settings.compile_blocks and settings.block_swap:
        raise ValueError(
            f"compile_blocks is on with block_swap {settings.block_swap}; expected 0, since a compiled block's weights "
            "stay where they are."
        )


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError for fp16 without CUDA; warns of bf16 on a card that computes it by other units, slowly."""
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("precision is 'fp16' without a CUDA device; expected 'fp32' or 'bf16' there.")
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        log.warning("precision is 'bf16' on a card without it, which is slow; 'auto' takes fp16 there")


def with_precision(config: Config, device: torch.device, root: Path, say: Callable[[str], None] = log.info) -> Config:
    """The config with precision "auto" replaced by what it is here; any other is left alone.

    A run that goes on keeps the precision that it was begun with, on any device.

    Args:
        config: the run's.
        device: where it computes.
        root: folder of all runs.
        say: called with what "auto" is here, a line for people.
    """
    settings = config.settings
    if settings.precision != "auto":
        return config
    folder = RunFolder(root / config.run_name)
    begun = None if config.resume == "restart" else folder.config()
    if begun is not None and not folder.failed_at_once:
        recorded = begun["identity"].get("settings")  # anything else than settings differs, which `claim` says
        values = FORMER_DEFAULTS | recorded if isinstance(recorded, dict) else FORMER_DEFAULTS
        precision, why = values["precision"], "as the run was begun"
    else:
        scaled = not (isinstance(config, RewardTuneConfig) or settings.fused_backward)
        scaled = scaled and settings.master_weights == "fp32"
        precision, why = default_precision(device, scaled), f"by the device ({device.type})"
    say(f"precision auto is {precision}, {why}")
    return replace(config, settings=replace(settings, precision=precision))


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
