"""The trainings that `benchmarks.lora` compares: API-format prompts for ComfyUI, run and timed from outside.

Both trainers are nodes of one ComfyUI. Seconds per step are the median time between the events of the node's progress
bar as they arrive here, so that set-up, caches and saving do not count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..training.commands.comfyui_server import Server
from ..training.config.checks import check_range
from ..training.recipes.lora import ARTIFACT
from .comfyui_peer import FIXED

PICTURES = "pictures"
"""Sub-folder of ComfyUI's input."""
LAYERS = r"^diffusion_model\."
"""Every layer that holds a matrix or a kernel: ComfyUI's Train LoRA cannot leave any out."""
ALPHA = 1.0
"""ComfyUI's node has no other."""
RETUNE, COMFYUI = "Retune", "ComfyUI"
TIMEOUT = 7200.0
Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LoraBenchConfig:
    """Size of the comparison of LoRA trainers; the defaults run about five minutes on two CPU cores."""

    steps: int = 100
    """Optimiser steps; a quarter and half as many are trained and judged as well."""
    batch_size: int = 1
    """Pictures of a batch."""
    accumulation: int = 2
    """Batches of an optimiser step."""
    learning_rates: tuple[float, ...] = (1e-3, 5e-3)
    """Constant rates; everything is trained with each of them."""
    rank: int = 8
    """Rank of all adapters; their alpha is 1."""
    images: int = 20
    """Training pictures."""
    judged: int = 32
    """Held-out pictures for the validation loss."""
    seeds: int = 1
    """Trainings of each trainer, rate and number of steps."""

    def __post_init__(self) -> None:
        check_range(self, steps=(8, 10**5), batch_size=(1, 10**4), accumulation=(1, 1024), rank=(1, 128))
        check_range(self, images=(1, 10**5), judged=(1, 10**5), seeds=(1, 100))
        if not self.learning_rates or not all(1e-7 <= rate <= 1 for rate in self.learning_rates):
            raise ValueError(f"learning_rates are {self.learning_rates}; expected one at least, of 1e-07 to 1 each.")

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps after which the validation loss is measured."""
        return self.steps // 4, self.steps // 2, self.steps


@dataclass(frozen=True)
class Job:
    """One training that both trainers run."""

    learning_rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the run and of its file."""
        return f"{self.learning_rate:g} {self.steps} steps seed {self.seed}"


def model_prompt() -> Prompt:
    return {"model": {"class_type": "RetuneLoadDemoModel", "inputs": {"text_encoder": "clip"}}}


def retune_prompt(config: LoraBenchConfig, job: Job) -> Prompt:
    """Retune's Train LoRA in API format; the LoRA is saved in its run folder."""
    settings = {
        "optimizer": "AdamW",
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "gradient_accumulation": config.accumulation,
        "precision": "fp32",
        "loss": "mse",
        "loss_weighting": "debiased",
        "caption_dropout": 0.0,
        "gradient_checkpointing": False,
        "save_every": 100_000,
    }
    run = {
        **asdict(job),
        "batch_size": config.batch_size,
        "rank": config.rank,
        "alpha": ALPHA,
        "algorithm": "LoCon",
        "targets": "regex",
        "target_regex": LAYERS,
        "text_encoder_learning_rate": 0.0,
        "run_name": job.name,
        "resume": "restart",
    }
    parts = {name: ["model", i] for i, name in enumerate(("model", "clip", "vae"))}
    return model_prompt() | {
        "data": {"class_type": "RetuneLoadDataset", "inputs": {"folder": PICTURES, "resolution": 128}},
        "settings": {"class_type": "RetuneTrainingSettings", "inputs": settings},
        "train": {
            "class_type": "RetuneTrainLora",
            "inputs": {**parts, "dataset": ["data", 0], "settings": ["settings", 0], **run},
        },
    }


def comfyui_prompt(config: LoraBenchConfig, job: Job) -> Prompt:
    """ComfyUI's Train LoRA in API format, its LoRA saved by stock SaveLoRA, its losses output by PreviewAny."""
    run = {
        **FIXED,
        **asdict(job),
        "batch_size": config.batch_size,
        "rank": config.rank,
        "grad_accumulation_steps": config.accumulation,
        "training_dtype": "fp32",
        "bypass_mode": False,
    }
    cached = {"images": ["data", 0], "texts": ["data", 1], "vae": ["model", 2], "clip": ["model", 1]}
    inputs = {"model": ["model", 0], "latents": ["cached", 0], "positive": ["cached", 1], **run}
    return model_prompt() | {
        "data": {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": PICTURES}},
        "cached": {"class_type": "MakeTrainingDataset", "inputs": cached},
        "train": {"class_type": "TrainLoraNode", "inputs": inputs},
        "save": {"class_type": "SaveLoRA", "inputs": {"lora": ["train", 0], "prefix": f"loras/{job.name}"}},
        "losses": {"class_type": "PreviewAny", "inputs": {"source": ["train", 1]}},
    }


@dataclass(frozen=True)
class Run:
    """The result of one training, measured from outside."""

    file: Path
    """The LoRA."""
    losses: list[float]
    """Loss of every optimiser step."""
    seconds_per_step: float
    """Median."""
    seconds: float
    """From the request to the result."""


def median_step_seconds(marks: Sequence[tuple[float, int]], per_step: int) -> float:
    """Median seconds per optimiser step, from the events of a progress bar.

    ComfyUI drops events that follow too soon after another, so each measured interval covers a whole step at least.

    Args:
        marks: (time, value) of each event.
        per_step: By how much the value rises in one optimiser step.

    Raises:
        ValueError: With less than one whole step between the events.
    """
    intervals, (began, first) = [], marks[0]
    for when, value in marks[1:]:
        if value - first >= per_step:
            intervals.append((when - began) / (value - first) * per_step)
            began, first = when, value
    if not intervals:
        raise ValueError(f"progress is {len(marks)} marks of {per_step} a step; expected two steps at least.")
    return statistics.median(intervals)


def run_timed(running: Server, prompt: Prompt, per_step: int) -> tuple[dict, float, float]:
    """Runs a prompt whose trainer is node "train"; returns its outputs, seconds per step, and seconds in all."""
    marks: list[tuple[float, int]] = []

    def mark(event: dict) -> None:
        if event["type"] == "progress" and event["data"]["node"] == "train":
            marks.append((time.perf_counter(), event["data"]["value"]))

    running.on_event = mark
    began = time.perf_counter()
    outputs = running.run(prompt, TIMEOUT)
    return outputs, median_step_seconds(marks, per_step), time.perf_counter() - began


def train_with_retune(running: Server, config: LoraBenchConfig, job: Job) -> Run:
    """Runs Retune's Train LoRA."""
    _, per_step, seconds = run_timed(running, retune_prompt(config, job), 1)
    folder = running.base_directory / "output" / "retune" / job.name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Run(folder / ARTIFACT, [row["loss"] for row in rows if "event" not in row], per_step, seconds)


def train_with_comfyui(running: Server, config: LoraBenchConfig, job: Job) -> Run:
    """Runs ComfyUI's Train LoRA."""
    outputs, per_step, seconds = run_timed(running, comfyui_prompt(config, job), config.accumulation)
    losses = json.loads(outputs["losses"]["text"][0])["loss"]
    n = config.accumulation
    means = [statistics.fmean(losses[i : i + n]) for i in range(0, len(losses), n)]
    (file,) = (running.base_directory / "output" / "loras").glob(f"{job.name}_*.safetensors")
    return Run(file, means, per_step, seconds)


TRAINERS: dict[str, Callable[[Server, LoraBenchConfig, Job], Run]] = {
    RETUNE: train_with_retune,
    COMFYUI: train_with_comfyui,
}
