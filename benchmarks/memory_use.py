"""Memory of a training step by part, as the estimate before a run computes it, beside that of a real step.

SD1.5 and SDXL are built from their shapes without values, so their estimates need no weights, no memory and no GPU.
With `measure` they get random weights, and a step is run. Every row has a model of its own, held as a run of its
precision holds that of an fp16 file, and with the parts on the device that are there while a run trains.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..training.commands.open_model import DEMO, VAE, build_model
from ..training.common.callbacks import Callbacks
from ..training.common.live_bytes import LiveBytes
from ..training.config.checks import check_range
from ..training.config.loop import LoopConfig
from ..training.config.lora import LoraConfig
from ..training.config.model import ModelConfig
from ..training.config.reward import RewardTuneConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import TrainingSettings
from ..training.data.examples import Example
from ..training.data.order import Slot
from ..training.data.prompts import PromptSlot
from ..training.loop.estimate import MemoryEstimate, estimate_memory
from ..training.loop.gradient_step import GradientStep
from ..training.loop.precision import DTYPES
from ..training.models.checkpoint import SD1_VAE, SDXL_VAE
from ..training.models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from ..training.models.parameters import parameter_refs
from ..training.models.protocols import Conditioning, TextToImage
from ..training.models.recast import hold, store_in
from ..training.objectives.denoising import DenoisingObjective
from ..training.objectives.reward import RewardObjective
from ..training.recipes.lora import unet_layers
from ..training.rewards.combined import CombinedReward, Term
from ..training.rewards.load import RewardConfig, load_reward
from ..training.trainables.base import Trainable
from ..training.trainables.lora import Adapters, select_layers
from ..training.trainables.weights import SelectedWeights
from .charts import BENCH_FOLDER, save_bars
from .processes import free_memory
from .random_models import SD15_UNET, SDXL_UNET, default_side, fill
from .study import markdown_table

DESCRIPTION = "Memory of a training step by part at the size of the demo model, SD1.5 or SDXL: computed, and measured."
TOKENS = 77
SAMPLING_STEPS = 5
"""Of rewards: as many as gradients go through by default; each further one leaves a latent."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What the `memory` benchmark computes."""

    pixels: int = 0
    """Side of the pictures, a multiple of 8; 0: 128, 512 or 1024 by size, and at most 256 on a CPU."""
    rank: int = 4
    """Of the LoRA."""
    measure: bool = False
    """Run a step with random weights at the size of SD1.5 or SDXL too; the demo model's is always run."""
    presets: bool = False
    """Compute, in place of that, what the presets by card take for each trainer."""
    only: str = ""
    """One of the settings, or part of the names of several; empty: all."""
    output: Path = BENCH_FOLDER
    """Folder of the chart."""

    def __post_init__(self) -> None:
        check_range(self, pixels=(0, 8192), rank=(1, 4096))
        if not self.settings:
            raise ValueError(f"only is {self.only!r}; expected a part of one of {'; '.join(SETTINGS)}.")

    @property
    def settings(self) -> list[str]:
        """Those of `SETTINGS` that are computed."""
        return [self.only] if self.only in SETTINGS else [name for name in SETTINGS if self.only in name]


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


def sized_model(
    size: str, mode: AbstractContextManager, kind: Kind | None = None, settings: TrainingSettings | None = None
) -> TextToImage:
    """The demo model, or UNet and VAE of SD1.5 or SDXL, with text of their width.

    Args:
        size: "demo", "sd15" or "sdxl".
        mode: a device, or a `FakeTensorMode` for SD1.5 and SDXL without values.
        kind: the training that it is for; the VAE is then where that has it. None: on the device.
        settings: of that training, whose precision says how the weights are held. None: fp32.
    """
    dtype, trains = DTYPES[settings.precision if settings else "fp32"], kind is not None and kind.weights
    device = mode if isinstance(mode, torch.device) else torch.get_default_device()
    visiting = (VAE,) if kind is not None and not kind.rewards else ()
    if size == "demo":
        model = build_model(ModelConfig(model=DEMO, device=str(device)), dtype, lambda name: trains, visiting)
        return _frozen(model.denoiser, model.autoencoder)
    vae_device = torch.device("cpu") if visiting else device
    unet, vae = _networks(size, mode, vae_device)
    if dtype != torch.float32:
        for parameter in (*unet.parameters(), *vae.parameters()):
            parameter.data = parameter.data.half()  # `Module.half` swaps tensors, which those without values refuse
        store_in(unet, dtype, lambda name: trains)
    if isinstance(mode, torch.device):
        fill(unet.to_empty(device=device))
        fill(vae.to_empty(device=vae_device))
    return _frozen(DiffusersDenoiser(unet), DiffusersAutoencoder(vae if dtype == torch.float32 else hold(vae)))


def _frozen(denoiser: DiffusersDenoiser, autoencoder: DiffusersAutoencoder) -> TextToImage:
    """A model whose own weights need no gradient, as while a run trains: an estimate would count what they keep."""
    for network in (denoiser.network, autoencoder.network):
        network.requires_grad_(False)
    return TextToImage(denoiser, FixedText(denoiser), autoencoder)


def _networks(size: str, mode: AbstractContextManager, vae_device: torch.device) -> tuple[nn.Module, nn.Module]:
    """UNet and VAE without values: on meta tensors where a device is to have them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae = (SD15_UNET, SD1_VAE) if size == "sd15" else (SDXL_UNET, SDXL_VAE)
    with torch.device("meta") if isinstance(mode, torch.device) else mode:
        network = UNet2DConditionModel(**unet)
        with nullcontext() if isinstance(mode, torch.device) else vae_device:
            return network, AutoencoderKL(**vae)


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
    """A training: what trains, whether those are weights of the UNet itself, and whether by rewards."""

    trainable: Callable[[TextToImage, int], Trainable]
    weights: bool = False
    rewards: bool = False


KINDS = {
    "LoRA": Kind(lora_of),
    "whole UNet": Kind(unet_of, weights=True),
    "reward, UNet LoRA": Kind(lora_of, rewards=True),
}
SETTINGS = {
    "fp32": TrainingSettings(precision="fp32"),
    "bf16": TrainingSettings(precision="bf16"),
    "bf16, checkpointed": TrainingSettings(precision="bf16", gradient_checkpointing=True),
}


def make_step(
    model: TextToImage, kind: Kind, settings: TrainingSettings, config: MemoryConfig, side: int, batch: int
) -> tuple[GradientStep, list[nn.Module]]:
    """The first optimizer step of a training, and the networks besides the UNet: those on its device count."""
    trainable, device = kind.trainable(model, config.rank), model.denoiser.device
    loop = LoopConfig(steps=1, batch_size=batch, learning_rate=1e-4, settings=settings, samples=SamplePrompts())
    if kind.rewards:
        reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
        reward.network.to(device)
        sizes = {"width": side, "height": side, "sampling_steps": SAMPLING_STEPS}
        tuning = RewardTuneConfig(run_name="bench", train="UNet LoRA", settings=settings, **sizes)
        objective = RewardObjective(model, reward, tuning, trainable, text_trains=False)
        slot, more = PromptSlot("a red circle", 1, 0), [reward.network]
    else:
        cells = side // model.autoencoder.downscale
        latent = torch.zeros(model.denoiser.latent_channels, cells, cells)
        text = model.text_encoder.encode([""])
        parts = {"latent_of": lambda slot: latent, "text_of": lambda caption: text}
        objective = DenoisingObjective(model.denoiser, settings, 0, project=model.text_encoder.project, **parts)
        slot, more = Slot(Example("", "a red circle", side, side, latent, "picture"), False, 0, 0), []
    return GradientStep(trainable, objective, OneBatch(slot, batch), loop, device), [model.autoencoder.network, *more]


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


@dataclass(frozen=True)
class Row:
    """One kind of training under one setting, at one size."""

    kind: str
    setting: str
    config: MemoryConfig
    size: str
    side: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.setting}"

    def step(self, mode: AbstractContextManager) -> tuple[TextToImage, GradientStep, list[nn.Module]]:
        """A model made in `mode`, its step, and its other networks."""
        kind, settings = KINDS[self.kind], SETTINGS[self.setting]
        model = sized_model(self.size, mode, kind, settings)
        return model, *make_step(model, kind, settings, self.config, self.side, self.batch)

    def estimate(self, device: torch.device) -> MemoryEstimate:
        """Without values, but for the demo model."""
        if self.size == "demo":
            return estimate_step(*self.step(device))
        with device:
            return estimate_step(*self.step(FakeTensorMode(allow_non_fake_inputs=True)))

    def measured(self, device: torch.device, present: int) -> int:
        """Bytes at most, of a model of its own; present: those that are there before the step."""
        gc.collect()
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model, step, _ = self.step(device)
        return measure_step(model, step, present) - before


def run_memory_bench(
    config: MemoryConfig, size: str, batch: int, callbacks: Callbacks, deadline: float | None = None
) -> dict:
    """Computes the memory of every kind of training under every setting, and measures it where asked for and where the
    estimate fits.

    Args:
        deadline: `time.monotonic()` after which nothing more begins.

    Returns:
        "rows" with bytes of each part and at most, "measured" and its ratio where a step was run; "skipped", what was
        not measured and why; "device", "chart", "table".
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real, side = config.measure or size == "demo", config.pixels or default_side(size, device.type)
    chosen, found, skipped = [(kind, name) for kind in KINDS for name in config.settings], [], {}
    for row in (Row(kind, name, config, size, side, batch) for kind, name in chosen):
        if deadline is not None and time.monotonic() >= deadline:
            skipped[row.name] = "no time was left"
            continue
        callbacks.on_text(f"memory of {row.name}")
        estimate = row.estimate(device)
        values = {"training": row.kind, "setting": row.setting, **estimate.as_dict()}
        if real and estimate.peak > (free := free_memory(device.type)):
            skipped[row.name] = f"needs about {estimate.peak / 1e9:.1f} GB of {free / 1e9:.1f} GB"
        elif real:
            measured = row.measured(device, estimate.present)
            values |= {"measured": measured, "ratio": round(estimate.peak / measured, 3)}
        found.append(values)
    about = {"size": size, "pixels": side, "batch_size": batch, "device": device.type}
    chart = _save_chart(found, f"memory, {size}, {side} pixels, {device.type}", config.output / f"memory {size}.png")
    return {**about, "rows": found, "skipped": skipped, "chart": chart, "table": _table(found) if found else ""}


def _save_chart(rows: list[dict], title: str, path: Path) -> str:
    """Bars of the estimates, and of what was measured where something was."""
    panels = {"estimate (GB)": [row["peak"] / 1e9 for row in rows]}
    if any("measured" in row for row in rows):
        panels["measured (GB)"] = [row.get("measured", 0) / 1e9 for row in rows]
    return save_bars(title, [f"{row['training']}, {row['setting']}" for row in rows], panels, path)


def _table(rows: list[dict]) -> str:
    scaled = partial(_in_gigabytes, skip=("ratio",))
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table([{name: scaled(name, row.get(name, "")) for name in names} for row in rows])


def _in_gigabytes(key: str, value: object, skip: tuple[str, ...]) -> object:
    """A number of bytes in GB; other values as they are."""
    return round(value / 1e9, 3) if isinstance(value, int) and key not in skip else value
