"""The verb `reset`: attention layers of a UNet re-initialised, as a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config.flags import add_flags, read_flags
from ..config.reset import ResetConfig
from ..models.layers import reset_weights
from .open_model import open_unet, save_unet
from .verb import Verb


def run_reset(arguments: argparse.Namespace) -> dict:
    weights = open_unet(arguments.model)
    new, report = reset_weights(weights, read_flags(arguments, ResetConfig))
    sys.stderr.write(f"{report}\n")
    save_unet(arguments.output, weights | new)
    return {"file": str(arguments.output), "tensors": len(new)}


def add_reset_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="diffusers folder, .safetensors checkpoint, or 'demo'")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    add_flags(parser, ResetConfig)


VERBS = {"reset": Verb("re-initialise attention layers and write the UNet", add_reset_flags, run_reset)}
