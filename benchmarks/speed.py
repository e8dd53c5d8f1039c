"""Timings on the demo model: seconds of a training step, of drawing and of encoding text, by variant.

A machine's absolute times drift, so the variants take turns within one run and their ratios are what to read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from ..training.commands.open_model import build_demo_model
from ..training.config.training_settings import TrainingSettings
from ..training.data.dataset import from_images
from ..training.data.order import BatchOrder
from ..training.demo.scenes import demo_examples
from ..training.models.layers import select
from ..training.models.parameters import parameter_refs
from ..training.models.protocols import TextToImage
from ..training.objectives.denoising import DenoisingObjective
from ..training.sampling.generate import draw, encode_with
from ..training.trainables.weights import SelectedWeights
from .timing import Variants, median_seconds

PROMPT = "two small red circles on the left, white background"


def run_timing(name: str, rounds: int, batch_size: int) -> dict:
    """Median seconds of every variant of one of `TIMINGS`, and their ratio to those of the first variant.

    Args:
        rounds: Turns of every variant; one more comes first and is not counted.
        batch_size: Pictures or captions at a time.

    Returns:
        {"threads", "device", variant: {"seconds", "ratio"}, ...}
    """
    seconds = median_seconds(TIMINGS[name](batch_size), rounds)
    first = next(iter(seconds.values()))
    figures = {key: {"seconds": round(value, 4), "ratio": round(value / first, 3)} for key, value in seconds.items()}
    return {"threads": torch.get_num_threads(), "device": "cpu", **figures}


def _training_step(batch_size: int) -> Variants:
    """Forward and backward of one training step: cross-attention in fp32, in bf16, checkpointed, and the whole UNet."""
    model = build_demo_model()
    denoiser = model.denoiser
    objective, batch = _denoising_batch(model, batch_size)
    weights = {denoiser.canonical_name(n): ref for n, ref in parameter_refs(denoiser.network).items()}

    def step(layers: str, bf16: bool = False, checkpointing: bool = False) -> Callable[[], None]:
        trainable = SelectedWeights({name: weights[name] for name in select(weights, layers)}, [denoiser.network])

        def run() -> None:
            precision = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
            with denoiser.checkpointing(checkpointing), trainable.attach(), precision:
                objective(list(enumerate(objective.load(batch))), 1).per_sample.mean().backward()

        return run

    return {
        "cross-attention, fp32": step("cross-attention"),
        "cross-attention, bf16": step("cross-attention", bf16=True),
        "cross-attention, fp32, gradient checkpointing": step("cross-attention", checkpointing=True),
        "whole UNet, fp32": step("whole UNet"),
    }


def _denoising_batch(model: TextToImage, batch_size: int) -> tuple[DenoisingObjective, list]:
    """The denoising loss with latents and text encoded beforehand, and the first batch of a training."""
    images, captions = demo_examples(batch_size, 0)
    dataset = from_images([image.movedim(0, -1)[None] for image in images], captions)
    latents = {e.key: model.autoencoder.encode(e.load()[None])[0] for e in dataset.examples}
    encoded = {text: encode_with(model.text_encoder)(text) for text in ["", *captions]}
    objective = DenoisingObjective(
        model.denoiser,
        TrainingSettings(),
        0,
        latent_of=lambda slot: latents[slot.example.key],
        text_of=encoded.get,
        project=model.text_encoder.project,
    )
    return objective, BatchOrder(dataset, batch_size, 0).batch(1)


def _drawing(batch_size: int) -> Variants:
    """Drawing pictures with guidance: one batch, and one by one."""
    model, prompts = build_demo_model(), [PROMPT] * batch_size
    options = {"width": 128, "height": 128, "steps": 5, "cfg": 4.0, "seed": 0}
    return {
        "one batch": lambda: draw(model, prompts, **options, batch_size=batch_size),
        "one by one": lambda: draw(model, prompts, **options, batch_size=1),
    }


def _text(batch_size: int) -> Variants:
    """Encoding captions one by one: CLIP, and T5 without padding and padded to 77 tokens."""

    def encode(**options) -> Callable[[], object]:
        encoder = build_demo_model(**options).text_encoder
        return lambda: [encoder.encode(encoder.tokenize([prompt])) for prompt in [PROMPT] * batch_size]

    return {
        "CLIP": encode(),
        "T5": encode(t5="demo"),
        "T5, padded to 77": encode(t5="demo", max_tokens=77, pad="max_tokens"),
    }


TIMINGS: dict[str, Callable[[int], Variants]] = {
    "training-step": _training_step,
    "drawing": _drawing,
    "text": _text,
}
"""Name -> the variants to time, from a batch size."""
