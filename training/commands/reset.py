"""The verb `reset`: attention layers of a UNet re-initialised, as a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config.fields import config_fields
from ..config.flags import add_flags, read_flags
from ..config.model import ModelConfig
from ..config.reset import ResetConfig
from ..models.layers import reset_weights
from ..models.prediction import Correction, describe
from .open_model import open_denoiser, save_unet, unet_parameters
from .verb import Verb


def run_reset(arguments: argparse.Namespace) -> dict:
    denoiser = open_denoiser(arguments.model, Correction(arguments.prediction, arguments.noise_levels))
    weights = unet_parameters(denoiser)
    new, report = reset_weights(weights, read_flags(arguments, ResetConfig))
    predicts = describe(denoiser.prediction_type, denoiser.sigmas)
    sys.stderr.write(f"{report}\nmodel: {predicts} (by {denoiser.source})\n")
    save_unet(arguments.output, weights | new, denoiser)
    return {"file": str(arguments.output), "tensors": len(new)}


def add_reset_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="diffusers folder, .safetensors checkpoint, or 'demo'")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    add_flags(parser, ResetConfig)
    kept = ("prediction", "noise_levels")
    add_flags(parser, ModelConfig, skip=tuple(name for name in config_fields(ModelConfig) if name not in kept))


VERBS = {"reset": Verb("re-initialise attention layers and write the UNet", add_reset_flags, run_reset)}
