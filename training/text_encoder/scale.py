"""Measures the std of a text encoder's output over its real tokens, and scales it to a target.

A denoiser's cross-attention was trained on contexts of a certain std (CLIP's). That of other encoders differs
several-fold between checkpoints, so it is measured. Real tokens are the prompt's tokens and the end token (CLIP's first
one), without start token and pads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..models.protocols import TextEncoder
from .prompts import PROMPTS

Encoder = TypeVar("Encoder", bound=TextEncoder)
RealTokens = Callable[[Any], Tensor]
QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of a text encoder's output over the real tokens of some prompts; std and mean over all elements."""

    std: float
    mean: float
    prompt_std: tuple[float, ...]
    """Std within each prompt."""
    token_rms: tuple[float, ...]
    """Root mean square of each token's output."""

    def rms_quantiles(self) -> tuple[float, float, float]:
        """5 %, 50 % and 95 % quantile of the RMS per token."""
        low, middle, high = torch.tensor(self.token_rms, dtype=torch.float64).quantile(QUANTILES).tolist()
        return low, middle, high

    def scaled(self, factor: float) -> TokenStatistics:
        """Those of the output multiplied by a factor above 0."""
        prompts, tokens = (tuple(factor * value for value in values) for values in (self.prompt_std, self.token_rms))
        return TokenStatistics(factor * self.std, factor * self.mean, prompts, tokens)

    def text(self) -> str:
        """std per prompt and RMS per token, on one line."""
        prompts = torch.tensor(self.prompt_std, dtype=torch.float64)
        spread = f"{prompts.mean():.4f} +- {prompts.std(correction=0):.4f} over {len(prompts)} prompts"
        low, middle, high = (f"{value:.4f}" for value in self.rms_quantiles())
        return f"std {self.std:.4f}, per prompt {spread}; RMS per token {middle} (5 % to 95 %: {low} to {high})"


@dataclass(frozen=True)
class ScaleReport:
    """The result of scaling an output by `factor` to the std `target`; `after` follows from what was measured."""

    target: float
    factor: float
    before: TokenStatistics
    after: TokenStatistics

    def text(self) -> str:
        """The report in two lines."""
        change = f"std of real tokens: {self.before.std:.4f} -> {self.after.std:.4f} (target {self.target:.4f})"
        return f"{change}\nfactor: {self.factor:.4f} over {len(self.after.prompt_std)} prompts"


@torch.no_grad()
def token_statistics(
    encoder: TextEncoder, prompts: Sequence[str] = PROMPTS, real_tokens: RealTokens | None = None
) -> TokenStatistics:
    """Measures a text encoder's output over some prompts, encoded one at a time.

    Args:
        encoder: The text encoder.
        prompts: The prompts.
        real_tokens: Tokens -> (B, L) bool, the positions that count. Default: the encoder's method `real_tokens`, else
            the mask of its conditioning, else all positions.

    Raises:
        ValueError: There are no prompts, or the output is not finite.
    """
    if not prompts:
        raise ValueError("prompts is empty; expected at least one line to measure the text encoder on")
    real_tokens = real_tokens or getattr(encoder, "real_tokens", None)
    rows = [_real_states(encoder, prompt, real_tokens) for prompt in prompts]
    states = torch.cat(rows)
    if not torch.isfinite(states).all():
        raise ValueError("the text encoder returns infinite or NaN states; use dtype fp32 or bf16, or another file")
    return TokenStatistics(
        std=states.std(unbiased=False).item(),
        mean=states.mean().item(),
        prompt_std=tuple(row.std(unbiased=False).item() for row in rows),
        token_rms=tuple(states.square().mean(dim=1).sqrt().tolist()),
    )


def token_std(encoder: TextEncoder, prompts: Sequence[str] = PROMPTS, real_tokens: RealTokens | None = None) -> float:
    """Std over all elements of real tokens; arguments and errors as `token_statistics`."""
    return token_statistics(encoder, prompts, real_tokens).std


def scale_to(
    encoder: Encoder, target_std: float, prompts: Sequence[str] = PROMPTS, real_tokens: RealTokens | None = None
) -> tuple[Encoder, ScaleReport]:
    """Scales a text encoder's output to a std; returns the new encoder (`encoder.scaled`) and a report.

    Args:
        encoder: The text encoder; it is not changed.
        target_std: Std over all elements of real tokens, above 0.
        prompts: Prompts to measure on.
        real_tokens: See `token_statistics`.

    Raises:
        ValueError: The target is not positive, or the output is constant. Also the errors of `token_statistics`.
    """
    if not (math.isfinite(target_std) and target_std > 0):
        raise ValueError(f"target_std is {target_std}; expected a positive number (SD1.5's CLIP is near 0.9)")
    before = token_statistics(encoder, prompts, real_tokens)
    if before.std == 0:
        raise ValueError("the text encoder returns the same value everywhere; its weights or projection are empty")
    factor = target_std / before.std
    return encoder.scaled(factor), ScaleReport(target_std, factor, before, before.scaled(factor))


def scale_to_reference(
    encoder: Encoder,
    reference: TextEncoder,
    prompts: Sequence[str] = PROMPTS,
    *,
    reference_real_tokens: RealTokens | None = None,
) -> tuple[Encoder, ScaleReport]:
    """Scales a text encoder's output to the std of another one, such as the model's CLIP, on the same prompts.

    Args:
        encoder: The text encoder; it is not changed.
        reference: The other one.
        prompts: Prompts to measure both on.
        reference_real_tokens: `real_tokens` of the reference, see `token_statistics`.
    """
    return scale_to(encoder, token_std(reference, prompts, reference_real_tokens), prompts)


def clip_real_tokens(ids: Tensor | Sequence[Sequence[int]], end_token: int) -> Tensor:
    """(B, L) bool for CLIP tokens: True after the start token, up to and including the first end token."""
    ids = torch.as_tensor(ids)
    ends = (ids == end_token).long()
    real = ends.cumsum(dim=1) - ends == 0
    real[:, 0] = False
    return real


def _real_states(encoder: TextEncoder, prompt: str, real_tokens: RealTokens | None) -> Tensor:
    """Output of one prompt's real tokens, (n, width) in float64."""
    tokens = encoder.tokenize([prompt])
    conditioning = encoder.encode(tokens)
    mask = real_tokens(tokens) if real_tokens is not None else conditioning.mask
    states = conditioning.context.cpu().double()
    return states.flatten(0, 1) if mask is None else states[mask.cpu()]


def scale_context(context: Tensor, target_std: float) -> Tensor:
    """Scales a context (B, L, D) to a std over all its elements. Raises ValueError for a constant context."""
    std = context.float().std(correction=0).item()
    if std == 0:
        raise ValueError("the conditioning is the same value everywhere; there is nothing to scale")
    return context * (target_std / std)
