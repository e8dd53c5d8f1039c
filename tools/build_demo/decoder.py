"""Trains the demo autoencoder's decoder to draw sharper, with the encoder, and so every latent, unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ...training.common.files import write_tensors
from ...training.common.foreign import read_tensors
from ...training.common.rng import generator
from ...training.demo.scenes import SIDE, training_scenes
from .vae import SEED, latents_of, load_vae, pictures, run_steps

SCENES = 3000
CROP_STEPS, CROP_BATCH, CELLS = 900, 16, 8
FULL_STEPS, FULL_BATCH = 100, 6
LEARNING_RATE = 1e-3
SHAPE_WEIGHT = 3.0
LATENT_NOISE = 0.05
"""Standard deviation of the noise added to latents, relative to theirs: sampled latents are not exact either."""


def _crops(images: Tensor, latents: Tensor, index: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One 64-pixel crop per image, the one of three with the highest variance, and its latent cells."""
    pixels, cells = [], []
    for i in index.tolist():
        corners = torch.randint(SIDE // 8 - CELLS + 1, (3, 2), generator=rng).tolist()
        crops = [images[i, :, 8 * y : 8 * (y + CELLS), 8 * x : 8 * (x + CELLS)].float() / 255 for y, x in corners]
        busiest = max(range(3), key=lambda k: float(crops[k].std((1, 2)).sum()))
        y, x = corners[busiest]
        pixels.append(crops[busiest])
        cells.append(latents[i, :, y : y + CELLS, x : x + CELLS])
    return torch.stack(pixels), torch.stack(cells)


def _loss(vae: nn.Module, images: Tensor, latents: Tensor, border: int) -> tuple[Tensor, float]:
    """Absolute error of pixels and of their gradients, with shapes weighted up and without the crop's border."""
    with torch.autocast("cpu", torch.bfloat16):
        output = vae.decode(latents).sample
    unusual = (images - images.flatten(2).median(2).values[..., None, None]).abs().amax(1, keepdim=True) > 0.12
    error = ((output.float() + 1) / 2 - images) * (1 + SHAPE_WEIGHT * unusual)
    error = error[..., border : error.shape[2] - border, border : error.shape[3] - border]
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    absolute = error.abs().mean()
    return absolute + 0.5 * edges + error.square().mean(), float(absolute.detach())


def train_decoder(work: Path) -> None:
    """Trains decoder and `post_quant_conv` on fixed latents; rewrites `vae.safetensors` every 150 steps; resumes."""
    file = work / "vae.safetensors"
    vae, config = load_vae(work)
    if not (work / "decoder.state.pt").exists() and "sharpened" in read_tensors(file)[1]:
        return
    images = pictures(training_scenes(SCENES, SEED + 1000), SEED + 1000)
    latents = latents_of(vae, images, 1.0)
    deviation = latents.std((0, 2, 3))[:, None, None]
    trained = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-3)

    def step(number: int) -> float:
        rng = generator(SEED, "decoder step", number)
        full = number >= CROP_STEPS
        index = torch.randint(len(images), (FULL_BATCH if full else CROP_BATCH,), generator=rng)
        if full:
            batch, cells = images[index].float() / 255, latents[index]
        else:
            batch, cells = _crops(images, latents, index, rng)
        cells = cells + LATENT_NOISE * deviation * torch.randn(cells.shape, generator=rng)
        loss, absolute = _loss(vae, batch, cells, border=0 if full else 8)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        return absolute

    def after(done: int) -> None:
        if done % 150 == 0 or done == CROP_STEPS + FULL_STEPS:
            write_tensors(file, vae.state_dict(), {"config": json.dumps(config), "sharpened": str(done)})

    run_steps("decoder", trained, optimizer, step, CROP_STEPS + FULL_STEPS, LEARNING_RATE, work, after)
