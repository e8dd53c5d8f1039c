"""A word from five pictures, for each of the figures that the demo model draws and captions never name.

For every figure several choices of five pictures, and several seeds: how often the learned word draws the figure in
new places, and how much of the rest of the prompt is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..training.commands.demo import DRAW_OPTIONS, held_out_captions
from ..training.commands.open_model import build_demo_model
from ..training.config.embedding import EmbeddingConfig
from ..training.config.training_settings import TrainingSettings
from ..training.data.dataset import from_images
from ..training.demo.judge import correct, drawn_shape, parse_caption, read
from ..training.demo.scenes import demo_examples
from ..training.demo.shapes import UNNAMED_SHAPES
from ..training.models.concepts import Concept
from ..training.models.protocols import TextToImage
from ..training.recipes.textual_inversion import train_embedding
from ..training.sampling.generate import draw
from .study import Study, Trial, format_mean

PICTURES, CHOICES = 5, 5
_NOUN = re.compile(r"\b(circle|square|triangle|cross|ring)(e?s)?\b")


def word_config(name: str, figure: str, steps: int = 250, batch_size: int = 16, seed: int = 0) -> EmbeddingConfig:
    """How a word is learned from pictures of a figure: as the example workflow "Train a textual inversion" does."""
    return EmbeddingConfig(
        run_name=name,
        token=f"<{figure}>",
        vectors=4,
        initial_text="figure",
        caption_word="figure, figures",
        template="captions",
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-3,
        seed=seed,
        settings=TrainingSettings(warmup_steps=10, loss_weighting="none"),
    )


def captions_with(word: str, count: int) -> list[str]:
    """Held-out captions with `word` in place of the noun."""
    return [_NOUN.sub(word, caption) for caption in held_out_captions(count)]


def figure_shares(model: TextToImage, captions: Sequence[str], figure: str) -> dict[str, float]:
    """Draws captions; the share of pictures that show `figure`, and that show the "rest" as the caption says."""
    images = draw(model, list(captions), **DRAW_OPTIONS, batch_size=50)
    kept = [rest_is_right(image, caption) for image, caption in zip(images, captions, strict=True)]
    return {
        "drawn": sum(drawn_shape(image) == figure for image in images) / len(images),
        "rest": sum(kept) / len(kept),
    }


def rest_is_right(image: Tensor, caption: str) -> bool:
    """Whether a picture shows all that its caption says besides the shape."""
    said = {name: value for name, value in parse_caption(caption).items() if name != "shape"}
    return all(correct(read(image), said).values())


def with_word(model: TextToImage, concept: Concept) -> TextToImage:
    """The model with a text encoder that knows the word."""
    return replace(model, text_encoder=model.text_encoder.with_concepts([concept]))


def run_trial(trial: Trial) -> dict[str, float]:
    """Learns one figure's word from one choice of pictures, and measures it."""
    figure, choice = str(trial.labels["figure"]), int(trial.labels["pictures"])
    images, captions = demo_examples(PICTURES, choice, figure)
    config = word_config(trial.name, figure, trial.config.steps, trial.config.batch_size, trial.seed)
    model = build_demo_model()
    trained = train_embedding(model, from_images(list(images), captions), config, trial.folder, trial.callbacks)
    (concept,) = trained.embedding.concepts
    learned = captions_with(concept.token, trial.config.judged)
    return figure_shares(with_word(model, concept), learned, figure)


def findings(rows: Sequence[Mapping]) -> list[str]:
    """For each figure the mean over all choices of pictures, and the best and the worst choice."""
    sentences = []
    for figure in UNNAMED_SHAPES:
        found = sorted((row for row in rows if row["figure"] == figure), key=lambda row: row["drawn"])
        if found:
            mean = sum(row["drawn"] for row in found) / len(found)
            worst, best = (f"{format_mean(row, 'drawn')} (pictures {row['pictures']})" for row in (found[0], found[-1]))
            sentences.append(f"{figure}: {mean:.2f} over {len(found)} choices of pictures, from {worst} to {best}.")
    return sentences


STUDY = Study(
    description="A word from five pictures: each unnamed figure, five choices of pictures.",
    cells=[{"figure": figure, "pictures": choice} for choice in range(CHOICES) for figure in UNNAMED_SHAPES],
    run_trial=run_trial,
    findings=findings,
    steps=250,
    batch_size=16,
    judged=50,
)
