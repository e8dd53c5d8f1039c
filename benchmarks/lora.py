"""Retune's LoRA training against ComfyUI's Train LoRA: validation loss by steps and by seconds, on the demo model.

Both train on the same picture files, in turns. Every resulting LoRA is applied to the same model and judged by the same
fixed-noise validation, on held-out pictures.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ..training.commands.comfyui_server import Server, server
from ..training.commands.open_model import build_demo_model, unet_parameters
from ..training.common.callbacks import Callbacks
from ..training.common.files import read_json, write_text
from ..training.data.images import save_png
from ..training.demo.scenes import demo_examples
from ..training.formats.lora import Lora, read_lora
from ..training.formats.lora_difference import delta_weight
from ..training.formats.lora_names import UNET
from ..training.models.protocols import Denoiser
from .lora_runs import COMFYUI, PICTURES, RETUNE, TRAINERS, Job, LoraBenchConfig, Run
from .study import markdown_table, summarize, unweighted_objective, verdict

DESCRIPTION = "Retune's LoRA training and ComfyUI's Train LoRA as nodes of one ComfyUI: loss by steps and by seconds."
LOOK = "warm edges"
WARM_UP = 2
"""Steps of each trainer's first training, which fills caches and is not counted."""
RATE, LOSS, PACE = "learning rate", "validation loss", "seconds per step"
DIFFERENCES = (
    "Biases and norms: ComfyUI trains all of them too, in full and at the same rate; Retune leaves them alone. The "
    "matrices and kernels that get a low-rank pair are the same: all of them.",
    "Alpha: 1 for both; ComfyUI trains it too, one number per layer, in Retune it is fixed.",
    "Start: ComfyUI draws the up matrices, from whatever state torch's global generator is in, and sets the down ones "
    "to 0; Retune draws the down ones, from the seed.",
    "Draws: the same seed stands for different noise in each. ComfyUI draws every batch from all pictures, and noise "
    "levels between the model's discrete ones too; Retune trains in epochs, and draws the model's discrete levels.",
    "Batches of more than one picture: ComfyUI predicts each under every caption of the batch and takes the mean, "
    "which blends captions and costs n * n pictures for n. So the defaults accumulate batches of one instead.",
    "Loss: the squared error of the clean latent in both, which for this model's v-prediction is Retune's "
    "loss_weighting 'debiased'. The validation loss that judges both is that of v, unweighted.",
    "Seconds per step: Retune's include a row of metrics.jsonl and a progress text. Outside of them Retune opens, "
    "checks and saves its run folder, and ComfyUI reads the model again.",
)
"""Where the two trainings could not be made equal."""


def run_lora_bench(config: LoraBenchConfig, comfyui: Path | None, callbacks: Callbacks | None = None) -> dict:
    """Runs the comparison in a ComfyUI that it starts and stops.

    Args:
        comfyui: The ComfyUI checkout.

    Returns:
        The figures of `compare`, with the config, the environment, ComfyUI's version and `DIFFERENCES`.

    Raises:
        ValueError: Without a checkout.
        WorkflowFailed: When a node fails.
    """
    if comfyui is None:
        raise ValueError(
            "comfyui is not given; expected the folder of a ComfyUI, whose Train LoRA is measured. `python run.py "
            "bench lora-loss` finds it, or says how to get it; to `python -m retune.benchmarks` add --comfyui."
        )
    callbacks = callbacks or Callbacks()
    callbacks.on_text("starting ComfyUI")
    with TemporaryDirectory(prefix="retune-bench-", ignore_cleanup_errors=True) as folder:
        base = Path(folder).resolve()
        write_examples(base / "input" / PICTURES, config.images)
        with server(comfyui, base) as running:
            trained = train_all(running, config, callbacks)
            version = json.loads(running.request("/system_stats"))["system"]["comfyui_version"]
        environment = read_json(next((base / "output" / "retune").glob("*/config.json")))["environment"]
        callbacks.on_text("judging")
        judge = validation(config.judged)
        rows = [result_row(name, job, run, judge(run.file)) for (name, job), run in trained.items()]
        sizes = {name: trained_numbers(run.file) for (name, _), run in trained.items()}
    result = compare(rows, judge(None))
    for name, size in sizes.items():
        result["trainers"][name]["trained_numbers"] = size
    return {"config": asdict(config), **environment, "comfyui": version, **result, "differences": list(DIFFERENCES)}


def write_examples(folder: Path, count: int) -> None:
    """Writes training pictures of one style and their captions as files that both trainers read."""
    for index, (image, caption) in enumerate(zip(*demo_examples(count, 0, look=LOOK), strict=True)):
        save_png(image, folder / f"{index:05d}.png")
        write_text(folder / f"{index:05d}.txt", caption)


def train_all(running: Server, config: LoraBenchConfig, callbacks: Callbacks) -> dict[tuple[str, Job], Run]:
    """Runs every job with both trainers, which alternate in who goes first."""
    for train in TRAINERS.values():
        train(running, config, Job(config.learning_rates[0], WARM_UP, config.seeds))
    orders, runs = itertools.cycle([list(TRAINERS), list(TRAINERS)[::-1]]), {}
    for job in jobs(config):
        for name in next(orders):
            callbacks.on_text(f"{name}: {job.name}")
            runs[name, job] = TRAINERS[name](running, config, job)
    return runs


def jobs(config: LoraBenchConfig) -> list[Job]:
    """The trainings of each trainer; the seed is the outermost loop."""
    grid = itertools.product(range(config.seeds), config.learning_rates, config.checkpoints)
    return [Job(rate, steps, seed) for seed, rate, steps in grid]


# Judging the LoRAs


def validation(count: int) -> Callable[[Path | None], float]:
    """A function of a LoRA file, or of None for the plain model: its unweighted loss on `count` held-out pictures.

    The noise is the same in every call.
    """
    model = build_demo_model()
    objective = unweighted_objective(model)
    images, captions = demo_examples(count, 1, look=LOOK)
    pairs = [(text, objective.latent_of(image)) for text, image in zip(captions, images, strict=True)]

    def judge(file: Path | None) -> float:
        if file is None:
            return objective.validation(pairs)
        with lora_applied(model.denoiser, read_lora(file)):
            return objective.validation(pairs)

    return judge


@contextmanager
def lora_applied(denoiser: Denoiser, lora: Lora) -> Iterator[None]:
    """Adds a LoRA to the UNet's weights, biases and norms, and restores them on leaving.

    Raises ValueError for a layer that the UNet does not have.
    """
    parameters, changes = unet_parameters(denoiser), parameter_changes(lora)
    if unknown := changes.keys() - parameters.keys():
        raise ValueError(f"{lora.name} changes {min(unknown)}; expected layers of the demo model's UNet alone.")
    original = {name: parameters[name].detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name] += change.reshape(parameters[name].shape)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in original.items():
                parameters[name].copy_(value)


def parameter_changes(lora: Lora) -> dict[str, Tensor]:
    """Canonical parameter name -> what is added to it."""
    changes = {}
    for layer, module in lora.modules.items():
        name, tensors = layer.removeprefix(UNET), module.tensors
        if tensors.keys() - {"diff_b"}:
            changes[f"{name}.weight"] = tensors["diff"] if "diff" in tensors else delta_weight(module)
        if "diff_b" in tensors:
            changes[f"{name}.bias"] = tensors["diff_b"]
    return changes


def trained_numbers(file: Path) -> int:
    """The count of numbers in a LoRA file, without alphas."""
    modules = read_lora(file).modules.values()
    return sum(value.numel() for module in modules for role, value in module.tensors.items() if role != "alpha")


# Comparing the figures


def result_row(trainer: str, job: Job, run: Run, loss: float) -> dict:
    """The figures of one training, for `summarize`; loss: the validation loss of its LoRA."""
    return {
        RATE: job.learning_rate,
        "steps": job.steps,
        "trainer": trainer,
        "seed": job.seed,
        LOSS: loss,
        "training loss": statistics.fmean(run.losses[-max(1, job.steps // 4) :]),
        PACE: run.seconds_per_step,
        "seconds apart": run.seconds - job.steps * run.seconds_per_step,
    }


def compare(results: Sequence[Mapping], untrained: float) -> dict:
    """The trainers side by side.

    Args:
        results: From `result_row`.
        untrained: The plain model's validation loss.

    Returns:
        "trainers", each with its seconds; "rows" by learning rate, steps and trainer; "at_equal_seconds", both losses
        after the same time; "seconds_ratio", ComfyUI's seconds per step over Retune's; "findings", sentences; "table".
    """
    rows = summarize(results, [RATE, "steps", "trainer"])
    rows = sorted(rows, key=lambda row: (row[RATE], row["steps"], list(TRAINERS).index(row["trainer"])))
    trainers = {name: _seconds(results, name) for name in TRAINERS}
    rates = dict.fromkeys(row[RATE] for row in rows)
    equal = [row for rate in rates for row in _at_equal_seconds(rows, trainers, rate, untrained)]
    ratio = statistics.median(_ratios(results))
    return {
        "untrained": untrained,
        "trainers": trainers,
        "seconds_ratio": ratio,
        "rows": rows,
        "at_equal_seconds": equal,
        "findings": findings(rows, trainers, ratio, equal),
        "table": markdown_table(rows),
    }


def _seconds(results: Sequence[Mapping], name: str) -> dict[str, float]:
    rows = [row for row in results if row["trainer"] == name]
    figures = {"seconds_per_step": PACE, "seconds_apart": "seconds apart"}
    return {key: statistics.median(row[figure] for row in rows) for key, figure in figures.items()}


def _ratios(results: Sequence[Mapping]) -> list[float]:
    """ComfyUI's seconds per step over Retune's, of the trainings that took turns."""
    seconds = {(row["trainer"], row[RATE], row["steps"], row["seed"]): row[PACE] for row in results}
    return [seconds[(COMFYUI, *job)] / value for (name, *job), value in seconds.items() if name == RETUNE]


def _at_equal_seconds(
    rows: Sequence[Mapping], trainers: Mapping[str, Mapping], rate: float, untrained: float
) -> list[dict]:
    """Both losses at each time when either trainer reaches a checkpoint and both still train; linear in between."""
    curves = {name: [(0.0, untrained)] for name in TRAINERS}
    for row in rows:
        if row[RATE] == rate:
            seconds = row["steps"] * trainers[row["trainer"]]["seconds_per_step"]
            curves[row["trainer"]].append((seconds, row[LOSS]))
    end = min(curve[-1][0] for curve in curves.values())
    times = sorted({time for curve in curves.values() for time, _ in curve[1:] if time <= end})
    losses = [{name: interpolate(curve, time) for name, curve in curves.items()} for time in times]
    return [{RATE: rate, "seconds": time, **both} for time, both in zip(times, losses, strict=True)]


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """y at x on the straight lines between (x, y) points; ValueError after the last point."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise ValueError(f"x is {x}; expected at most {curve[-1][0]}, where the curve ends.")


def findings(
    rows: Sequence[Mapping], trainers: Mapping[str, Mapping], ratio: float, equal: Sequence[Mapping]
) -> list[str]:
    """The figures in sentences; parameters: as `compare` returns them."""
    here, there = (trainers[name]["seconds_per_step"] for name in (RETUNE, COMFYUI))
    sentences = [
        f"Seconds per step: {here:.3f} here, {there:.3f} in ComfyUI; side by side {ratio:.2f} times as many there."
    ]
    for retune, comfyui in zip(rows[::2], rows[1::2], strict=True):
        losses = f"{retune[LOSS]:.4f} here, {comfyui[LOSS]:.4f} in ComfyUI"
        lower = f"; that it is lower here {verdict(retune, comfyui, LOSS, lowest=True)}" if retune["n"] > 1 else ""
        sentences.append(f"Rate {retune[RATE]:g}, {retune['steps']} steps: {losses}{lower}.")
    for row in equal:
        losses = f"{row[RETUNE]:.4f} here, {row[COMFYUI]:.4f} in ComfyUI"
        sentences.append(f"Rate {row[RATE]:g}, {row['seconds']:.0f} s: {losses}.")
    return sentences
