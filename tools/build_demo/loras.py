"""Trains the demo model's two LoRAs, each from twenty pictures: a style, and crescents for the word "figure"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...benchmarks.precision_study import lora_config
from ...benchmarks.word_study import captions_with
from ...training.commands.demo import DRAW_OPTIONS, held_out_captions
from ...training.commands.open_model import build_demo_model
from ...training.data.dataset import from_images
from ...training.demo.files import LORAS, WEIGHTS, weights_path
from ...training.demo.judge import alignment, drawn_shape
from ...training.demo.scenes import demo_examples
from ...training.demo.warmth import with_warm_edges
from ...training.formats.lora import read_lora
from ...training.formats.lora_metadata import LoraDescription
from ...training.formats.lora_save import save_lora
from ...training.recipes.lora import networks_of, train_lora, trainable_layers
from ...training.runs.folder import RunFolder
from ...training.sampling.generate import draw
from ...training.trainables.lora import Adapters, select_layers
from ...training.trainables.lora_init import start_from

PICTURES: Mapping[str, dict] = {"warm edges": {"look": "warm edges"}, "crescents": {"subset": "crescent"}}
"""Options of `demo_examples` for the pictures of each."""


def train_loras(work: Path) -> dict[str, float]:
    """Trains both, in about two minutes each, and writes them in half precision.

    Returns:
        Shares of pictures: with the style and read right under the one, crescents for "figure" under the other.
    """
    for name in LORAS:
        images, captions = demo_examples(20, 0, **PICTURES[name])
        dataset = from_images(list(images), captions)
        trained = train_lora(build_demo_model(), dataset, lora_config(name), work)
        about = LoraDescription(run=RunFolder(work / name).config() or {}, title=f"Demo: {name}")
        save_lora(WEIGHTS / "loras" / f"{name}.safetensors", trained.tensors, dtype="fp16", description=about)
    captions = held_out_captions(100)
    warm = draw_with_lora("warm edges", captions)
    crescents = [drawn_shape(image) for image in draw_with_lora("crescents", captions_with("figure", 60))]
    return {
        "warm edges": with_warm_edges(warm),
        "alignment with warm edges": alignment(warm, captions)["alignment"],
        "crescents": crescents.count("crescent") / len(crescents),
    }


def draw_with_lora(name: str, captions: Sequence[str]) -> list[Tensor]:
    """Pictures of the captions by the demo model with one of its LoRAs at strength 1."""
    model, config = build_demo_model(), lora_config(name)
    chosen = select_layers(trainable_layers(model, config), config)
    adapters = Adapters(chosen, networks_of(model, chosen), config, seed=0)
    start_from(adapters, read_lora(weights_path(f"loras/{name}.safetensors")))
    with adapters.attach(adapters.values()):
        return draw(model, list(captions), **DRAW_OPTIONS, batch_size=50)
