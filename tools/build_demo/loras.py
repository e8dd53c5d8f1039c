"""Trains the demo model's two LoRAs, each from twenty pictures: a style, and crescents for the word "figure"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...training.commands.open_model import build_demo_model
from ...training.config.lora import LoraConfig
from ...training.config.training_settings import TrainingSettings
from ...training.data.dataset import from_images
from ...training.demo.files import LORAS, WEIGHTS
from ...training.demo.scenes import demo_examples
from ...training.formats.lora_metadata import LoraDescription
from ...training.formats.lora_save import save_lora
from ...training.recipes.lora import train_lora
from ...training.runs.folder import RunFolder

PICTURES: Mapping[str, dict] = {"warm edges": {"look": "warm edges"}, "crescents": {"subset": "crescent"}}
"""Options of `demo_examples` for the pictures of each."""


def lora_config(name: str) -> LoraConfig:
    """As in the example workflow "Train a style LoRA"."""
    return LoraConfig(
        run_name=name,
        algorithm="LoCon",
        targets="all",
        rank=8,
        alpha=8.0,
        steps=200,
        batch_size=16,
        learning_rate=1e-3,
        settings=TrainingSettings(warmup_steps=10, loss_weighting="none"),
    )


def train_loras(work: Path) -> None:
    """Trains both, in about two minutes each, and writes them in half precision."""
    for name in LORAS:
        images, captions = demo_examples(20, 0, **PICTURES[name])
        dataset = from_images(list(images), captions)
        trained = train_lora(build_demo_model(), dataset, lora_config(name), work)
        about = LoraDescription(run=RunFolder(work / name).config() or {}, title=f"Demo: {name}")
        save_lora(WEIGHTS / "loras" / f"{name}.safetensors", trained.tensors, dtype="fp16", description=about)
