"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), of clean latents and of network outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.protocols import Conditioning, Denoiser

Prediction = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, C, h, w), sigma (B,), conditioning of batch B) -> (B, C, h, w)."""


@dataclass(frozen=True)
class Guidance:
    """The conditionings of a sampler step and their weight; see `guided`."""

    positive: Conditioning
    negative: Conditioning | None = None
    """Usually of the empty prompt; None: no guidance."""
    cfg: float = 1.0
    """Guidance scale, 1 + w in the paper; 1: no guidance."""

    def detached(self) -> Guidance:
        """The same values as leaves of a new graph that require a gradient."""
        negative = None if self.negative is None else _leaves(self.negative)
        return Guidance(_leaves(self.positive), negative, self.cfg)

    def images(self, numbers: slice) -> Guidance:
        """The guidance of some of the batch's images, views of these tensors."""
        negative = None if self.negative is None else self.negative.prompts(numbers)
        return Guidance(self.positive.prompts(numbers), negative, self.cfg)

    @property
    def tensors(self) -> list[Tensor]:
        """Contexts and pooled outputs, the positive's first."""
        both = [self.positive] if self.negative is None else [self.positive, self.negative]
        return [tensor for part in both for tensor in (part.context, part.pooled) if tensor is not None]


def _leaves(conditioning: Conditioning) -> Conditioning:
    pooled = None if conditioning.pooled is None else conditioning.pooled.detach().requires_grad_(True)
    return Conditioning(conditioning.context.detach().requires_grad_(True), pooled, conditioning.mask)


def guided(predict: Prediction, x: Tensor, sigma: Tensor, guidance: Guidance) -> Tensor:
    """negative + cfg * (positive - negative), arXiv 2207.12598, eq. 6, of a prediction; both in one batch of 2 B."""
    if guidance.negative is None or guidance.cfg == 1.0:
        return predict(x, sigma, guidance.positive)
    both = Conditioning.cat([guidance.positive, guidance.negative])
    positive, negative = predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return negative + guidance.cfg * (positive - negative)


def guided_latent(denoiser: Denoiser, x: Tensor, sigma: Tensor, guidance: Guidance) -> Tensor:
    """The clean latent (B, C, h, w) estimated from x under guidance; sigma: (B,)."""

    def latent(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser.denoised(x, sigma, denoiser.predict(x, sigma, conditioning))

    return guided(latent, x, sigma, guidance)
