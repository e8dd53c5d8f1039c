"""A projection in closed form, from a T5's states to those of the text encoder it replaces.

The UNet then hears something like its old encoder from the first step. The two tokenize differently, so a T5 token's
target is the old encoder's state at the same share of the prompt's words; end token goes to end token, and attended
pads to pads. "ridge" comes nearest to these targets and shrinks what it cannot predict; "mean-covariance" comes as near
as it can while its outputs keep the mean and the covariance of the old encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .projection import Projection

Pair = tuple[Tensor, Tensor]
"""(n, D_in) states and (n, D_out) targets of one prompt, see `align_states`."""
ROUNDING = 1e-6
"""Share of the largest spread under which a direction is float32's rounding."""


class Encoder(Protocol):
    """What fitting needs of a text encoder: states of one prompt and which of them are words and end token."""

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(L, D) states and (L,) bool: words and end token, without start token and pads."""
        ...

    def pooled(self, prompt: str) -> Tensor | None:
        """(P,) pooled output of one prompt; None where there is none. Asked of the reference alone."""
        ...


class EncoderStates:
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
class HeldOut:
    """How a map does on prompts that it was not fitted on.

    explained: share of the targets' variance (1 is perfect, 0 the mean; below 0 is worse). std: of the outputs, as a
    share of the reference's. covariance: Frobenius distance of the two covariances as a share of the reference's norm.
    """

    explained: float
    std: float
    covariance: float


@dataclass(frozen=True)
class FitReport:
    """The fit by `method` on `prompts` prompts of `tokens` T5 tokens, measured on `held_out` of them by another fit.

    explained, std, covariance: see `HeldOut`. pooled_explained: `explained` of the pooled output; None without one."""

    method: str
    explained: float
    std: float
    covariance: float
    prompts: int
    tokens: int
    held_out: int
    pooled_explained: float | None = None

    def text(self) -> str:
        """One line for people."""
        fitted = f"{self.method}: fitted on {self.prompts} prompts ({self.tokens} tokens)"
        text = f"{fitted}; explains {self.explained:.1%} of the variance on {self.held_out} held-out prompts"
        if self.pooled_explained is not None:
            text += f", and {self.pooled_explained:.1%} of the pooled output's"
        return f"{text}; there its std is {self.std:.3f} of the reference's, its covariance {self.covariance:.1%} off"


@torch.no_grad()
def fit_projection(
    encoder: Encoder,
    reference: Encoder,
    prompts: Sequence[str],
    *,
    ridge: float | None = None,
    pooled_width: int = 0,
    method: str = "ridge",
) -> tuple[Projection, FitReport]:
    """The linear projection with bias that `method` finds from `encoder`'s states to `reference`'s, and its figures.

    method: "ridge" (`ridge_regression`) or "mean-covariance" (`match_covariance`); ridge: see there, None for its
    default. Every fifth prompt is held out to measure, and used again for the projection returned. pooled_width above
    0: the pooled map is fitted too, from each prompt's mean to the reference's pooled output. Raises ValueError for
    another method, under 10 different prompts, or a reference without such a pooled output.
    """
    if method not in SOLVERS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(SOLVERS)}.")
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < 10:
        raise ValueError(f"number of different prompts is {len(prompts)}; expected at least 10 to fit a projection on.")
    solve = SOLVERS[method] if ridge is None else partial(SOLVERS[method], ridge=ridge)
    states = [encoder.states(prompt) for prompt in prompts]
    pairs, goals = [], []
    for own, prompt in zip(states, prompts, strict=True):
        target = reference.states(prompt)
        pairs.append(align_states(*own, *target))
        goals.append(reference_states(*target, pads=bool(_after(own[1]).any())))
    weight, bias, figures = _fit(pairs, goals, solve)
    projection = Projection(weight.shape[1], weight.shape[0], bias=True, pooled_width=pooled_width)
    _fill(projection.linear, weight, bias)
    pooled_explained = None
    if pooled_width:
        goals = [_pooled_target(reference, prompt, pooled_width) for prompt in prompts]
        means = [own[real].double().cpu().mean(0, keepdim=True) for own, real in states]
        weight, bias, pooled = _fit(list(zip(means, goals, strict=True)), goals, solve)
        _fill(projection.pooled, weight, bias)
        pooled_explained = pooled.explained
    counts = {"prompts": len(prompts), "tokens": sum(len(x) for x, _ in pairs), "held_out": len(pairs[::5])}
    return projection, FitReport(method, **vars(figures), **counts, pooled_explained=pooled_explained)


def _fit(pairs: Sequence[Pair], goals: Sequence[Tensor], solve: Callable) -> tuple[Tensor, Tensor, HeldOut]:
    """Weight and bias over all pairs, and the figures when every fifth is held out."""
    others = [index for index in range(len(pairs)) if index % 5]
    weight, bias = solve([pairs[i] for i in others], [goals[i] for i in others])
    x, y = (torch.cat(part) for part in zip(*pairs[::5], strict=True))
    outputs, wanted = x @ weight.T + bias, torch.cat(goals[::5])
    error = (outputs - y).square().sum() / (y - y.mean(0)).square().sum()
    std = outputs.std(correction=0) / wanted.std(correction=0)
    own, other = _covariance(outputs), _covariance(wanted)
    covariance = torch.linalg.norm(own - other) / torch.linalg.norm(other)
    return *solve(pairs, goals), HeldOut(1 - error.item(), std.item(), covariance.item())


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


def align_states(states: Tensor, real: Tensor, target: Tensor, target_real: Tensor) -> tuple[Tensor, Tensor]:
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


def reference_states(target: Tensor, real: Tensor, *, pads: bool) -> Tensor:
    """(n, D) float64: the reference's own words and end token of one prompt, and its pads where the T5 has some too."""
    target = target.double().cpu()
    return torch.cat([target[real], target[_after(real)]]) if pads else target[real]


def _after(real: Tensor) -> Tensor:
    """Positions behind the last real one."""
    last = int(real.nonzero()[-1])
    return torch.arange(len(real)) > last


def ridge_regression(pairs: Sequence[Pair], goals: Sequence[Tensor], *, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight (D_out, D_in) and unpenalised bias (D_out,) nearest to the pairs' targets; `goals` are not used.

    ridge: penalty on the weights in units of the states' mean variance (Hoerl & Kennard 1970).
    """
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean


def match_covariance(pairs: Sequence[Pair], goals: Sequence[Tensor], *, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight W (D_out, D_in) and bias (D_out,) with which the pairs' states get the mean and the covariance of `goals`.

    W = C_y^(1/2) R C_x^(-1/2), whitening and colouring, has that covariance for every R with orthonormal rows. R is the
    one that comes nearest to the pairs' targets (orthogonal Procrustes, Schoenemann 1966), regularised as in
    `ridge_regression`. With that regression's W_0 and its outputs' covariance C_0 this is
    W = C_y^(1/2) (C_y^(1/2) C_0 C_y^(1/2))^(-1/2) C_y^(1/2) W_0, the shortest way from C_0 to C_y (Gelbrich 1990).
    Where C_0 has fewer directions than C_y, the covariance is matched along the latter's largest.
    """
    x, goal = torch.cat([x for x, _ in pairs]), torch.cat(list(goals))
    start, _ = ridge_regression(pairs, goals, ridge=ridge)
    outputs = torch.linalg.qr((x - x.mean(0)) @ start.T / len(x) ** 0.5, mode="r")[1]  # fewer rows, the same covariance
    variances, axes = torch.linalg.eigh(_covariance(goal))
    rank = min(torch.linalg.matrix_rank(part, rtol=ROUNDING).item() for part in (outputs, goal - goal.mean(0)))
    kept = slice(len(axes) - rank, None)
    root = axes[:, kept] * variances[kept].sqrt()
    _, spread, turn = torch.linalg.svd(outputs @ root, full_matrices=False)
    weight = root @ (turn.T / spread) @ turn @ root.T @ start
    return weight, goal.mean(0) - weight @ x.mean(0)


def _covariance(values: Tensor) -> Tensor:
    """(D, D) of (n, D)."""
    values = values - values.mean(0)
    return values.T @ values / len(values)


SOLVERS = {"ridge": ridge_regression, "mean-covariance": match_covariance}
"""By name: (pairs, goals, ridge) -> weight and bias."""
