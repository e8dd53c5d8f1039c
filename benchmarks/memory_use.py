"""Memory of a training step by part, as the estimate before a run computes it, beside that of a real step.

SD1.5 and SDXL are built from their shapes without values, so their estimates need no weights, no memory and no GPU.
With `measure` they get random weights, and a step is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..training.commands.open_model import build_demo_model
from ..training.common.callbacks import Callbacks
from ..training.common.live_bytes import LiveBytes
from ..training.config.checks import check_range
from ..training.config.loop import LoopConfig
from ..training.config.lora import LoraConfig
from ..training.config.reward import RewardTuneConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import TrainingSettings
from ..training.data.examples import Example
from ..training.data.order import Slot
from ..training.data.prompts import PromptSlot
from ..training.loop.estimate import MemoryEstimate, estimate_memory
from ..training.loop.gradient_step import GradientStep
from ..training.models.checkpoint import SD1_VAE, SDXL_VAE
from ..training.models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from ..training.models.parameters import parameter_refs
from ..training.models.protocols import Conditioning, TextToImage
from ..training.objectives.denoising import DenoisingObjective
from ..training.objectives.reward import RewardObjective
from ..training.recipes.lora import unet_layers
from ..training.rewards.combined import CombinedReward, Term
from ..training.rewards.load import RewardConfig, load_reward
from ..training.trainables.base import Trainable
from ..training.trainables.lora import Adapters, select_layers
from ..training.trainables.weights import SelectedWeights
from .processes import free_memory
from .random_models import SD15_UNET, SDXL_UNET, SIDES
from .study import markdown_table

DESCRIPTION = "Memory of a training step by part at the size of the demo model, SD1.5 or SDXL: computed, and measured."
TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What the `memory` benchmark computes."""

    pixels: int = 0
    """Side of the pictures, a multiple of 8; 0: 128, 512 or 1024 by size."""
    rank: int = 16
    """Of the LoRA."""
    measure: bool = False
    """Run a step with random weights at the size of SD1.5 or SDXL too; the demo model's is always run."""

    only: str = ""
    """Part of the names of the settings, such as bf16; empty: all."""

    def __post_init__(self) -> None:
        check_range(self, pixels=(0, 8192), rank=(1, 4096))
        if not any(self.only in name for name in SETTINGS):
            raise ValueError(f"only is {self.only!r}; expected a part of one of {'; '.join(SETTINGS)}.")


@dataclass(frozen=True)
class FixedText:
    """A text encoder whose conditioning is zeros: the memory of a step does not depend on the words."""

    denoiser: DiffusersDenoiser
    projection: nn.Module | None = None
    weights: dict = field(default_factory=dict)

    def tokenize(self, texts: list[str]) -> list[str]:
        return texts

    def encode(self, texts: list[str]) -> Conditioning:
        count, width, pooled = len(texts), self.denoiser.context_width, self.denoiser.pooled_width
        context = torch.zeros(count, TOKENS, width, device=self.denoiser.device)
        return Conditioning(context, torch.zeros(count, pooled, device=self.denoiser.device) if pooled else None)

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        return states


@dataclass(frozen=True)
class OneBatch:
    """Batches that are all the same."""

    slot: Slot | PromptSlot
    size: int

    def batch(self, number: int) -> list:
        return [self.slot] * self.size

    def largest(self) -> Slot | PromptSlot:
        return self.slot


def sized_model(size: str, mode: AbstractContextManager) -> TextToImage:
    """The demo model, or UNet and VAE of SD1.5 or SDXL made inside `mode`, with text of their width."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if size == "demo":
        model = build_demo_model()
        return TextToImage(model.denoiser, FixedText(model.denoiser), model.autoencoder)
    unet, vae = (SD15_UNET, SD1_VAE) if size == "sd15" else (SDXL_UNET, SDXL_VAE)
    with mode:
        denoiser = DiffusersDenoiser(UNet2DConditionModel(**unet))
        autoencoder = DiffusersAutoencoder(AutoencoderKL(**vae))
    return TextToImage(denoiser, FixedText(denoiser), autoencoder)


def lora_of(model: TextToImage, rank: int) -> Trainable:
    """A LoRA on the UNet's attention and feed-forward layers."""
    config = LoraConfig(run_name="bench", rank=rank, alpha=float(rank))
    return Adapters(select_layers(unet_layers(model.denoiser), config), [model.denoiser.network], config, 0)


def unet_of(model: TextToImage, rank: int) -> Trainable:
    """The whole UNet."""
    network = model.denoiser.network
    names = {model.denoiser.canonical_name(name): ref for name, ref in parameter_refs(network).items()}
    return SelectedWeights(names, [network])


@dataclass(frozen=True)
class Kind:
    """A training: what trains, and whether by rewards."""

    trainable: Callable[[TextToImage, int], Trainable]
    rewards: bool = False


KINDS = {"LoRA": Kind(lora_of), "whole UNet": Kind(unet_of), "reward, UNet LoRA": Kind(lora_of, rewards=True)}
SETTINGS = {
    "fp32": TrainingSettings(precision="fp32"),
    "bf16": TrainingSettings(precision="bf16"),
    "bf16, checkpointed": TrainingSettings(precision="bf16", gradient_checkpointing=True),
}


def make_step(
    model: TextToImage, kind: Kind, settings: TrainingSettings, config: MemoryConfig, side: int, batch: int
) -> tuple[GradientStep, list[nn.Module]]:
    """The first optimizer step of a training, and the networks that are in memory besides the UNet."""
    trainable, device = kind.trainable(model, config.rank), model.denoiser.device
    loop = LoopConfig(steps=1, batch_size=batch, learning_rate=1e-4, settings=settings, samples=SamplePrompts())
    if kind.rewards:
        reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
        reward.network.to(device)
        tuning = RewardTuneConfig(run_name="bench", train="UNet LoRA", width=side, height=side, settings=settings)
        objective = RewardObjective(model, reward, tuning, trainable, text_trains=False)
        slot, more = PromptSlot("a red circle", 1, 0), [model.autoencoder.network, reward.network]
    else:
        cells = side // model.autoencoder.downscale
        latent = torch.zeros(model.denoiser.latent_channels, cells, cells)
        text = model.text_encoder.encode([""])
        parts = {"latent_of": lambda slot: latent, "text_of": lambda caption: text}
        objective = DenoisingObjective(model.denoiser, settings, 0, project=model.text_encoder.project, **parts)
        slot, more = Slot(Example("", "a red circle", side, side, latent, "picture"), False, 0, 0), []
    return GradientStep(trainable, objective, OneBatch(slot, batch), loop, device), more


def estimate_step(model: TextToImage, step: GradientStep, more: Iterable[nn.Module]) -> MemoryEstimate:
    """The estimate of a step that is not begun."""
    networks = [model.denoiser.network, *more]
    weights = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    (sample,) = step.objective.load([step.batches.largest()])
    with model.denoiser.checkpointing(step.settings.gradient_checkpointing):
        return estimate_memory(step, weights, sample, len(step.batches.batch(1)), {})


def measure_step(model: TextToImage, step: GradientStep, present: int) -> int:
    """Bytes that two steps take at most: of the allocator of a GPU, elsewhere of live tensors, with `present` bytes of
    what is there before."""
    cuda = step.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(step.device)
    with ExitStack() as stack:
        stack.enter_context(model.denoiser.checkpointing(step.settings.gradient_checkpointing))
        live = None if cuda else stack.enter_context(LiveBytes())
        stack.enter_context(step.trainable.mounted())
        for number in (1, 2):
            step.gradient(number, Callbacks())
            step.update(number)
    return torch.cuda.max_memory_allocated(step.device) if cuda else present + live.peak


def run_memory_bench(
    config: MemoryConfig, size: str, batch: int, callbacks: Callbacks, deadline: float | None = None
) -> dict:
    """Computes the memory of every kind of training under every setting, and measures it where asked for and where the
    estimate fits.

    Args:
        deadline: `time.monotonic()` after which nothing more begins.

    Returns:
        "rows" with bytes of each part and at most, "measured" and its ratio where a step was run; "skipped", what was
        not measured and why; "device", "table".
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    real, side = config.measure or size == "demo", config.pixels or SIDES[size]
    mode = torch.device(device) if real else FakeTensorMode(allow_non_fake_inputs=True)
    model, rows, skipped = sized_model(size, mode), [], {}
    chosen = [(kind, name, SETTINGS[name]) for kind in KINDS for name in SETTINGS if config.only in name]
    for kind, name, settings in chosen:
        if deadline is not None and time.monotonic() >= deadline:
            skipped[f"{kind}, {name}"] = "no time was left"
            continue
        callbacks.on_text(f"memory of {kind}, {name}")
        step, more = make_step(model, KINDS[kind], settings, config, side, batch)
        estimate = estimate_step(model, step, more)
        row = {"training": kind, "setting": name, **estimate.as_dict()}
        if real and estimate.needed > (free := free_memory(device)):
            skipped[f"{kind}, {name}"] = f"needs about {estimate.needed / 1e9:.1f} GB of {free / 1e9:.1f} GB"
        elif real:
            measured = measure_step(model, step, estimate.present)
            row |= {"measured": measured, "ratio": round(estimate.peak / measured, 3)}
        rows.append(row)
    about = {"size": size, "pixels": side, "batch_size": batch, "device": device}
    return {**about, "rows": rows, "skipped": skipped, "table": _table(rows) if rows else ""}


def _table(rows: list[dict]) -> str:
    scaled = partial(_in_gigabytes, skip=("ratio",))
    return markdown_table([{key: scaled(key, value) for key, value in row.items()} for row in rows])


def _in_gigabytes(key: str, value: object, skip: tuple[str, ...]) -> object:
    """A number of bytes in GB; other values as they are."""
    return round(value / 1e9, 3) if isinstance(value, int) and key not in skip else value
