"""Inputs that every training node has alike."""

from comfy_api.latest import io

from . import types


def data_inputs() -> list:
    """What encodes and shows the images, and for how long."""
    return [
        io.Vae.Input("vae", tooltip="Encodes the images."),
        types.Dataset.Input("dataset", tooltip="Captioned images."),
        io.Int.Input("steps", default=STEPS, min=1, max=10**7, tooltip="Optimiser steps in all."),
        io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Images per batch."),
    ]


STEPS = 500
"""What training nodes start with."""


def rate_input(name: str, default: float, tooltip: str, **more) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=1e-7, round=False, tooltip=tooltip, **more)


def rank_input(name: str, default: int, tooltip: str, low: int = 1, **more) -> io.Input:
    return io.Int.Input(name, default=default, min=low, max=4096, tooltip=tooltip, **more)


def alpha_input(name: str, default: float, tooltip: str, low: float = 0.001, **more) -> io.Input:
    """Scale of adapters."""
    return io.Float.Input(name, default=default, min=low, max=4096.0, step=0.5, round=False, tooltip=tooltip, **more)


def name_inputs(default: str) -> list:
    """Name and seed of a run."""
    return [
        io.String.Input("run_name", default=default, tooltip="Folder of the run in output/retune."),
        seed_input("Names every random draw of the run."),
    ]


def seed_input(tooltip: str) -> io.Input:
    """A seed that stays as it is after a run: a changed seed is a changed run."""
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip=tooltip)


def run_inputs() -> list:
    """Settings, samples and what happens to a run of the same name."""
    return [
        types.Settings.Input("settings", optional=True, tooltip="From Training Settings; defaults without it."),
        types.Samples.Input("samples", optional=True, tooltip="From Sample Prompts; none without it."),
        io.Combo.Input(
            "resume",
            options=["auto", "restart"],
            default="auto",
            optional=True,
            tooltip="auto: go on with the run of this name if its settings are equal; restart: move the old "
            "folder aside. Steps, samples, validate_every, save_every, early_stop_after, result, tensorboard and "
            "gradient_checkpointing may change.",
        ),
    ]


def made_by(hidden: io.HiddenHolder) -> dict:
    """What config.json keeps of the graph that made a run: the prompt, and the workflow where a browser sent it."""
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
