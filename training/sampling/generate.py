"""Pictures from prompts with a model under training: for previews, reports and measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.protocols import Conditioning, TextEncoder, TextToImage
from .ddim import GuidanceSchedule, initial_noise, sample
from .guidance import Guidance

TextOf = Callable[[str], Conditioning]
"""prompt -> conditioning of batch 1 before the text encoder's projection."""


def encode_with(encoder: TextEncoder) -> TextOf:
    """A function that encodes a prompt anew at each call."""
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
    """One latent (C, h, w) for each prompt, drawn by DDIM; the batch size changes nothing but rounding.

    Args:
        model: draws the pictures.
        prompts: one for each picture.
        width: of the pictures, in pixels.
        height: likewise.
        steps: number of sampler steps.
        cfg: guidance scale; 1 draws without guidance.
        seed: picture i starts from noise that depends on (seed, i) alone.
        batch_size: pictures drawn at a time.
        indices: numbers to use in place of the prompts' positions for the noise.
        text_of: encodes a prompt, by default `encode_with` the model's text encoder; "" is the negative prompt.
        on_batch: called with pictures done and in all after every sampler step; may raise to cancel.
    """
    denoiser, cells = model.denoiser, model.autoencoder.downscale
    text_of = text_of or encode_with(model.text_encoder)
    indices = range(len(prompts)) if indices is None else indices
    drawn: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        numbers = indices[start : start + len(batch)]
        noise = [initial_noise(denoiser, height // cells, width // cells, seed, number) for number in numbers]
        positive = [text_of(prompt) for prompt in batch]
        guidance = _guidance(model, positive, [text_of("")] * len(batch), cfg)
        on_step = None if on_batch is None else (lambda _, done=start: on_batch(done, len(prompts)))
        drawn += sample(denoiser, torch.stack(noise).to(denoiser.device), guidance, steps, on_step)
        if on_batch:
            on_batch(len(drawn), len(prompts))
    return drawn


def _guidance(
    model: TextToImage, positive: list[Conditioning], negative: list[Conditioning], cfg: float
) -> GuidanceSchedule:
    """Guidance by encoded prompts, projected once, or at every step where the projection depends on the time."""
    encoder, device = model.text_encoder, model.denoiser.device
    positive, negative = ([states.to(device) for states in part] for part in (positive, negative))

    def at(time: Tensor | None = None) -> Guidance:
        time = None if time is None else time[None]
        both = (Conditioning.cat(encoder.project(states, time) for states in part) for part in (positive, negative))
        return Guidance(*both, cfg)

    timed = encoder.projection is not None and encoder.projection.bands
    return at if timed else at()
