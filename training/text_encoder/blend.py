"""Weighted sums of text encoders, in their weights or in what they say (interpolation and mixing: arXiv 2403.18978)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.protocols import Conditioning
from .projection import RESAMPLERS, Projection

log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""How far a sum of weights may be from 1 and still count as 1."""


def parse_weights(text: str, count: int) -> list[float]:
    """Numbers between commas, semicolons or blanks, one for each of `count` encoders; a sum other than 1 is logged.

    Raises ValueError for another count, for what is no finite number, and when all are 0.
    """
    found = [part for part in re.split(r"[\s,;]+", text) if part]
    try:
        weights = [float(part) for part in found]
    except ValueError:
        weights = []
    if len(weights) != len(found) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights is {text!r}; expected numbers such as 0.4, 0.6.")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers ({text!r}); expected {count}, one for each text encoder.")
    if not any(weights):
        raise ValueError(f"weights is {text!r}; expected one other than 0.")
    if not is_close_to_one(sum(weights)):
        log.warning(
            "the weights sum to %g, not to 1: what comes out is louder or quieter than the encoders", sum(weights)
        )
    return weights


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_i w_i T_i in fp32, tensors of one shape; those of weight 0 are not read, NaN included.

    Exact where nothing is to be mixed: one tensor of weight 1, or equal tensors with weights that sum to 1.
    """
    used = [(weight, tensor.float()) for weight, tensor in zip(weights, tensors, strict=True) if weight]
    first = used[0][1]
    if is_close_to_one(sum(weight for weight, _ in used)) and all(torch.equal(first, tensor) for _, tensor in used[1:]):
        return first
    return sum(weight * tensor for weight, tensor in used)


def renormalised_weights(weights: Sequence[float], held: Sequence[bool]) -> list[float] | None:
    """Weights of a part that not all encoders hold: those that do share it, and it keeps its size.

    w_i / (sum of w over the holders), 0 for the others; the weights as they are where all hold it. None when the
    holders' weights sum to 0.
    """
    if all(held):
        return list(weights)
    total = sum(weight for weight, has in zip(weights, held, strict=True) if has)
    if abs(total) < TOLERANCE:
        return None
    return [weight / total if has else 0.0 for weight, has in zip(weights, held, strict=True)]


def expect_same_shapes(first: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], number: int) -> None:
    """Raises ValueError naming the first tensor (name -> shape) in which encoder `number` differs from encoder 1."""
    for name in [*first, *(name for name in other if name not in first)]:
        one, two = (tuple(shapes[name]) if name in shapes else None for shapes in (first, other))
        if one != two:
            raise ValueError(
                f"text encoder {number} has {_shape(two)} for {name}, text encoder 1 has {_shape(one)}; expected "
                'encoders of one architecture. Blend others in space "embeddings".'
            )


def blend_conditioning(weights: Sequence[float], said: Sequence[Conditioning]) -> Conditioning:
    """sum_i w_i c_i of contexts and of pooled outputs; encodings of weight 0 count as not there.

    A shorter context is lengthened (`extend_context`). A pooled output that only some have is shared by these
    (`renormalised_weights`). Masks are dropped. Raises ValueError for contexts or pooled outputs of different width or
    batch.
    """
    used = [(weight, one) for weight, one in zip(weights, said, strict=True) if weight]
    weights, contexts = [weight for weight, _ in used], [one.context for _, one in used]
    _expect_equal("context", [context.shape[:1] + context.shape[2:] for context in contexts])
    length = max(context.shape[1] for context in contexts)
    context = weighted_sum(weights, [extend_context(one, length) for one in contexts]).to(contexts[0].dtype)
    return Conditioning(context, _blend_pooled(weights, [one.pooled for _, one in used]))


def _blend_pooled(weights: Sequence[float], pooled: Sequence[Tensor | None]) -> Tensor | None:
    own = renormalised_weights(weights, [one is not None for one in pooled])
    given = [one for one in pooled if one is not None]
    if not given or own is None:
        return None
    _expect_equal("pooled output", [one.shape for one in given])
    return weighted_sum(own, [given[0] if one is None else one for one in pooled]).to(given[0].dtype)


def extend_context(context: Tensor, length: int) -> Tensor:
    """(B, L, D) -> (B, length, D), L <= length.

    Whole repeats where L divides length, as between CLIP's sections of 77: attention without a mask hears them as the
    context itself. Else the last token is repeated, which is a pad or the end token; zeros would be tokens that no
    model was trained with.
    """
    if length % context.shape[1] == 0:
        return context.repeat(1, length // context.shape[1], 1)
    return torch.cat([context, context[:, -1:].expand(-1, length - context.shape[1], -1)], 1)


def blend_projections(weights: Sequence[float], projections: Sequence[Projection]) -> Projection:
    """A projection whose weights are sum_i w_i W_i, each one's scale counted as part of its output weights; its scale
    is 1. Raises ValueError for projections of another kind or size."""
    for number, one in enumerate(projections[1:], 2):
        if one.config() != projections[0].config():
            raise ValueError(
                f"the projection of text encoder {number} is {one.config()}; expected that of text encoder 1, "
                f'{projections[0].config()}. Blend these in space "embeddings".'
            )
    with torch.inference_mode(False), torch.no_grad():
        states = [_unscaled(one) for one in projections]
        state = {name: weighted_sum(weights, [one[name] for one in states]) for name in states[0]}
        return Projection.from_state(projections[0].config(), state)


def _unscaled(projection: Projection) -> dict[str, Tensor]:
    """The state with scale 1 of a projection that does the same."""
    state = {name: value.detach().float().clone() for name, value in projection.state_dict().items()}
    last = ("linear.",) if projection.kind in RESAMPLERS else ("linear.", "output.")
    scale = state.pop("scale")
    state = {name: value * scale if name.startswith(last) else value for name, value in state.items()}
    return state | {"scale": torch.ones_like(scale)}


def is_close_to_one(total: float) -> bool:
    """Whether a sum of weights counts as 1."""
    return abs(total - 1) < TOLERANCE


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else " x ".join(map(str, shape)) or "one number"


def _expect_equal(what: str, shapes: Sequence[Sequence[int]]) -> None:
    """Raises ValueError when shapes, (batch, width) of each, are not all the same."""
    if len({tuple(shape) for shape in shapes}) > 1:
        given = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
        raise ValueError(f"{what}: batch x width is {given}; expected the same for all, as one model reads.")
