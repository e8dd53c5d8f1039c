"""Constraints that hold a tuned model near the frozen one: by the network's outputs, and by the text's encodings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..models.protocols import Conditioning, Denoiser
from ..sampling.guidance import Guidance
from ..sampling.rollout import Step, guided_output


class OutputConstraint:
    """weight x mean over `count` sampler steps of mean((out - out_frozen)^2), for each sample.

    Both are guided outputs on the tuned model's latents, which count as given. This is the regulariser of NVIDIA's
    DRaFT+ (NeMo-Aligner, `kl_coeff`): for Gaussian steps of equal variance it is the KL divergence of the steps up to a
    factor.

    Args:
        denoiser: the network, with the tuned weights attached.
        frozen: the batch's conditioning by the frozen text encoder.
        disabled: makes the network the frozen one (`Trainable.disabled`).
        weights: (B,), on the denoiser's device.
        count: number of sampler steps.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        frozen: Guidance,
        disabled: Callable[[], AbstractContextManager[None]],
        weights: Tensor,
        count: int,
    ):
        self._denoiser, self._frozen, self._disabled = denoiser, frozen, disabled
        self._weights, self._count = weights, count
        self.error = torch.zeros(len(frozen.positive), device=denoiser.device)
        """(B,) mean squared error over the steps so far, unweighted."""

    def gradient(self, x: Tensor, step: Step, output: Tensor, images: slice = slice(None)) -> Tensor:
        """The gradient of minus the weighted error with respect to `output`, and adds the step's error to `error`.

        Args:
            x: (B, C, h, w) latents that the step begins with.
            step: the sampler step.
            output: (B', C, h, w) guided output of the tuned model for `images` of x.
            images: the images' numbers in the batch.
        """
        with torch.no_grad(), self._disabled():
            frozen = guided_output(self._denoiser, x[images], step.images(images), self._frozen.images(images))
            difference = output - frozen
        self.error[images] += difference.square().flatten(1).mean(1) / self._count
        weights = self._weights[images].to(difference).view(-1, 1, 1, 1)
        return difference * weights * (-2 / (difference[0].numel() * self._count))


def drift(tuned: Guidance, frozen: Guidance) -> Tensor:
    """(B,) relative change of encodings, differentiable: squared distance over the frozen encoding's squared length.

    Over attended tokens; the mean over context and pooled output, and over the prompt and, under guidance, the empty
    prompt.
    """
    pairs = [(tuned.positive, frozen.positive)]
    if tuned.negative is not None:
        pairs.append((tuned.negative, frozen.negative))
    parts = [part for pair in pairs for part in _relative_changes(*pair)]
    return torch.stack(parts).mean(0)


def _relative_changes(new: Conditioning, old: Conditioning) -> list[Tensor]:
    """(B,) of the context, and of the pooled output if there is one.

    The new context may be longer, where it was encoded together with longer prompts; the mask hides the rest.
    """
    length = old.context.shape[1]
    pairs = [(new.context[:, :length], old.context)]
    if new.mask is not None:
        attended = new.mask[:, :length, None].to(new.context)
        pairs = [(new.context[:, :length] * attended, old.context * attended)]
    if new.pooled is not None:
        pairs.append((new.pooled, old.pooled))
    return [_squared_length(a.float() - b.float()) / _squared_length(b.float()).clamp(min=1e-12) for a, b in pairs]


def _squared_length(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)
