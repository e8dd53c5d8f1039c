"""Trains the demo model's embedding from five pictures: a word for hearts, which the model draws but cannot name."""

from __future__ import annotations

from pathlib import Path

from ...benchmarks.word_study import captions_with, figure_shares, with_word, word_config
from ...training.commands.open_model import build_demo_model
from ...training.data.dataset import from_images
from ...training.demo.files import EMBEDDINGS, WEIGHTS
from ...training.demo.scenes import demo_examples
from ...training.formats.embedding_save import save_embedding
from ...training.recipes.textual_inversion import train_embedding

PICTURES, SEED = 5, 2


def train_embeddings(work: Path) -> dict[str, dict[str, float]]:
    """Trains the embedding in about two minutes and writes it in the layout that every program reads.

    Returns:
        The shares of 100 held-out captions with the word in place of the noun that show the figure, and all the rest.
    """
    figures = {}
    for name in EMBEDDINGS:
        images, captions = demo_examples(PICTURES, SEED, name)
        dataset = from_images(list(images), captions)
        model = build_demo_model()
        trained = train_embedding(model, dataset, word_config(name, name), work)
        (WEIGHTS / "embeddings" / f"{name}.safetensors").unlink(missing_ok=True)
        save_embedding(WEIGHTS / "embeddings", trained.embedding, "safetensors")
        learned = with_word(model, trained.embedding.concepts[0])
        figures[name] = figure_shares(learned, captions_with(f"<{name}>", 100), name)
    return figures
