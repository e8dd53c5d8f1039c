"""Command-line flags made from the config dataclasses: `--learning-rate` sets `learning_rate`.

argparse stays, rather than tyro: every ComfyUI user would have to install tyro for a command line that few of them
call. Presets that change defaults, and one verb's flags from five configs, would take as much code with it.
"""

from __future__ import annotations

import argparse
from typing import Any

from .fields import ConfigField, config_fields


def add_flags(parser: argparse.ArgumentParser, config: type, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Adds one flag for each field of a config.

    Args:
        parser: gets the flags as a group of their own.
        config: a dataclass; a field that is a config itself needs a call of its own.
        prefix: stands before each name, with underscores: "sample_" makes `--sample-steps` of `steps`.
        skip: fields that get no flag.
    """
    group = parser.add_argument_group(config.__name__)
    for field in config_fields(config).values():
        if not field.is_config and field.name not in skip:
            name = prefix + field.name
            group.add_argument("--" + name.replace("_", "-"), dest=name, required=field.required, **_options(field))


def _options(field: ConfigField) -> dict[str, Any]:
    """The arguments of argparse's `add_argument` that a field decides."""
    options: dict[str, Any] = {"help": _help(field)}
    if not field.required:
        options["default"] = field.default
    if field.type is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if field.choices:
        return options | {"choices": field.choices}
    return options | {"type": field.type} | ({"nargs": "*"} if field.repeated else {})


def _help(field: ConfigField) -> str:
    """Documentation, default and range; argparse needs percent signs twice."""
    notes = [] if field.required else [f"default: {field.default!r}"]
    notes += [f"range: {field.range}"] if field.range else []
    text = field.documentation + (f" ({', '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def read_flags(arguments: argparse.Namespace, config: type, prefix: str = "", **more: Any) -> Any:
    """The config that parsed flags describe.

    Args:
        arguments: what a parser returned that `add_flags` gave the same config and prefix.
        config: the dataclass to make.
        prefix: as for `add_flags`.
        more: values of fields that have no flag, or that win over their flag.
    """
    values = dict(more)
    for name in config_fields(config):
        if name not in values and hasattr(arguments, prefix + name):
            value = getattr(arguments, prefix + name)
            values[name] = tuple(value) if isinstance(value, list) else value
    return config(**values)
