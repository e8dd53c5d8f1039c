"""Inputs made from the fields of configs, and groups of inputs that several nodes have."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from comfy_api.latest import io

from ...training.config.fields import ConfigField, config_fields
from ...training.config.run import RunConfig
from ...training.config.sample_prompts import SamplePrompts
from ...training.config.training_settings import TrainingSettings
from . import types

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=RunConfig)
MAX_STEPS, MAX_BATCH, MAX_RATE, MIN_ALPHA, MAX_ALPHA = 10**7, 4096, 1.0, 0.001, 4096.0
"""Ends of widgets, nearer than those of the configs: what lies beyond is a typing error in a node."""


def input_of(config: type, name: str, **changes) -> io.Input:
    """The input that sets a field of a config: type, default, range, step and tooltip are the field's.

    Args:
        config: a config dataclass.
        name: a field of it, and the name of the input.
        changes: arguments of the input that are not the field's: `optional`, or a usual `default` or a lower `max` than
            the command line has.
    """
    field = config_fields(config)[name]
    kind, options = _kind_and_options(field)
    options |= {"id": name, "tooltip": field.documentation + (" One a line." if field.repeated else "")}
    if not field.required:
        options["default"] = "\n".join(field.default) if field.repeated else field.default
    if field.advanced:
        options["advanced"] = True
    return kind.Input(**options | changes)


def inputs_of(config: type, *names: str, **changes) -> list[io.Input]:
    """`input_of` for each of several fields, all with the same changes."""
    return [input_of(config, name, **changes) for name in names]


def _kind_and_options(field: ConfigField) -> tuple[type, dict]:
    """The type of the input that fits a field, and the options that only this type has."""
    if field.choices:
        return io.Combo, {"options": list(field.choices)}
    if field.type is bool:
        return io.Boolean, {}
    if field.type in (str, Path):
        return io.String, {"multiline": True} if field.repeated else {}
    ends = {"min": field.low, "max": field.high, "step": field.step}
    options = {name: field.type(value) for name, value in ends.items() if value is not None}
    if field.type is int:
        return io.Int, options
    return io.Float, options if field.snap else options | {"round": False}


def data_inputs() -> list:
    """The dataset, the VAE that encodes it, and how many steps train on it."""
    return [
        io.Vae.Input("vae", tooltip="Encodes the images."),
        types.Dataset.Input("dataset", tooltip="Captioned images."),
        input_of(RunConfig, "steps", max=MAX_STEPS),
        input_of(RunConfig, "batch_size", max=MAX_BATCH),
    ]


def name_inputs(default: str) -> list:
    """Name and seed of a run."""
    return [
        input_of(RunConfig, "run_name", default=default),
        seed_input("Seed of every random draw of the run.", advanced=True),
    ]


def preset_input(presets: Mapping[str, Mapping], tooltip: str) -> io.Input:
    """The choice of a named group of values; the page fills them in from `values_of`."""
    more = {"values_of": {name: dict(values) for name, values in presets.items()}}
    names = list(presets)
    return io.Combo.Input("preset", options=names, default="custom", optional=True, tooltip=tooltip, extra_dict=more)


def with_preset(preset: str, presets: Mapping[str, Mapping], values: dict) -> dict:
    """Values with those of a preset, which win; a warning names each value that was given and lost."""
    wins = presets[preset]
    lost = [
        f"{name} is {wins[name]}, not {values[name]}" for name in wins if values.get(name, wins[name]) != wins[name]
    ]
    if lost:
        log.warning("preset %r wins: %s. Choose preset 'custom' to keep your values.", preset, "; ".join(lost))
    return values | wins


def seed_input(tooltip: str, **options) -> io.Input:
    """A seed that does not change after a run: a changed seed is a changed run."""
    return io.Int.Input(
        "seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip=tooltip, **options
    )


def run_inputs() -> list:
    """Settings, samples and what happens to a run of the same name."""
    return [
        types.Settings.Input("settings", optional=True, tooltip="From Training Settings; defaults without it."),
        types.Samples.Input("samples", optional=True, tooltip="From Sample Prompts; none without it."),
        input_of(RunConfig, "resume", optional=True),
    ]


def run_config(
    kind: type[Config], settings: TrainingSettings | None, samples: SamplePrompts | None, values: dict
) -> Config:
    """The config of a training node, refused before any model is loaded where it cannot be used on this device.

    Args:
        kind: of the config.
        settings, samples: from their nodes; None for the defaults.
        values: its other fields.
    """
    import comfy.model_management

    from ...training.recipes.checks import check_settings

    given = {"settings": settings or TrainingSettings(), "samples": samples or SamplePrompts()}
    config = kind(**given, **values)
    check_settings(config, comfy.model_management.get_torch_device())
    return config


def made_by(hidden: io.HiddenHolder) -> dict:
    """What config.json stores of the graph that made a run: the prompt, and the workflow where a browser sent it."""
    prompt = hidden.prompt and {name: _without_changes(node) for name, node in hidden.prompt.items()}
    return {"prompt": prompt, "workflow": (hidden.extra_pnginfo or {}).get("workflow")}


def _without_changes(node: dict) -> dict:
    """A node of a prompt without `is_changed`, which ComfyUI adds while it runs: often NaN, which is no JSON."""
    return {key: value for key, value in node.items() if key != "is_changed"}


def run_ui(run_name: str) -> dict:
    """A node's output for the page: the run to show in it, also where a link names the run or a cache answers."""
    return {"retune_run": [run_name]}


def expect_given(**parts) -> None:
    """Raises ValueError that names the first of some inputs (name=value) that is None."""
    for name, part in parts.items():
        if part is None:
            raise ValueError(f"{name} is empty; expected one. Does the checkpoint, or the loader's choice, hold it?")
