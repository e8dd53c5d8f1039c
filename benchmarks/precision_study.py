"""bf16 against fp32 on the demo model: a T5 swap, a LoRA and a word, each trained in both from one seed.

The results are judged in fp32, by pictures of the same captions from the same noise, so that they differ by the
training alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..training.commands.demo import DRAW_OPTIONS, FITTED, DemoConfig, judge_model
from ..training.commands.open_model import DEMO, apply_weights, build_demo_model, build_model, with_t5
from ..training.commands.train import holding
from ..training.config.lora import LoraConfig
from ..training.config.model import ModelConfig
from ..training.config.run import RunConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import TrainingSettings
from ..training.data.dataset import from_images
from ..training.demo.judge import ALIGNMENT, drawn_shape
from ..training.demo.scenes import demo_examples
from ..training.models.protocols import TextToImage
from ..training.recipes.apply_results import with_tuned
from ..training.recipes.lora import train_lora
from ..training.recipes.textual_inversion import train_embedding
from ..training.recipes.unet import train_model
from ..training.sampling.generate import draw
from .study import Study, Trial, format_mean
from .word_study import PICTURES, captions_with, rest_is_right, with_word, word_config

FIGURE, STYLE = "heart", {"look": "warm edges"}
FP32, BF16 = "fp32", "bf16"
MOST = 0.02
"""By how much alignment may be lower in bf16."""


def lora_config(name: str, steps: int = 200, batch_size: int = 16, seed: int = 0) -> LoraConfig:
    """How a demo LoRA is trained: as the example workflow "Train a style LoRA" does."""
    return LoraConfig(
        run_name=name,
        algorithm="LoCon",
        targets="all",
        rank=8,
        alpha=8.0,
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        seed=seed,
        settings=TrainingSettings(warmup_steps=10, loss_weighting="none"),
    )


def _sizes(trial: Trial) -> dict[str, int]:
    return {"steps": trial.config.steps, "batch_size": trial.config.batch_size, "seed": trial.seed}


def _prepared(config: RunConfig, trial: Trial) -> tuple[RunConfig, TextToImage]:
    """The config in the trial's precision, and the demo model as the command line holds it for such a run."""
    settings = replace(config.settings, precision=trial.labels["precision"])
    config = replace(config, settings=settings, samples=SamplePrompts())
    return config, build_model(ModelConfig(model=DEMO), **holding(config))


def swap_t5(trial: Trial) -> float:
    """Alignment of a T5 in place of the CLIP, as the demo trains it."""
    config, model = _prepared(DemoConfig(run_name=trial.name, **_sizes(trial)).training(), trial)
    about = ModelConfig(model=DEMO, t5=DEMO, fit_method="mean-covariance")
    model = with_t5(model, about, trial.dataset.captions[:FITTED])
    trained = train_model(model, trial.dataset, config, trial.folder, trial.callbacks)
    return aligned(apply_weights(build_demo_model(t5=DEMO), trained), trial)


def style_lora(trial: Trial) -> float:
    """Alignment under a LoRA of a style in twenty pictures."""
    config, model = _prepared(lora_config(trial.name, **_sizes(trial)), trial)
    images, captions = demo_examples(20, 0, **STYLE)
    trained = train_lora(model, from_images(list(images), captions), config, trial.folder, trial.callbacks)
    return aligned(with_tuned(build_demo_model(), [str(trained.path)]), trial)


def aligned(model: TextToImage, trial: Trial) -> float:
    """The share of held-out captions that are drawn right."""
    return judge_model(model, trial.config.judged, trial.callbacks.on_text, trial.name)[0][ALIGNMENT]


def word(trial: Trial) -> float:
    """The share of pictures of a learned word that show its figure and all the rest of the prompt."""
    config, model = _prepared(word_config(trial.name, FIGURE, **_sizes(trial)), trial)
    images, captions = demo_examples(PICTURES, 0, FIGURE)
    trained = train_embedding(model, from_images(list(images), captions), config, trial.folder, trial.callbacks)
    (concept,) = trained.embedding.concepts
    prompts = captions_with(concept.token, trial.config.judged)
    drawn = draw(with_word(build_demo_model(), concept), prompts, **DRAW_OPTIONS, batch_size=50)
    right = [drawn_shape(i) == FIGURE and rest_is_right(i, text) for i, text in zip(drawn, prompts, strict=True)]
    return sum(right) / len(right)


TRAININGS: dict[str, Callable[[Trial], float]] = {"T5 swap": swap_t5, "LoRA": style_lora, "word": word}


def run_trial(trial: Trial) -> dict[str, float]:
    """Trains in both precisions from one seed; alignment in each, and the difference."""
    train, root = TRAININGS[str(trial.labels["trained"])], trial.folder / trial.name
    found = {
        precision: train(replace(trial, labels={**trial.labels, "precision": precision}, folder=root))
        for precision in (FP32, BF16)
    }
    return {**found, "difference": found[BF16] - found[FP32]}


def findings(rows: Sequence[Mapping]) -> list[str]:
    """For each training whether alignment in bf16 is lower by more than `MOST` and two standard errors of the
    difference, which is that of pairs of equal seeds."""
    return [f"{row['trained']}: {verdict(row)}" for row in rows]


def verdict(row: Mapping) -> str:
    """A sentence on a row of `summarize`."""
    found = f"bf16 {format_mean(row, BF16)} against fp32 {format_mean(row, FP32)}, {format_mean(row, 'difference')}"
    if row["difference_se"] is None:
        return f"{found}; one trial cannot tell."
    missed = row["difference"] + 2 * row["difference_se"] < -MOST
    return f"{found}; lower by at most {MOST:g}, as far as two standard errors tell: {'missed' if missed else 'holds'}."


STUDY = Study(
    description="Alignment after training in bf16 against fp32: T5 swap, LoRA, word; 500 held-out captions each.",
    cells=[{"trained": name} for name in TRAININGS],
    run_trial=run_trial,
    findings=findings,
    steps=400,
    batch_size=16,
    judged=500,
)
