"""A projection in closed form: ridge regression from a T5's states to those of the text encoder it replaces.

The UNet then hears something like its old encoder from the first step. The two tokenize differently, so a T5 token's
target is the old encoder's state at the same share of the prompt's words; end token goes to end token, and attended
pads to pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .projection import Projection


class Encoder(Protocol):
    """What fitting needs of a text encoder: states of one prompt and which of them are words and end token."""

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(L, D) states and (L,) bool: words and end token, without start token and pads."""
        ...

    def pooled(self, prompt: str) -> Tensor | None:
        """(P,) pooled output of one prompt; None where there is none. Asked of the reference alone."""
        ...


class CoreStates:
    """`Encoder` over a text encoder of the core: its output, or what its backbone returns before the projection."""

    def __init__(self, encoder, *, before_projection: bool):
        self._encode = encoder.backbone if before_projection else encoder.encode
        self._real = encoder.backbone_tokens if before_projection else encoder.real_tokens
        self._encoder = encoder

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokens = self._encoder.tokenize([prompt])
        return self._encode(tokens).context[0], self._real(tokens)[0]

    def pooled(self, prompt: str) -> Tensor | None:
        pooled = self._encode(self._encoder.tokenize([prompt])).pooled
        return None if pooled is None else pooled[0]


@dataclass(frozen=True)
class FitReport:
    """explained: share of the targets' variance on held-out prompts (1 is perfect, 0 the mean; below 0 is worse).

    pooled_explained: the same for the pooled output; None without one."""

    explained: float
    prompts: int
    tokens: int
    held_out: int
    pooled_explained: float | None = None

    def text(self) -> str:
        """One line for people."""
        fitted = f"fitted on {self.prompts} prompts ({self.tokens} tokens)"
        text = f"{fitted}; explains {self.explained:.1%} of the variance on {self.held_out} held-out prompts"
        if self.pooled_explained is not None:
            text += f", and {self.pooled_explained:.1%} of the pooled output's"
        return text


@torch.no_grad()
def fit_projection(
    encoder: Encoder, reference: Encoder, prompts: Sequence[str], *, ridge: float = 1e-3, pooled_width: int = 0
) -> tuple[Projection, FitReport]:
    """The linear projection with bias that maps `encoder`'s states nearest to `reference`'s, and how near it gets.

    ridge: penalty on the weights in units of the states' mean variance (Hoerl & Kennard 1970). Every fifth prompt is
    held out to measure, and used again for the projection returned. pooled_width above 0: the pooled map is fitted too,
    from each prompt's mean to the reference's pooled output. Raises ValueError for under 10 different prompts, or a
    reference without such a pooled output.
    """
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < 10:
        raise ValueError(f"number of different prompts is {len(prompts)}; expected at least 10 to fit a projection on.")
    states = [encoder.states(prompt) for prompt in prompts]
    pairs = [aligned(*own, *reference.states(prompt)) for own, prompt in zip(states, prompts, strict=True)]
    weight, bias, explained = _fit(pairs, ridge)
    projection = Projection(weight.shape[1], weight.shape[0], bias=True, pooled_width=pooled_width)
    _fill(projection.linear, weight, bias)
    pooled_explained = None
    if pooled_width:
        targets = [_pooled_target(reference, prompt, pooled_width) for prompt in prompts]
        means = [own[real].double().cpu().mean(0, keepdim=True) for own, real in states]
        weight, bias, pooled_explained = _fit(list(zip(means, targets, strict=True)), ridge)
        _fill(projection.pooled, weight, bias)
    tokens = sum(len(x) for x, _ in pairs)
    return projection, FitReport(explained, len(prompts), tokens, len(pairs[::5]), pooled_explained)


def _fit(pairs: Sequence[tuple[Tensor, Tensor]], ridge: float) -> tuple[Tensor, Tensor, float]:
    """Weight and bias over all pairs, and the share of variance explained when every fifth is held out."""
    weight, bias = _solve([pair for index, pair in enumerate(pairs) if index % 5], ridge)
    x, y = (torch.cat(part) for part in zip(*pairs[::5], strict=True))
    error = (x @ weight.T + bias - y).square().sum() / (y - y.mean(0)).square().sum()
    return *_solve(pairs, ridge), 1 - error.item()


def _fill(linear: torch.nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _pooled_target(reference: Encoder, prompt: str, width: int) -> Tensor:
    """(1, width) float64. Raises ValueError when the reference gives none of this width."""
    pooled = reference.pooled(prompt)
    if pooled is None or pooled.shape != (width,):
        found = "none" if pooled is None else f"one of {tuple(pooled.shape)}"
        raise ValueError(f"the reference's pooled output is {found}; expected {width}. Use the CLIP of an SDXL model.")
    return pooled.double().cpu()[None]


def aligned(states: Tensor, real: Tensor, target: Tensor, target_real: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D_in) states and (n, D_out) targets of one prompt, float64: words by share, end to end, pads to pads."""
    states, target = states.double().cpu(), target.double().cpu()
    words, goals = states[real][:-1], target[target_real][:-1]
    x, y = [states[real][-1:]], [target[target_real][-1:]]
    if len(words) and len(goals):
        places = ((torch.arange(len(words)) + 0.5) / len(words) * len(goals) - 0.5).clamp(0, len(goals) - 1)
        low = places.floor().long()
        high = (low + 1).clamp(max=len(goals) - 1)
        share = (places - low)[:, None].double()
        x, y = [words, *x], [goals[low] * (1 - share) + goals[high] * share, *y]
    pads, goal_pads = states[_after(real)], target[_after(target_real)]
    if len(pads) and len(goal_pads):
        places = (torch.arange(len(pads)) * len(goal_pads) // len(pads)).long()
        x, y = [*x, pads], [*y, goal_pads[places]]
    return torch.cat(x), torch.cat(y)


def _after(real: Tensor) -> Tensor:
    """Positions behind the last real one."""
    last = int(real.nonzero()[-1])
    return torch.arange(len(real)) > last


def _solve(pairs: Sequence[tuple[Tensor, Tensor]], ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with an unpenalised bias: (D_out, D_in) and (D_out,)."""
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean
