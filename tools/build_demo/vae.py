"""Trains the demo autoencoder: eight pixels to a latent cell, four channels, the SD1.5 kind."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from ...training.common.files import atomic_path, write_tensors
from ...training.common.rng import generator
from ...training.demo.judge import alignment
from ...training.demo.quality import quality_shares
from ...training.demo.scenes import Scene, draw, held_out_scenes, random_words, training_scenes, with_words
from ...training.demo.shapes import SIDE
from .init import level_keeping_init
from .muon import muon_and_adamw

LOG = logging.getLogger(__name__)
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64, 64, 64, 64],
    "layers_per_block": 0,
    "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": SIDE,
}
SEED = 20
SCENES = 4000
CROP_STEPS, CROP_BATCH, CROP = 2500, 16, 48
FULL_STEPS, FULL_BATCH = 100, 8
LEARNING_RATE = 2e-3
OUTER = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv")
SHAPE_WEIGHT = 2.0
"""Extra weight of pixels that differ from the median colour: the shapes, which cover a small area."""
SQUARE_WEIGHT = 4.0
"""Weight of the squared error: the absolute error alone fills the hole of a small ring, as its pixels are few."""
SCALING_FACTOR = 0.4277592577313616
"""The first demo model's: what ComfyUI saved of that model has no config, and is decoded right with this one's."""
SAVE_EVERY = 120
"""Seconds between two states."""
KL_WEIGHT = 1e-4
"""Weight of the KL term, a mean over latent elements: high enough for smooth latents, too low to blur."""


def pictures(scenes: list[Scene], seed: int) -> Tensor:
    """The scenes drawn as uint8 (N, 3, 128, 128)."""
    drawn = (draw(scene, generator(seed, "picture", index)) for index, scene in enumerate(scenes))
    return torch.stack([(image * 255).round().to(torch.uint8) for image in drawn])


def cosine_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to a fiftieth of the peak."""
    done = max(0.0, (step - warmup) / max(1, steps - warmup))
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _crops(images: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
    """One crop of `CROP` pixels per image, the one of three random ones with the highest variance."""
    chosen = []
    for image in images[index]:
        corners = torch.randint(SIDE - CROP + 1, (3, 2), generator=rng).tolist()
        crops = [image[:, y : y + CROP, x : x + CROP].float() / 255 for y, x in corners]
        chosen.append(max(crops, key=lambda crop: float(crop.std((1, 2)).sum())))
    return torch.stack(chosen)


def _loss(vae: nn.Module, images: Tensor, rng: torch.Generator) -> tuple[Tensor, float]:
    """Mean absolute error, the same of the pixel gradients (crisp edges), and a small KL term."""
    posterior = vae.encode(images * 2 - 1).latent_dist
    mean, variance = posterior.mean, posterior.logvar.exp()
    output = vae.decode(mean + variance.sqrt() * torch.randn(mean.shape, generator=rng)).sample
    error = (output + 1) / 2 - images
    unusual = (images - images.flatten(2).median(2).values[..., None, None]).abs().amax(1, keepdim=True) > 0.12
    error = error * (1 + SHAPE_WEIGHT * unusual)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()).mean()
    absolute = error.abs().mean()
    return absolute + 0.5 * edges + SQUARE_WEIGHT * error.square().mean() + KL_WEIGHT * kl, float(absolute.detach())


def train_vae(work: Path) -> dict[str, float]:
    """Trains the autoencoder; writes `vae.safetensors` (diffusers names, fp32) into the work folder; resumes."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(**CONFIG)
    images = pictures(training_scenes(SCENES, SEED), SEED)
    _initialise(vae, images[:16].float() / 127.5 - 1)
    optimizers = muon_and_adamw(vae, OUTER, LEARNING_RATE)

    def step(number: int) -> float:
        rng = generator(SEED, "vae step", number)
        full = number >= CROP_STEPS
        index = torch.randint(len(images), (FULL_BATCH if full else CROP_BATCH,), generator=rng)
        batch = images[index].float() / 255 if full else _crops(images, index, rng)
        loss, absolute = _loss(vae, batch, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        return absolute

    figures = run_steps("vae", vae, optimizers, step, CROP_STEPS + FULL_STEPS, LEARNING_RATE, work)
    scale_latents(vae, 1 / (SCALING_FACTOR * latents_of(vae, images[:1000], 1.0).std().item()))
    metadata = {"config": json.dumps(CONFIG | {"scaling_factor": SCALING_FACTOR})}
    write_tensors(work / "vae.safetensors", vae.state_dict(), metadata)
    return figures | vae_figures(load_vae(work)[0])


@torch.no_grad()
def scale_latents(vae: nn.Module, factor: float) -> None:
    """Multiplies an AutoencoderKL's latents by a factor; what it reconstructs stays the same."""
    vae.quant_conv.weight[:4] *= factor
    vae.quant_conv.bias[:4] *= factor
    vae.quant_conv.bias[4:] += 2 * math.log(factor)
    vae.post_quant_conv.weight /= factor


@torch.no_grad()
def _initialise(vae: nn.Module, images: Tensor) -> None:
    """Initial norms of `level_keeping_init`, latents of unit deviation, and little posterior noise."""
    level_keeping_init(vae.encoder, lambda: vae.encoder(images))
    moments = vae.encoder(images)
    vae.quant_conv.weight[:4] /= vae.quant_conv(moments)[:, :4].std()
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-5.0] * 4))
    latents = vae.encode(images).latent_dist.mean
    level_keeping_init(vae.decoder, lambda: vae.decoder(vae.post_quant_conv(latents)))


def run_steps(
    name: str,
    network: nn.Module,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    step: Callable[[int], float],
    steps: int,
    rate: float,
    work: Path,
    after: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """The training loop of every part: cosine rate, a state file about every two minutes, a log line every 50 steps.

    Args:
        name: Of the part, for its state file and its log lines.
        step: Runs forward and backward of a step by its number; returns the loss to log.
        rate: Peak learning rate, multiplied by a parameter group's "scale".
        work: Folder of the state file, from which an unfinished training resumes.
        after: Called with the number of finished steps, after each.

    Returns:
        "steps", the mean "loss" of the last 50, and "seconds", those of runs before a stop included.
    """
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers
    state_file = work / f"{name}.state.pt"
    first, before, loss = _load_state(state_file, network, optimizers)
    mean, began = 0.0, time.monotonic()
    since = saved = began
    for number in range(first, steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = cosine_rate(number, steps, rate * group.get("scale", 1.0), 100)
        mean += step(number) / 50
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (number + 1) % 50 == 0:
            LOG.info("%s %d/%d: %.4f, %.3f s a step", name, number + 1, steps, mean, (time.monotonic() - since) / 50)
            loss, mean, since = mean, 0.0, time.monotonic()
        after(number + 1)
        if time.monotonic() - saved > SAVE_EVERY or number + 1 == steps:
            saved = time.monotonic()
            progress = {"done": number + 1, "seconds": before + saved - began, "loss": loss}
            _save_state(state_file, network, optimizers, progress)
    return {"steps": steps, "loss": loss, "seconds": before + saved - began if first < steps else before}


def _save_state(
    path: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], progress: dict[str, float]
) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    with atomic_path(path) as temporary:
        torch.save({"network": network.state_dict(), "optimizers": states} | progress, temporary)


def _load_state(
    path: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, float, float]:
    """Loads a state; returns the steps done, the seconds they took, and their last loss."""
    if not path.exists():
        return 0, 0.0, 0.0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["done"], state["seconds"], state["loss"]


def load_vae(work: Path) -> tuple[nn.Module, dict]:
    """The trained autoencoder (fp32, frozen) and its config with `scaling_factor`."""
    from diffusers import AutoencoderKL

    with safe_open(work / "vae.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    vae = AutoencoderKL(**config)
    vae.load_state_dict(tensors)
    return vae.eval().requires_grad_(False), config


@torch.no_grad()
def latents_of(vae: nn.Module, images: Tensor, scale: float) -> Tensor:
    """Posterior means of uint8 images, times the scaling factor: (N, 4, 16, 16)."""
    batches = (batch.float() / 127.5 - 1 for batch in images.split(32))
    return torch.cat([vae.encode(batch).latent_dist.mean * scale for batch in batches])


@torch.no_grad()
def decoded(vae: nn.Module, latents: Tensor, scale: float) -> Tensor:
    """Latents to images (N, 3, 128, 128) in 0..1."""
    return torch.cat([(vae.decode(batch / scale).sample / 2 + 0.5).clamp(0, 1) for batch in latents.split(32)])


def vae_figures(vae: nn.Module, count: int = 300) -> dict[str, float]:
    """Of reconstructed held-out drawings: mean absolute error (0..1), alignment, share of quality words read right."""
    scenes = [
        with_words(scene, random_words(generator(SEED, "words", i)))
        for i, scene in enumerate(held_out_scenes(count, SEED))
    ]
    images = pictures(scenes, SEED)
    rebuilt = decoded(vae, latents_of(vae, images, 1.0), 1.0)
    error = functional.l1_loss(rebuilt, images.float() / 255).item()
    return {"error": error, "alignment": alignment(rebuilt, scenes)["alignment"], **quality_shares(rebuilt, scenes)}
