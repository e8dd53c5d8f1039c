"""Studies on the demo model: the same training many times over, one thing changed at a time, several seeds each.

Every trial writes its results to its own file, and an unfinished one resumes from its run's state, so a study may be
stopped at any point. The seed is the outermost loop: a study that is stopped early has one trial of every cell before
it has two of any.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
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
LOWER_IS_BETTER = ("loss",)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Size of a study; each size keeps its results in its own folder."""

    output: Path = Path("output") / "bench"
    """Folder of all studies."""
    budget: float = 0.0
    """Minutes after which no further trial starts; the same command resumes later. 0 = to the end."""
    steps: int = 0
    """Optimiser steps of a trial; projection-start runs up to twelve times as many. 0: the study's default."""
    batch_size: int = 0
    """Pictures per step. 0: the study's default."""
    images: int = 1000
    """Training pictures."""
    judged: int = 0
    """Pictures of held-out captions drawn and judged. 0: the study's default."""
    seeds: int = 3
    """Trials of everything that is compared."""

    def __post_init__(self) -> None:
        check_range(self, steps=(0, 10**6), batch_size=(0, 10**4), images=(1, 10**6), judged=(0, 10**5))
        check_range(self, seeds=(1, 100), budget=(0, 10**5))

    def folder(self, study: str) -> Path:
        """Results of a study of this size, on these demo weights and drawings."""
        size = f"{self.steps} steps of {self.batch_size}, {self.images} pictures, {self.judged} judged"
        return self.output / f"{study}, {size}, {assets_fingerprint()}"


@dataclass(frozen=True)
class Trial:
    """One training of a study.

    Attributes:
        labels: The cell of the study, such as {"reset": "QK", "learning rate": 2e-4}.
        seed: Of every random draw.
        folder: The study's folder, which holds the trial's run and its results.
    """

    config: StudyConfig
    labels: Labels
    seed: int
    dataset: Dataset
    folder: Path
    callbacks: Callbacks

    @property
    def name(self) -> str:
        """A folder name: the labels and the seed."""
        parts = [str(value).replace("/", "-") for value in self.labels.values()]
        return " ".join([*parts, f"seed {self.seed}"])

    @property
    def results(self) -> Path:
        """The file of the trial's figures."""
        return self.folder / f"{self.name}.json"

    def train(
        self,
        make_model: Callable[[], TextToImage],
        *,
        steps: int,
        rate: float,
        schedule: str,
        ema_decay: float = 0.0,
        **options,
    ) -> TextToImage:
        """Trains the model of `make_model`, or resumes its training, up to `steps`.

        Args:
            make_model: Builds the untrained model, the same at every call.
            rate: Learning rate.
            schedule: Learning-rate schedule, such as "cosine".
            ema_decay: Of the average of the weights; 0 for none.
            options: Further fields of TrainModelConfig.

        Returns:
            A new model with the trained weights.
        """
        settings = TrainingSettings(lr_schedule=schedule, warmup_steps=20, loss_weighting="none", ema_decay=ema_decay)
        config = TrainModelConfig(
            run_name=self.name,
            steps=steps,
            batch_size=self.config.batch_size,
            learning_rate=rate,
            seed=self.seed,
            settings=settings,
            **options,
        )
        trained = train_model(make_model(), self.dataset, config, self.folder, self.callbacks)
        return apply_weights(make_model(), trained)

    def measure(self, model: TextToImage) -> dict[str, float]:
        """Measures a model on held-out captions.

        Returns:
            "alignment"; "attributes", the mean share of single attributes that the judge reads correctly; "loss" and
            "text gap" (see `evaluate`) on drawn pictures of such captions.
        """
        figures, _ = judge_model(model, self.config.judged, self.callbacks.on_text, self.name)
        single = statistics.fmean(figures[name] for name in ATTRIBUTES if name in figures)
        return {
            "alignment": figures["alignment"],
            "attributes": single,
            **held_out_loss(model, min(32, self.config.judged)),
        }


@torch.no_grad()
def held_out_loss(model: TextToImage, count: int) -> dict[str, float]:
    """Unweighted loss on fixed noise, and text gap, on pictures of held-out captions; the same for every model."""
    scenes = held_out_scenes(count, 1)
    images = [draw(scene, generator(1, "study", i)) for i, scene in enumerate(scenes)]
    objective = unweighted_objective(model)
    pairs = [(text, objective.latent_of(image)) for text, image in zip(held_out_captions(count), images, strict=True)]
    return {"loss": objective.validation(pairs), "text gap": evaluate(objective, pairs)["text_gap"]}


def unweighted_objective(model: TextToImage) -> DenoisingObjective:
    """The denoising loss without weighting, of (3, H, W) images; for measuring, since it caches nothing."""
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
    """Trials to compare.

    Attributes:
        description: A sentence for the list of benchmarks.
        cells: The labels of every setting; each runs once a seed.
        run_trial: Trains and measures one trial; returns its figures, None where there is no value.
        findings: Rows of `summarize` -> sentences.
        steps, batch_size, judged: Used where the StudyConfig has 0.
    """

    description: str
    cells: Sequence[Labels]
    run_trial: Callable[[Trial], Mapping[str, float | None]]
    findings: Callable[[Sequence[Mapping]], list[str]]
    steps: int = 300
    batch_size: int = 16
    judged: int = 100

    def sized(self, config: StudyConfig) -> StudyConfig:
        """The config with the study's defaults in place of 0."""
        sizes = {name: getattr(config, name) or getattr(self, name) for name in ("steps", "batch_size", "judged")}
        return replace(config, **sizes)


def run_study(name: str, study: Study, config: StudyConfig, callbacks: Callbacks | None = None) -> dict:
    """Runs the trials of a study that have no results yet, until the budget is spent.

    Args:
        name: Of the study; the start of its folder's name.
        config: Size of the study; 0 stands for the study's default.

    Returns:
        {"study", "done", "trials", "rows", "findings", "table", "folder"} over all finished trials; README.md in the
        folder holds the table and the findings too.
    """
    callbacks, began, config = callbacks or Callbacks(), time.monotonic(), study.sized(config)
    folder = config.folder(name)
    dataset = training_pictures(config, callbacks)
    seeds = range(config.seeds)
    trials = [Trial(config, labels, seed, dataset, folder, callbacks) for seed in seeds for labels in study.cells]
    for trial in [trial for trial in trials if not trial.results.exists()]:
        if config.budget and time.monotonic() - began > 60 * config.budget:
            break
        callbacks.on_text(f"{name}: {trial.name}")
        write_json(trial.results, {**trial.labels, "seed": trial.seed, **study.run_trial(trial)})
        shutil.rmtree(folder / trial.name, ignore_errors=True)
    results = [read_json(trial.results) for trial in trials if trial.results.exists()]
    rows = summarize(results, list(study.cells[0]))
    findings, table = study.findings(rows), markdown_table(rows)
    write_text(folder / "README.md", "\n".join([table, "", *findings, ""]))
    counts = {"done": len(results), "trials": len(trials)}
    return {"study": name, **counts, "rows": rows, "findings": findings, "table": table, "folder": str(folder)}


def training_pictures(config: StudyConfig, callbacks: Callbacks) -> Dataset:
    """The drawn pictures that every trial trains on, as files beside the studies' folders."""
    folder = config.output / f"{config.images} pictures {assets_fingerprint()}"
    write_pictures(folder, config.images, 0, callbacks.on_text)
    return load_folder(FolderConfig(folder=folder, resolution=128))


def summarize(results: Sequence[Mapping], keys: Sequence[str]) -> list[dict]:
    """One row for every group of trials with equal labels: the mean of each figure and its standard error.

    Args:
        results: Labels, "seed" and figures of each trial. A figure of None does not count.
        keys: The names of the labels.

    Returns:
        Rows of the labels, "n", each figure's mean, and its standard error as "<figure>_se": None for a single value.
    """
    cells: dict[tuple, list[Mapping]] = {}
    for figures in results:
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
    """A Markdown table of the columns that all rows have; a figure with an error as `mean ± standard error`."""
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


@dataclass(frozen=True)
class Claim:
    """A statement to test: the cell `better` has better figures than the cell `worse`."""

    text: str
    better: Hashable
    worse: Hashable
    figures: tuple[str, ...]


def check_claims(claims: Sequence[Claim], rows: Mapping[Hashable, Mapping]) -> list[str]:
    """A sentence with a verdict by each figure, for every claim whose two cells are measured; rows: by cell."""
    sentences = []
    for claim in claims:
        if claim.better in rows and claim.worse in rows:
            pair = rows[claim.better], rows[claim.worse]
            verdicts = [verdict(*pair, figure, lowest=figure in LOWER_IS_BETTER) for figure in claim.figures]
            sentences.append(f"{claim.text}: {'; '.join(verdicts)}.")
    return sentences


def verdict(better: Mapping, worse: Mapping, figure: str, *, lowest: bool = False) -> str:
    """Whether `better` has the better figure by more than two standard errors of the difference.

    Args:
        better, worse: Rows of `summarize`.
        lowest: A lower figure is the better one.
    """
    against = f"{format_mean(better, figure)} against {format_mean(worse, figure)}"
    if better[f"{figure}_se"] is None or worse[f"{figure}_se"] is None:
        return f"one trial each cannot tell by {figure} ({against})"
    difference = (worse[figure] - better[figure]) if lowest else (better[figure] - worse[figure])
    error = (better[f"{figure}_se"] ** 2 + worse[f"{figure}_se"] ** 2) ** 0.5
    if abs(difference) <= 2 * error:
        return f"cannot be told by {figure} ({against})"
    return f"{'holds' if difference > 0 else 'does not hold'} by {figure} ({against})"
