"""The demo as a workflow in a ComfyUI without a browser, judged by the same code."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ..common.callbacks import Callbacks
from .comfyui_server import PACKAGE, server
from .demo import DemoConfig, judge_run, set_outdated_run_aside

WORKFLOW = PACKAGE / "tests" / "workflows" / "swap_text_encoder.json"
TIMEOUT = 3600


def demo_prompt(config: DemoConfig) -> dict:
    """The example workflow in API format, at the demo's size; ValueError for a start that the workflow lacks."""
    if config.start != "fit":
        raise ValueError(f"start is {config.start!r}; the example workflow has 'fit'. Use --no-comfyui for others.")
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    run = config.training()
    prompt["5"]["inputs"] |= {"count": config.images, "seed": config.seed}
    prompt["7"]["inputs"] |= {"every": run.samples.every}
    names = ("run_name", "steps", "batch_size", "learning_rate", "train", "train_projection", "seed", "resume")
    prompt["8"]["inputs"] |= {name: getattr(run, name) for name in names}
    return prompt


def run_demo_in_comfyui(config: DemoConfig, comfyui: Path, callbacks: Callbacks) -> dict:
    """Runs the workflow in a ComfyUI that it starts and stops, then judges its run.

    Args:
        comfyui: The ComfyUI checkout.

    Returns:
        The figures of `judge_run`.

    Raises:
        ValueError: For a start that the workflow lacks.
        WorkflowFailed: When a node fails.
    """
    began = time.monotonic()
    base = config.output.resolve()
    runs = base / "output" / "retune"
    set_outdated_run_aside(runs, config.run_name)
    callbacks.on_text("starting ComfyUI")

    def show(event: dict) -> None:
        if event["type"] == "progress_text":
            callbacks.on_text(event["data"]["text"])

    with server(comfyui, base) as running:
        running.on_event = show
        running.run(demo_prompt(config), TIMEOUT)
    return judge_run(runs / config.run_name, config, callbacks, began)
