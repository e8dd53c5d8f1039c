"""Pictures from prompts through the model view: for previews, reports and measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.protocols import Conditioning, TextEncoder, TextToImage
from .ddim import ConditioningSchedule, initial_noise, sample

TextOf = Callable[[str], Conditioning]


def encode_with(encoder: TextEncoder) -> TextOf:
    """prompt -> Conditioning of batch 1 before the projection, encoded anew each time."""
    return lambda prompt: encoder.backbone(encoder.tokenize([prompt]))


def draw(model: TextToImage, prompts: list[str], **options) -> list[Tensor]:
    """One picture (3, height, width) in 0..1 for each prompt; options as `draw_latents`."""
    return decode(model, draw_latents(model, prompts, **options))


@torch.no_grad()
def decode(model: TextToImage, latents: list[Tensor], on_image: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Pictures (3, H, W) in 0..1 on the CPU, decoded one by one; on_image is called after each, and may raise."""
    images = []
    for latent in latents:
        images.append(model.autoencoder.decode(latent[None])[0].float().cpu())
        on_image()
    return images


@torch.no_grad()
def draw_latents(
    model: TextToImage,
    prompts: list[str],
    *,
    width: int,
    height: int,
    steps: int,
    cfg: float,
    seed: int,
    batch_size: int = 32,
    indices: Sequence[int] | None = None,
    text_of: TextOf | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """One latent for each prompt of a width x height picture; latent i always starts from noise (seed, i).

    indices: other names of the latents' noise than their places.
    text_of: as `heard_by` gives it, the default.
    on_batch(done, total) is called after every sampler step and may raise to cancel.
    """
    denoiser, cells = model.denoiser, model.autoencoder.downscale
    text_of = text_of or encode_with(model.text_encoder)
    indices = range(len(prompts)) if indices is None else indices
    drawn: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        names = indices[start : start + len(part)]
        noise = [initial_noise(denoiser, height // cells, width // cells, seed, name) for name in names]
        cond = _heard(model, [text_of(prompt) for prompt in part])
        uncond = _heard(model, [text_of("")] * len(part))
        on_step = None if on_batch is None else (lambda _, done=start: on_batch(done, len(prompts)))
        drawn += sample(
            denoiser, torch.stack(noise).to(denoiser.device), cond, uncond, steps=steps, cfg=cfg, on_step=on_step
        )
        if on_batch:
            on_batch(len(drawn), len(prompts))
    return drawn


def _heard(model: TextToImage, states: list[Conditioning]) -> ConditioningSchedule:
    """What the denoiser hears of encoded prompts: always the same, or a function of the time, where that matters."""
    encoder, device = model.text_encoder, model.denoiser.device
    states = [one.to(device) for one in states]

    def at(time: Tensor) -> Conditioning:
        return Conditioning.cat(encoder.project(one, time[None]) for one in states)

    timed = encoder.projection is not None and encoder.projection.bands
    return at if timed else Conditioning.cat(encoder.project(one) for one in states)
