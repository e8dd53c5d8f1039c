"""Trains the demo model's embedding from five pictures: a word for hearts, which the model draws but cannot name."""

from __future__ import annotations

from pathlib import Path

from ...training.commands.open_model import build_demo_model
from ...training.config.embedding import EmbeddingConfig
from ...training.config.training_settings import TrainingSettings
from ...training.data.dataset import from_images
from ...training.demo.files import EMBEDDINGS, WEIGHTS
from ...training.demo.scenes import demo_examples
from ...training.formats.embedding_save import save_embedding
from ...training.recipes.textual_inversion import train_embedding

PICTURES, SEED = 5, 2


def embedding_config(name: str) -> EmbeddingConfig:
    """As in the example workflow "Train a textual inversion from five images"."""
    return EmbeddingConfig(
        run_name=name,
        token=f"<{name}>",
        vectors=4,
        initial_text="figure",
        caption_word="figure, figures",
        template="captions",
        steps=250,
        batch_size=16,
        learning_rate=5e-3,
        settings=TrainingSettings(warmup_steps=10, loss_weighting="none"),
    )


def train_embeddings(work: Path) -> None:
    """Trains the embedding in about two minutes and writes it in the layout that every program reads."""
    for name in EMBEDDINGS:
        images, captions = demo_examples(PICTURES, SEED, name)
        dataset = from_images(list(images), captions)
        trained = train_embedding(build_demo_model(), dataset, embedding_config(name), work)
        (WEIGHTS / "embeddings" / f"{name}.safetensors").unlink(missing_ok=True)
        save_embedding(WEIGHTS / "embeddings", trained.embedding, "safetensors")
