"""Benchmarks on the demo model: `python run.py bench [name]`. Variants take turns in one run; read the ratios.

A machine's absolute times drift; medians of interleaved rounds, compared side by side, hold. The studies, under the
same command, compare what training reaches rather than how long it takes: see `demo.study`. "lora" compares both with
ComfyUI's own trainer: see `demo.lora_bench`. "reward" measures the memory and time of reward tuning's ways of going
back through the sampler: see `demo.reward_bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ..training.commands.open_model import ModelConfig, build_model
from ..training.config.training_settings import TrainingSettings
from ..training.data.dataset import from_images
from ..training.data.order import BatchOrder
from ..training.models.layers import select
from ..training.models.parameters import parameter_refs
from ..training.objectives.denoising import DenoisingObjective
from ..training.sampling.generate import draw, encode_with
from ..training.trainables.weights import SelectedWeights
from . import lora as lora_bench
from . import projection_study, reset_study, reward_study
from . import reward as reward_bench
from .timing import Variants, medians

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure and how often."""

    name: str = ""
    """Which benchmark or study; empty lists them."""
    rounds: int = 7
    """Turns of every variant, after one that is not counted."""
    batch_size: int = 0
    """Pictures or captions at a time; 0: 16, or a study's own number."""

    def __post_init__(self) -> None:
        if self.name and self.name not in abouts():
            raise ValueError(f"benchmark is {self.name!r}; expected one of {', '.join(abouts())}.")
        if self.rounds < 1 or self.batch_size < 0:
            raise ValueError(
                f"rounds and batch_size are {self.rounds} and {self.batch_size}; expected 1 and 0 or more."
            )


def run_bench(config: BenchConfig) -> dict:
    """Seconds of every variant and, for all but the first, how many times the first one's that is."""
    if not config.name:
        return abouts()
    sized = replace(config, batch_size=config.batch_size or BATCH)
    found = medians(BENCHES[config.name](sized), config.rounds)
    first = next(iter(found.values()))
    figures = {name: {"seconds": round(value, 4), "ratio": round(value / first, 3)} for name, value in found.items()}
    return {"threads": torch.get_num_threads(), "device": "cpu", **figures}


def _training_step(config: BenchConfig) -> Variants:
    """Forward and backward of one training step: cross-attention in fp32, in bf16, checkpointed, and the whole UNet."""
    from ..training.demo.scenes import demo_examples

    model = build_model(ModelConfig(model="demo"))
    denoiser, encoder = model.denoiser, model.text_encoder
    images, captions = demo_examples(config.batch_size, 0)
    dataset = from_images([image.movedim(0, -1)[None] for image in images], captions)
    latent = {e.key: model.autoencoder.encode(e.load()[None])[0] for e in dataset.examples}
    text = {c: encode_with(encoder)(c) for c in ["", *captions]}
    slots = BatchOrder(dataset, config.batch_size, 0).batch(1)
    objective = DenoisingObjective(
        denoiser,
        TrainingSettings(),
        0,
        latent_of=lambda slot: latent[slot.example.key],
        text_of=text.get,
        project=encoder.project,
    )
    found = {denoiser.canonical_name(n): t for n, t in parameter_refs(denoiser.network).items()}

    def step(layers: str, bf16: bool = False, checkpointing: bool = False) -> Callable[[], None]:
        trainable = SelectedWeights({name: found[name] for name in select(found, layers)}, [denoiser.network])

        def run() -> None:
            precision = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
            with denoiser.checkpointing(checkpointing), trainable.attach(), precision:
                objective(list(enumerate(objective.load(slots))), 1).per_sample.mean().backward()

        return run

    return {
        "cross-attention, fp32": step("cross-attention"),
        "cross-attention, bf16": step("cross-attention", bf16=True),
        "cross-attention, fp32, gradient checkpointing": step("cross-attention", checkpointing=True),
        "whole UNet, fp32": step("whole UNet"),
    }


def _drawing(config: BenchConfig) -> Variants:
    """Drawing pictures with guidance: one batch, and one by one."""
    model = build_model(ModelConfig(model="demo"))
    prompts = ["two small red circles on the left, white background"] * config.batch_size
    options = {"width": 128, "height": 128, "steps": 5, "cfg": 4.0, "seed": 0}
    return {
        "one batch": lambda: draw(model, prompts, **options, batch_size=config.batch_size),
        "one by one": lambda: draw(model, prompts, **options, batch_size=1),
    }


def _text(config: BenchConfig) -> Variants:
    """Encoding captions one by one: CLIP, and T5 without padding and padded to 77 tokens."""
    prompts = ["two small red circles on the left, white background"] * config.batch_size

    def encode(model: ModelConfig) -> Callable[[], object]:
        encoder = build_model(model).text_encoder
        return lambda: [encoder.encode(encoder.tokenize([prompt])) for prompt in prompts]

    padded = ModelConfig(model="demo", t5="demo", max_tokens=77, pad="max_tokens")
    return {
        "CLIP": encode(ModelConfig(model="demo")),
        "T5": encode(ModelConfig(model="demo", t5="demo")),
        "T5, padded to 77": encode(padded),
    }


BENCHES: dict[str, Callable[[BenchConfig], Variants]] = {
    "training-step": _training_step,
    "drawing": _drawing,
    "text": _text,
}
STUDIES = {
    "reset-study": reset_study.STUDY,
    "projection-start": projection_study.STUDY,
    "reward-study": reward_study.STUDY,
}
LORA, REWARD = "lora", "reward"


def abouts() -> dict[str, str]:
    """Everything that can be measured, in a sentence each."""
    timed = {name: function.__doc__ for name, function in BENCHES.items()} | {REWARD: reward_bench.ABOUT}
    return timed | {name: study.about for name, study in STUDIES.items()} | {LORA: lora_bench.ABOUT}
