"""What a verb of the command line is made of, and the flags that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.distributed import local_device
from ..config.flags import add_flags, read_flags
from ..config.model import ModelConfig


@dataclass(frozen=True)
class Verb:
    """One verb: its flags and what it does.

    Attributes:
        help: the verb's line in the list of all verbs.
        add_flags: adds the flags to the verb's parser.
        run: gets the parsed flags and returns what is printed, by name.
        epilog: text below the verb's own help.
        presets: preset -> other defaults of some flags, for the choices of `--preset`.
    """

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Mapping[str, Any]]
    epilog: str | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def config_verb(config: type, function: Callable[[Any], Mapping[str, Any]]) -> Verb:
    """A verb whose flags are one config, and whose help is the config's docstring."""
    text = config.__doc__
    return Verb(
        help=text[0].lower() + text[1:].rstrip("."),
        add_flags=lambda parser: add_flags(parser, config),
        run=lambda arguments: function(read_flags(arguments, config)),
    )


def add_output_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output") / "retune", help="folder of all runs")


def read_model_flags(arguments: argparse.Namespace) -> ModelConfig:
    """The model's flags; where they name no device, with the device that accelerate chooses."""
    config = read_flags(arguments, ModelConfig)
    return config if config.device else replace(config, device=str(local_device()))
