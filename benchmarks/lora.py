"""Training a LoRA here against ComfyUI's own Train LoRA: validation loss by steps and by seconds, on the demo model.

Both train on the same picture files, in turns. Every resulting LoRA is put on the same model and judged by the same
fixed-noise validation, on pictures that neither saw.
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
from ..training.commands.open_model import ModelConfig, build_model, unet_parameters
from ..training.common.callbacks import Callbacks
from ..training.common.files import read_json, write_text
from ..training.data.images import save_png
from ..training.demo.scenes import demo_examples
from ..training.formats.lora import Lora, read_lora
from ..training.formats.lora_difference import difference
from ..training.formats.lora_names import UNET
from ..training.models.protocols import Denoiser
from .lora_runs import COMFYUI, PICTURES, RETUNE, TRAINERS, Job, LoraBenchConfig, Run
from .study import markdown_table, summarize, unweighted_objective, verdict

ABOUT = "Training a LoRA here and by ComfyUI's own Train LoRA, as nodes of one ComfyUI: loss by steps and by seconds."
LOOK = "warm edges"
WARM_UP = 2
"""Steps of a first training by each, which fills caches and does not count."""
RATE, LOSS, PACE = "learning rate", "validation loss", "seconds per step"
DIFFERENCES = (
    "Biases and norms: ComfyUI trains all of them too, in full and at the same rate; Retune leaves them alone. The "
    "matrices and kernels that get a low-rank pair are the same: all there are.",
    "Alpha: 1 for both; ComfyUI trains it along, one number per layer, in Retune it is fixed.",
    "Start: ComfyUI draws the up matrices, from whatever state torch's global generator is in, and sets the down ones "
    "to 0; Retune draws the down ones, from the seed.",
    "Draws: the same seed names other noise in each. ComfyUI draws every batch from all pictures, and noise levels "
    "between the model's own too; Retune goes through the pictures in epochs, and draws the model's own levels.",
    "Batches of more than one picture: ComfyUI predicts each under every caption of the batch and takes the mean, "
    "which blends captions and costs n * n pictures for n. So the defaults sum up batches of one instead.",
    "Loss: the squared error of the clean latent in both, which for this model's v-prediction is Retune's "
    "loss_weighting 'debiased'. The validation loss that judges both is that of v, unweighted.",
    "Seconds per step: Retune's hold a row of metrics.jsonl and a progress text too. Apart from the steps Retune "
    "claims, checks and saves its run folder, and ComfyUI reads the model again.",
)
"""What could not be made equal."""


def run_lora_bench(config: LoraBenchConfig, comfyui: Path | None, callbacks: Callbacks | None = None) -> dict:
    """Runs the comparison; returns its figures, what they say, what was not equal, and a Markdown table.

    comfyui: its checkout. Raises ValueError without one, and WorkflowFailed when a node fails.
    """
    if comfyui is None:
        raise ValueError(
            "comfyui is not given; expected the folder of a ComfyUI, whose Train LoRA is measured. `python run.py "
            "bench lora` finds it, or says how to get it; to `python -m retune.benchmarks lora` add --comfyui."
        )
    callbacks = callbacks or Callbacks()
    callbacks.on_text("starting ComfyUI")
    with TemporaryDirectory(prefix="retune-bench-", ignore_cleanup_errors=True) as folder:
        base = Path(folder).resolve()
        write_examples(base / "input" / PICTURES, config.images)
        with server(comfyui, base) as running:
            trained = train_all(running, config, callbacks)
            version = json.loads(running.request("/system_stats"))["system"]["comfyui_version"]
        about = read_json(next((base / "output" / "retune").glob("*/config.json")))["environment"]
        callbacks.on_text("judging")
        judge = validation(config.judged)
        rows = [result_row(name, job, run, judge(run.file)) for (name, job), run in trained.items()]
        sizes = {name: trained_numbers(run.file) for (name, _), run in trained.items()}
    found = compare(rows, judge(None))
    for name, size in sizes.items():
        found["trainers"][name]["trained_numbers"] = size
    return {"config": asdict(config), **about, "comfyui": version, **found, "differences": list(DIFFERENCES)}


def write_examples(folder: Path, count: int) -> None:
    """Training pictures of one style and their captions, as files that both trainers read."""
    for index, (image, caption) in enumerate(zip(*demo_examples(count, 0, look=LOOK), strict=True)):
        save_png(image, folder / f"{index:05d}.png")
        write_text(folder / f"{index:05d}.txt", caption)


def train_all(running: Server, config: LoraBenchConfig, callbacks: Callbacks) -> dict[tuple[str, Job], Run]:
    """Every training. The trainers take turns, and in beginning too."""
    for train in TRAINERS.values():
        train(running, config, Job(config.learning_rates[0], WARM_UP, config.seeds))
    turns, found = itertools.cycle([list(TRAINERS), list(TRAINERS)[::-1]]), {}
    for job in jobs(config):
        for name in next(turns):
            callbacks.on_text(f"{name}: {job.name}")
            found[name, job] = TRAINERS[name](running, config, job)
    return found


def jobs(config: LoraBenchConfig) -> list[Job]:
    """What each trainer trains; seeds come outermost."""
    kinds = itertools.product(range(config.seeds), config.learning_rates, config.checkpoints)
    return [Job(rate, steps, seed) for seed, rate, steps in kinds]


# What the LoRAs are worth


def validation(count: int) -> Callable[[Path | None], float]:
    """A LoRA file, or None for the bare model -> unweighted loss at fixed noise on pictures that no training shows."""
    model = build_model(ModelConfig(model="demo"))
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
    """The UNet of this process with a LoRA in its weights, biases and norms; raises ValueError for an unknown layer."""
    parameters, changes = unet_parameters(denoiser), parameter_changes(lora)
    if unknown := changes.keys() - parameters.keys():
        raise ValueError(f"{lora.name} changes {min(unknown)}; expected layers of the demo model's UNet alone.")
    kept = {name: parameters[name].detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name] += change.reshape(parameters[name].shape)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def parameter_changes(lora: Lora) -> dict[str, Tensor]:
    """Canonical parameter name -> what is added to it."""
    found = {}
    for layer, module in lora.modules.items():
        name, tensors = layer.removeprefix(UNET), module.tensors
        if tensors.keys() - {"diff_b"}:
            found[f"{name}.weight"] = tensors["diff"] if "diff" in tensors else difference(module)
        if "diff_b" in tensors:
            found[f"{name}.bias"] = tensors["diff_b"]
    return found


def trained_numbers(file: Path) -> int:
    """How many numbers a LoRA file holds, alphas aside."""
    modules = read_lora(file).modules.values()
    return sum(value.numel() for module in modules for role, value in module.tensors.items() if role != "alpha")


# What the figures say


def result_row(trainer: str, job: Job, run: Run, loss: float) -> dict:
    """Figures of one training, for `summarize`. loss: what the validation says."""
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


def compare(found: Sequence[Mapping], untrained: float) -> dict:
    """Each trainer's seconds, rows per (learning rate, steps, trainer), losses at equal seconds, and sentences.

    found: from `result_row`. untrained: the bare model's validation loss.
    """
    rows = summarize(found, [RATE, "steps", "trainer"])
    rows = sorted(rows, key=lambda row: (row[RATE], row["steps"], list(TRAINERS).index(row["trainer"])))
    trainers = {name: _seconds(found, name) for name in TRAINERS}
    equal = [
        row for rate in dict.fromkeys(row[RATE] for row in rows) for row in _equal(rows, trainers, rate, untrained)
    ]
    ratio = statistics.median(_ratios(found))
    return {
        "untrained": untrained,
        "trainers": trainers,
        "seconds_ratio": ratio,
        "rows": rows,
        "at_equal_seconds": equal,
        "findings": findings(rows, trainers, ratio, equal),
        "table": markdown_table(rows),
    }


def _seconds(found: Sequence[Mapping], name: str) -> dict[str, float]:
    mine = [row for row in found if row["trainer"] == name]
    figures = {"seconds_per_step": PACE, "seconds_apart": "seconds apart"}
    return {key: statistics.median(row[figure] for row in mine) for key, figure in figures.items()}


def _ratios(found: Sequence[Mapping]) -> list[float]:
    """ComfyUI's seconds per step over Retune's, of the trainings that took turns."""
    pace = {(row["trainer"], row[RATE], row["steps"], row["seed"]): row[PACE] for row in found}
    return [pace[(COMFYUI, *job)] / seconds for (name, *job), seconds in pace.items() if name == RETUNE]


def _equal(rows: Sequence[Mapping], trainers: Mapping[str, Mapping], rate: float, untrained: float) -> list[dict]:
    """Losses when either trainer comes to a checkpoint, as long as both train; in between a line is drawn."""
    curves = {name: [(0.0, untrained)] for name in TRAINERS}
    for row in rows:
        if row[RATE] == rate:
            seconds = row["steps"] * trainers[row["trainer"]]["seconds_per_step"]
            curves[row["trainer"]].append((seconds, row[LOSS]))
    end = min(curve[-1][0] for curve in curves.values())
    seconds = sorted({when for curve in curves.values() for when, _ in curve[1:] if when <= end})
    heights = [{name: interpolate(curve, when) for name, curve in curves.items()} for when in seconds]
    return [{RATE: rate, "seconds": when, **losses} for when, losses in zip(seconds, heights, strict=True)]


def interpolate(curve: Sequence[tuple[float, float]], place: float) -> float:
    """Height of a curve of (place, height) points, a line between two of them, at a place within it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    raise ValueError(f"place is {place}; expected at most {curve[-1][0]}, where the curve ends.")


def findings(
    rows: Sequence[Mapping], trainers: Mapping[str, Mapping], ratio: float, equal: Sequence[Mapping]
) -> list[str]:
    """The figures in sentences."""
    here, there = (trainers[name]["seconds_per_step"] for name in (RETUNE, COMFYUI))
    words = [
        f"Seconds per step: {here:.3f} here, {there:.3f} in ComfyUI; side by side {ratio:.2f} times as many there."
    ]
    for own, other in zip(rows[::2], rows[1::2], strict=True):
        what = f"Rate {own[RATE]:g}, {own['steps']} steps: {own[LOSS]:.4f} here, {other[LOSS]:.4f} in ComfyUI"
        told = f"; that it is lower here {verdict(own, other, LOSS, lowest=True)}" if own["n"] > 1 else ""
        words.append(f"{what}{told}.")
    for row in equal:
        what = f"Rate {row[RATE]:g}, {row['seconds']:.0f} s"
        words.append(f"{what}: {row[RETUNE]:.4f} here, {row[COMFYUI]:.4f} in ComfyUI.")
    return words
