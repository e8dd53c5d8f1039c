"""Studies on the demo model: the same training many times over, one thing changed at a time, several seeds each.

Every trial writes its figures to a file of its own, and an unfinished one goes on from its run's state, so a study may
be stopped at any point. Seeds come outermost: a study stopped early has compared everything before it repeats.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..training.commands.demo import assets_fingerprint, held_out_captions, judge_model, write_pictures
from ..training.commands.open_model import apply_weights
from ..training.common.callbacks import Callbacks
from ..training.common.files import read_json, write_json, write_text
from ..training.common.rng import generator
from ..training.config.checks import check_range
from ..training.config.run import TrainModelConfig
from ..training.config.training_settings import TrainingSettings
from ..training.data.examples import Dataset
from ..training.data.folder import FolderConfig, load_folder
from ..training.demo.scenes import ATTRIBUTES, draw, held_out_scenes
from ..training.evaluation.text_gap import evaluate
from ..training.models.protocols import TextToImage
from ..training.objectives.denoising import DenoisingObjective
from ..training.recipes.unet import train_model
from ..training.sampling.generate import encode_with

Labels = dict[str, str | float]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Size of a study. Another size is another study, with results of its own."""

    output: Path = Path("output") / "bench"
    """Folder of all studies."""
    budget: float = 0.0
    """Minutes after which no further trial starts; the same command goes on later. 0 = to the end."""
    steps: int = 0
    """Optimiser steps of a trial; projection-start takes up to twelve times as many. 0: the study's own number."""
    batch_size: int = 0
    """Pictures per step. 0: the study's own number."""
    images: int = 1000
    """Training pictures."""
    judged: int = 0
    """Pictures of held-out captions drawn and judged. 0: the study's own number."""
    seeds: int = 3
    """Trials of everything that is compared."""

    def __post_init__(self) -> None:
        check_range(self, steps=(0, 10**6), batch_size=(0, 10**4), images=(1, 10**6), judged=(0, 10**5))
        check_range(self, seeds=(1, 100), budget=(0, 10**5))

    def folder(self, study: str) -> Path:
        """Where a study of this size, on these weights and drawings, keeps its results."""
        size = f"{self.steps} steps of {self.batch_size}, {self.images} pictures, {self.judged} judged"
        return self.output / f"{study}, {size}, {assets_fingerprint()}"


@dataclass(frozen=True)
class Trial:
    """One training of a study: what is compared, the seed of everything random in it, and where it works."""

    config: StudyConfig
    labels: Labels
    seed: int
    dataset: Dataset
    folder: Path
    callbacks: Callbacks

    @property
    def name(self) -> str:
        """A plain folder name."""
        words = [str(value).replace("/", "-") for value in self.labels.values()]
        return " ".join([*words, f"seed {self.seed}"])

    @property
    def results(self) -> Path:
        """The file of its figures."""
        return self.folder / f"{self.name}.json"

    def train(
        self,
        fresh: Callable[[], TextToImage],
        *,
        steps: int,
        rate: float,
        schedule: str,
        ema_decay: float = 0.0,
        **more,
    ) -> TextToImage:
        """Trains what `fresh` gives, or goes on with it, and returns the result; more: fields of TrainModelConfig."""
        settings = TrainingSettings(lr_schedule=schedule, warmup_steps=20, loss_weighting="none", ema_decay=ema_decay)
        config = TrainModelConfig(
            run_name=self.name,
            steps=steps,
            batch_size=self.config.batch_size,
            learning_rate=rate,
            seed=self.seed,
            settings=settings,
            **more,
        )
        trained = train_model(fresh(), self.dataset, config, self.folder, self.callbacks)
        return apply_weights(fresh(), trained)

    def measure(self, model: TextToImage) -> dict[str, float]:
        """Figures of a model on held-out captions: "alignment", "attributes" (mean share of single attributes read
        right), and of pictures of such captions "loss" and "text gap" (see `evaluate`)."""
        figures, _ = judge_model(model, self.config.judged, self.callbacks.on_text, self.name)
        single = statistics.fmean(figures[name] for name in ATTRIBUTES if name in figures)
        return {
            "alignment": figures["alignment"],
            "attributes": single,
            **held_out_loss(model, min(32, self.config.judged)),
        }


@torch.no_grad()
def held_out_loss(model: TextToImage, count: int) -> dict[str, float]:
    """Unweighted loss over fixed noise, and text gap, on pictures of held-out captions; the same for every model."""
    scenes = held_out_scenes(count, 1)
    images = [draw(scene, generator(1, "study", i)) for i, scene in enumerate(scenes)]
    objective = unweighted_objective(model)
    pairs = [(text, objective.latent_of(image)) for text, image in zip(held_out_captions(count), images, strict=True)]
    return {"loss": objective.validation(pairs), "text gap": evaluate(objective, pairs)["text_gap"]}


def unweighted_objective(model: TextToImage) -> DenoisingObjective:
    """What training minimises, with (3, H, W) images for slots; for measuring, since nothing is cached."""
    encoder = model.text_encoder
    return DenoisingObjective(
        model.denoiser,
        TrainingSettings(),
        0,
        latent_of=lambda image: model.autoencoder.encode(image[None])[0],
        text_of=encode_with(encoder),
        project=encoder.project,
    )


@dataclass(frozen=True)
class Study:
    """Trials to compare. `cells`: labels, each of which every seed goes through. `findings`: rows -> sentences."""

    about: str
    cells: Sequence[Labels]
    figures: Callable[[Trial], Mapping[str, float | None]]
    findings: Callable[[Sequence[Mapping]], list[str]]
    steps: int = 300
    batch_size: int = 16
    judged: int = 100

    def sized(self, config: StudyConfig) -> StudyConfig:
        """The config with the study's own numbers where it leaves them open."""
        own = {name: getattr(config, name) or getattr(self, name) for name in ("steps", "batch_size", "judged")}
        return replace(config, **own)


def run_study(name: str, study: Study, config: StudyConfig, callbacks: Callbacks | None = None) -> dict:
    """Runs, or goes on with, a study; returns its rows, a Markdown table of them, and what they say in words."""
    callbacks, began, config = callbacks or Callbacks(), time.monotonic(), study.sized(config)
    folder, pictures = config.folder(name), config.output / f"{config.images} pictures {assets_fingerprint()}"
    write_pictures(pictures, config.images, 0, callbacks.on_text)
    dataset = load_folder(FolderConfig(folder=pictures, resolution=128))
    seeds = range(config.seeds)
    trials = [Trial(config, labels, seed, dataset, folder, callbacks) for seed in seeds for labels in study.cells]
    waiting = [trial for trial in trials if not trial.results.exists()]
    for trial in waiting:
        if config.budget and time.monotonic() - began > 60 * config.budget:
            break
        callbacks.on_text(f"{name}: {trial.name}")
        write_json(trial.results, {**trial.labels, "seed": trial.seed, **study.figures(trial)})
        shutil.rmtree(folder / trial.name, ignore_errors=True)
    found = [read_json(trial.results) for trial in trials if trial.results.exists()]
    rows = summarize(found, list(study.cells[0]))
    words = study.findings(rows)
    write_text(folder / "README.md", "\n".join([markdown_table(rows), "", *words, ""]))
    counts = {"done": len(found), "trials": len(trials)}
    return {
        "study": name,
        **counts,
        "rows": rows,
        "findings": words,
        "table": markdown_table(rows),
        "folder": str(folder),
    }


def summarize(found: Sequence[Mapping], keys: Sequence[str]) -> list[dict]:
    """Trials with equal labels (`keys`) become a row: n, and the mean of each figure with its standard error.

    The error stands in `<figure>_se`; it is None for a single trial. Trials whose figure is None do not count there.
    """
    cells: dict[tuple, list[Mapping]] = {}
    for figures in found:
        cells.setdefault(tuple(figures[key] for key in keys), []).append(figures)
    rows = []
    for cell, trials in cells.items():
        row: dict = {**dict(zip(keys, cell, strict=True)), "n": len(trials)}
        for figure in (key for key in trials[0] if key not in (*keys, "seed")):
            values = [trial[figure] for trial in trials if trial[figure] is not None]
            row[figure] = statistics.fmean(values) if values else None
            row[f"{figure}_se"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        rows.append(row)
    return rows


def markdown_table(rows: Sequence[Mapping]) -> str:
    """Rows of `summarize` as Markdown, figures that all rows have as `mean ± standard error`."""
    if not rows:
        return "no trial is finished yet"
    names = [key for key in rows[0] if not key.endswith("_se") and all(key in row for row in rows)]
    lines = [names, ["---"] * len(names), *([_cell(row, name) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Mapping, name: str) -> str:
    if f"{name}_se" not in row:
        return f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])
    return "never" if row[name] is None else format_mean(row, name)


def format_mean(row: Mapping, figure: str) -> str:
    """`mean ± standard error` of a row's figure."""
    value, error = row[figure], row[f"{figure}_se"]
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def verdict(better: Mapping, worse: Mapping, figure: str, *, lowest: bool = False) -> str:
    """Whether `better` is, by a figure, better than `worse` by more than two standard errors of the difference.

    lowest: whether low figures are good ones.
    """
    against = f"{format_mean(better, figure)} against {format_mean(worse, figure)}"
    if better[f"{figure}_se"] is None or worse[f"{figure}_se"] is None:
        return f"one trial each cannot tell by {figure} ({against})"
    difference = (worse[figure] - better[figure]) if lowest else (better[figure] - worse[figure])
    error = (better[f"{figure}_se"] ** 2 + worse[f"{figure}_se"] ** 2) ** 0.5
    if abs(difference) <= 2 * error:
        return f"cannot be told by {figure} ({against})"
    return f"{'holds' if difference > 0 else 'does not hold'} by {figure} ({against})"
