"""How large a text encoder's outputs are, measured over its real tokens, and setting that to a target.

A denoiser's cross-attention was trained on states of one size (CLIP's); other encoders differ several-fold between
checkpoints, so the factor is measured, never assumed. Counted are real tokens only: for T5 the prompt and </s>; for
CLIP the prompt and its first end token, without start token and pads.
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
    """std and mean over all elements of real tokens of all prompts; what single prompts and tokens add to it."""

    std: float
    mean: float
    prompt_std: tuple[float, ...]
    """std within each prompt."""
    token_rms: tuple[float, ...]
    """Root mean square of each token's state."""

    def rms_quantiles(self) -> tuple[float, float, float]:
        """RMS per token that 5 %, half and 95 % of the tokens are under."""
        low, middle, high = torch.tensor(self.token_rms, dtype=torch.float64).quantile(QUANTILES).tolist()
        return low, middle, high

    def text(self) -> str:
        """std and RMS with their spread, on one line."""
        prompts = torch.tensor(self.prompt_std, dtype=torch.float64)
        spread = f"{prompts.mean():.4f} +- {prompts.std(correction=0):.4f} over {len(prompts)} prompts"
        low, middle, high = (f"{value:.4f}" for value in self.rms_quantiles())
        return f"std {self.std:.4f}, per prompt {spread}; RMS per token {middle} (5 % to 95 %: {low} to {high})"


@dataclass(frozen=True)
class ScaleReport:
    """What scaling changed: `factor` times the former output; `target` and both measurements."""

    target: float
    factor: float
    before: TokenStatistics
    after: TokenStatistics

    def text(self) -> str:
        """Two lines for people."""
        change = f"std of real tokens: {self.before.std:.4f} -> {self.after.std:.4f} (target {self.target:.4f})"
        return f"{change}\nfactor: {self.factor:.4f} over {len(self.after.prompt_std)} prompts"


@torch.no_grad()
def token_statistics(
    encoder: TextEncoder, prompts: Sequence[str] = PROMPTS, real_tokens: RealTokens | None = None
) -> TokenStatistics:
    """Statistics of an encoder's output over `prompts`, encoded one at a time.

    real_tokens: tokens -> (B, L) bool, which positions count; by default the encoder's own method of that name, else
    the mask of its conditioning, else all. Errors: ValueError for no prompts or non-finite states.
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
    """Standard deviation over all elements of real tokens; arguments and errors as `token_statistics`."""
    return token_statistics(encoder, prompts, real_tokens).std


def scale_to(
    encoder: Encoder, target_std: float, prompts: Sequence[str] = PROMPTS, real_tokens: RealTokens | None = None
) -> tuple[Encoder, ScaleReport]:
    """`encoder.scaled(factor)` with std `target_std` over `prompts`, and what changed; the encoder stays as it is."""
    if not (math.isfinite(target_std) and target_std > 0):
        raise ValueError(f"target_std is {target_std}; expected a positive number (SD1.5's CLIP is near 0.9)")
    before = token_statistics(encoder, prompts, real_tokens)
    if before.std == 0:
        raise ValueError("the text encoder returns the same value everywhere; its weights or projection are empty")
    factor = target_std / before.std
    scaled = encoder.scaled(factor)
    return scaled, ScaleReport(target_std, factor, before, token_statistics(scaled, prompts, real_tokens))


def scale_to_reference(
    encoder: Encoder,
    reference: TextEncoder,
    prompts: Sequence[str] = PROMPTS,
    *,
    reference_real_tokens: RealTokens | None = None,
) -> tuple[Encoder, ScaleReport]:
    """Scales an encoder to the std that `reference` (the model's original CLIP) has on the same prompts."""
    return scale_to(encoder, token_std(reference, prompts, reference_real_tokens), prompts)


def clip_real_tokens(ids: Tensor | Sequence[Sequence[int]], end_token: int) -> Tensor:
    """(B, L) bool for CLIP tokens: without the start token and what follows the first end token."""
    ids = torch.as_tensor(ids)
    ends = (ids == end_token).long()
    real = ends.cumsum(dim=1) - ends == 0
    real[:, 0] = False
    return real


def _real_states(encoder: TextEncoder, prompt: str, real_tokens: RealTokens | None) -> Tensor:
    """(number of real tokens, width) in float64."""
    tokens = encoder.tokenize([prompt])
    conditioning = encoder.encode(tokens)
    mask = real_tokens(tokens) if real_tokens is not None else conditioning.mask
    states = conditioning.context.double()
    return states.flatten(0, 1) if mask is None else states[mask.to(states.device)]


def scale_context(context: Tensor, target_std: float) -> Tensor:
    """A context (B, L, D) multiplied so that the std over all its elements is `target_std`.

    Errors: ValueError when the context is constant.
    """
    std = context.float().std(correction=0).item()
    if std == 0:
        raise ValueError("the conditioning is the same value everywhere; there is nothing to scale")
    return context * (target_std / std)
