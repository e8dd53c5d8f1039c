"""Fits a projection in closed form, from a T5's states to the outputs of the text encoder it replaces.

So the UNet gets a conditioning close to its old encoder's from the first step. The two encoders tokenize differently:
the target of a T5 token is the old encoder's output at the same relative position among the prompt's tokens, linearly
interpolated; the target of the end token is the end token's output, and of attended pads, pads. "ridge" minimises the
distance to these targets and shrinks what it cannot predict. "mean-covariance" minimises it under the condition that
the outputs have the mean and the covariance of the old encoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .projection import Projection

Pair = tuple[Tensor, Tensor]
"""(n, D_in) states and (n, D_out) targets of one prompt, see `align_states`."""
ROUNDING = 1e-6
"""Singular values below this share of the largest one are taken for float32 rounding errors."""
HOLD_OUT_EVERY = 5
"""Every fifth prompt is held out to evaluate a fit."""


class Encoder(Protocol):
    """What a fit needs from a text encoder."""

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(L, D) states of a prompt and (L,) bool: its tokens and the end token, without start token and pads."""
        ...

    def pooled(self, prompt: str) -> Tensor | None:
        """(P,) pooled output of a prompt, or None; only called for the reference."""
        ...


class EncoderStates:
    """`Encoder` for a `TextEncoder`: its output, or its backbone's output before the projection, on the CPU."""

    def __init__(self, encoder, *, before_projection: bool):
        self._encode = encoder.backbone if before_projection else encoder.encode
        self._real_tokens = encoder.backbone_tokens if before_projection else encoder.real_tokens
        self._encoder = encoder

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokens = self._encoder.tokenize([prompt])
        return self._encode(tokens).context[0].cpu(), self._real_tokens(tokens)[0].cpu()

    def pooled(self, prompt: str) -> Tensor | None:
        pooled = self._encode(self._encoder.tokenize([prompt])).pooled
        return None if pooled is None else pooled[0].cpu()


@dataclass(frozen=True)
class FitMetrics:
    """Quality of a fit, measured on held-out prompts.

    Args:
        explained: Share of the targets' variance that it explains: 1 is perfect, 0 is no better than the mean.
        std: Std of its outputs / std of the reference's outputs.
        covariance: Frobenius distance of the two covariances / norm of the reference's covariance.
    """

    explained: float
    std: float
    covariance: float


@dataclass(frozen=True)
class FitReport:
    """What `fit_projection` did, and the metrics of a second fit without the held-out prompts.

    Args:
        method: "ridge", "mean-covariance", or "distillation" of `distil`.
        explained: See `FitMetrics`.
        std: See `FitMetrics`.
        covariance: See `FitMetrics`.
        prompts: Number of prompts of the fit.
        tokens: Number of T5 tokens of the fit.
        held_out: Number of prompts held out for the metrics.
        pooled_explained: `explained` of the pooled output; None without one.
    """

    method: str
    explained: float
    std: float
    covariance: float
    prompts: int
    tokens: int
    held_out: int
    pooled_explained: float | None = None

    def text(self) -> str:
        """The report on one line."""
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
    """Fits a linear projection with bias from a text encoder's states to the outputs of another one.

    Every fifth prompt is held out for the metrics; the returned projection is fitted on all prompts.

    Args:
        encoder: The text encoder, before its projection.
        reference: The text encoder to imitate.
        prompts: At least 10 different prompts.
        ridge: Penalty of the ridge regression; None for the method's default.
        pooled_width: If above 0, a second map is fitted from the mean of each prompt's states to the reference's pooled
            output of this width.
        method: "ridge" (`ridge_regression`) or "mean-covariance" (`match_covariance`).

    Raises:
        ValueError: The method is unknown, there are too few prompts, or the reference has no such pooled output.
    """
    if method not in SOLVERS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(SOLVERS)}.")
    prompts = distinct(prompts)
    solve = SOLVERS[method] if ridge is None else partial(SOLVERS[method], ridge=ridge)
    states = [encoder.states(prompt) for prompt in prompts]
    pairs, outputs = _token_pairs(states, (reference.states(prompt) for prompt in prompts))
    weight, bias, metrics = _fit_and_evaluate(pairs, outputs, solve)
    projection = Projection(weight.shape[1], weight.shape[0], bias=True, pooled_width=pooled_width)
    _set_linear(projection.linear, weight, bias)
    pooled_explained = None
    if pooled_width:
        means = [state[real].cpu().double().mean(0, keepdim=True) for state, real in states]
        pooled_explained = fit_pooled(projection, means, reference, prompts, solve)
    tokens, held_out = sum(len(x) for x, _ in pairs), len(pairs[::HOLD_OUT_EVERY])
    counts = {"prompts": len(prompts), "tokens": tokens, "held_out": held_out}
    return projection, FitReport(method, **vars(metrics), **counts, pooled_explained=pooled_explained)


def distinct(prompts: Sequence[str]) -> list[str]:
    """Different prompts in their order; ValueError for fewer than 10."""
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < 10:
        raise ValueError(f"number of different prompts is {len(prompts)}; expected at least 10 to fit a projection on.")
    return prompts


@torch.no_grad()
def fit_pooled(
    projection: Projection, means: Sequence[Tensor], reference: Encoder, prompts: Sequence[str], solve: Callable
) -> float:
    """Fits a projection's map of the pooled output; returns the share of variance explained on held-out prompts.

    Args:
        projection: with such a map, which is written.
        means: (1, D_in) mean of each prompt's states, float64.
        reference: the reference, with a pooled output of the map's width.
        prompts: the prompts.
        solve: one of SOLVERS.
    """
    targets = [_pooled_target(reference, prompt, projection.pooled_width) for prompt in prompts]
    weight, bias, metrics = _fit_and_evaluate(list(zip(means, targets, strict=True)), targets, solve)
    _set_linear(projection.pooled, weight, bias)
    return metrics.explained


def _token_pairs(
    states: Sequence[tuple[Tensor, Tensor]], reference: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[Pair], list[Tensor]]:
    """Pairs of states and targets, and the reference's own outputs, of each prompt.

    Args:
        states: `Encoder.states` of each prompt.
        reference: The reference's `states` of each prompt.
    """
    pairs, outputs = [], []
    for (state, real), (target, target_real) in zip(states, reference, strict=True):
        pairs.append(align_states(state, real, target, target_real))
        outputs.append(reference_states(target, target_real, pads=bool(_pads(real).any())))
    return pairs, outputs


def _fit_and_evaluate(
    pairs: Sequence[Pair], reference: Sequence[Tensor], solve: Callable
) -> tuple[Tensor, Tensor, FitMetrics]:
    """Weight and bias fitted on all prompts, and the metrics of a fit without the held-out ones.

    Args:
        pairs: States and targets of each prompt.
        reference: The reference's outputs for each prompt.
        solve: One of SOLVERS.
    """
    training = [index for index in range(len(pairs)) if index % HOLD_OUT_EVERY]
    weight, bias = solve([pairs[i] for i in training], [reference[i] for i in training])
    x, y = (torch.cat(part) for part in zip(*pairs[::HOLD_OUT_EVERY], strict=True))
    metrics = fit_metrics(x @ weight.T + bias, y, torch.cat(reference[::HOLD_OUT_EVERY]))
    return *solve(pairs, reference), metrics


def fit_metrics(outputs: Tensor, targets: Tensor, expected: Tensor) -> FitMetrics:
    """R^2 of outputs (N, D) for their targets (N, D), and their std and covariance against the reference's outputs."""
    error = (outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum()
    std = outputs.std(correction=0) / expected.std(correction=0)
    covariance = _covariance(expected)
    distance = torch.linalg.norm(_covariance(outputs) - covariance) / torch.linalg.norm(covariance)
    return FitMetrics(1 - error.item(), std.item(), distance.item())


def _set_linear(linear: torch.nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _pooled_target(reference: Encoder, prompt: str, width: int) -> Tensor:
    """The reference's pooled output, (1, width) in float64; ValueError for none or another width."""
    pooled = reference.pooled(prompt)
    if pooled is None or pooled.shape != (width,):
        given = "none" if pooled is None else f"one of {tuple(pooled.shape)}"
        raise ValueError(f"the reference's pooled output is {given}; expected {width}. Use the CLIP of an SDXL model.")
    return pooled.cpu().double()[None]


def align_states(states: Tensor, real: Tensor, target: Tensor, target_real: Tensor) -> Pair:
    """Pairs a prompt's states with the reference's outputs by relative position; end token and pads pair with theirs.

    Args:
        states: (L, D_in) states.
        real: (L,) bool, its tokens and end token.
        target: (M, D_out) outputs of the reference.
        target_real: (M,) bool, the reference's tokens and end token.

    Returns:
        (n, D_in) states and (n, D_out) targets, in float64.
    """
    states, target = states.cpu().double(), target.cpu().double()
    tokens, target_tokens = states[real][:-1], target[target_real][:-1]
    x, y = [states[real][-1:]], [target[target_real][-1:]]
    if len(tokens) and len(target_tokens):
        count = len(target_tokens)
        positions = ((torch.arange(len(tokens)) + 0.5) / len(tokens) * count - 0.5).clamp(0, count - 1)
        low = positions.floor().long()
        high = (low + 1).clamp(max=count - 1)
        fraction = (positions - low)[:, None].double()
        x, y = [tokens, *x], [target_tokens[low] * (1 - fraction) + target_tokens[high] * fraction, *y]
    pads, target_pads = states[_pads(real)], target[_pads(target_real)]
    if len(pads) and len(target_pads):
        positions = (torch.arange(len(pads)) * len(target_pads) // len(pads)).long()
        x, y = [*x, pads], [*y, target_pads[positions]]
    return torch.cat(x), torch.cat(y)


def reference_states(target: Tensor, real: Tensor, *, pads: bool) -> Tensor:
    """The reference's outputs (n, D) for a prompt's tokens and end token, with `pads` also for its pads; float64."""
    target = target.cpu().double()
    return torch.cat([target[real], target[_pads(real)]]) if pads else target[real]


def _pads(real: Tensor) -> Tensor:
    """(L,) bool: the positions after the last real token."""
    last = int(real.nonzero()[-1])
    return torch.arange(len(real)) > last


def ridge_regression(
    pairs: Sequence[Pair], reference: Sequence[Tensor], *, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Linear map from states to targets by ridge regression (Hoerl & Kennard 1970), with unpenalised bias.

    Args:
        pairs: States and targets of each prompt.
        reference: Not used; `match_covariance` has the same arguments.
        ridge: Penalty on the weights, in units of the states' mean variance.

    Returns:
        Weight (D_out, D_in) and bias (D_out,).
    """
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean


def match_covariance(
    pairs: Sequence[Pair], reference: Sequence[Tensor], *, ridge: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """Linear map whose outputs have the mean and the covariance of the reference's outputs.

    W = C_y^(1/2) R C_x^(-1/2), whitening and colouring, has that covariance for every R with orthonormal rows. R is the
    one with the smallest distance to the targets (orthogonal Procrustes, Schoenemann 1966), regularised as in
    `ridge_regression`. With that regression's weight W_0 and its outputs' covariance C_0 this is
    W = C_y^(1/2) (C_y^(1/2) C_0 C_y^(1/2))^(-1/2) C_y^(1/2) W_0, the optimal transport from C_0 to C_y (Gelbrich 1990).
    If the rank of C_0 is lower than that of C_y, the covariance is matched along the largest axes of C_y.

    Args:
        pairs: States and targets of each prompt.
        reference: The reference's outputs for each prompt.
        ridge: Penalty of the regression.

    Returns:
        Weight W (D_out, D_in) and bias (D_out,).
    """
    x, y = torch.cat([x for x, _ in pairs]), torch.cat(list(reference))
    start, _ = ridge_regression(pairs, reference, ridge=ridge)
    outputs = torch.linalg.qr((x - x.mean(0)) @ start.T / len(x) ** 0.5, mode="r")[1]  # fewer rows, the same covariance
    variances, axes = torch.linalg.eigh(_covariance(y))
    rank = min(torch.linalg.matrix_rank(part, rtol=ROUNDING).item() for part in (outputs, y - y.mean(0)))
    largest = slice(len(axes) - rank, None)
    root = axes[:, largest] * variances[largest].sqrt()
    _, singular_values, rotation = torch.linalg.svd(outputs @ root, full_matrices=False)
    weight = root @ (rotation.T / singular_values) @ rotation @ root.T @ start
    return weight, y.mean(0) - weight @ x.mean(0)


def _covariance(values: Tensor) -> Tensor:
    """Covariance (D, D) of (n, D) values."""
    values = values - values.mean(0)
    return values.T @ values / len(values)


SOLVERS = {"ridge": ridge_regression, "mean-covariance": match_covariance}
"""Method -> function (pairs, reference, ridge) -> (weight, bias)."""
