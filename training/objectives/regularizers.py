"""What holds a model that is tuned near the frozen one: by the network's outputs, and by what the text encoder says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..models.protocols import Conditioning, Denoiser
from ..sampling.guidance import Guidance
from ..sampling.rollout import Step, guided_output


class NearFrozen:
    """weight x mean over `count` steps of mean((out - out_frozen)^2), per sample: both models' guided outputs on the
    tuned one's latents, which are taken as given. weights: (B,).

    The regulariser of NVIDIA's DRaFT+ (NeMo-Aligner, `kl_coeff`): for Gaussian steps of equal variance it is their KL
    divergence up to a factor. frozen: what the frozen text encoder says of the batch. released: makes the network what
    it was (`Trainable.disabled`).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        frozen: Guidance,
        disabled: Callable[[], AbstractContextManager[None]],
        weights: Tensor,
        count: int,
    ):
        self._denoiser, self._frozen, self._released = denoiser, frozen, disabled
        self._weights, self._count = weights, count
        self.error = torch.zeros(len(frozen.positive))
        """(B,) the mean squared error over the steps gone through so far, unweighted."""

    def gradient(self, x: Tensor, step: Step, out: Tensor) -> Tensor:
        """Of minus the weighted error at `out`, the tuned model's output (B, C, h, w) at latents x."""
        with torch.no_grad(), self._released():
            apart = out - guided_output(self._denoiser, x, step, self._frozen)
        self.error = self.error + apart.square().flatten(1).mean(1).cpu() / self._count
        return apart * self._weights.to(apart).view(-1, 1, 1, 1) * (-2 / (apart[0].numel() * self._count))


def drift(tuned: Guidance, frozen: Guidance) -> Tensor:
    """(B,) how far encodings have moved, differentiable: squared distance over the frozen one's squared length.

    Over attended tokens; the mean of context and pooled, and of the prompt and, under guidance, the empty one.
    """
    pairs = [(tuned.positive, frozen.positive)]
    if tuned.negative is not None:
        pairs.append((tuned.negative, frozen.negative))
    parts = [part for pair in pairs for part in _moved(*pair)]
    return torch.stack(parts).mean(0)


def _moved(new: Conditioning, old: Conditioning) -> list[Tensor]:
    both = [(new.context, old.context)]
    if new.mask is not None:
        attended = new.mask[..., None].to(new.context)
        both = [(new.context * attended, old.context * attended)]
    if new.pooled is not None:
        both.append((new.pooled, old.pooled))
    return [_square(a.float() - b.float()) / _square(b.float()).clamp(min=1e-12) for a, b in both]


def _square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)
