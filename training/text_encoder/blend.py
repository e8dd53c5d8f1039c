"""Blends text encoders: weighted sums of their weights or of their outputs (arXiv 2403.18978)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..common.text import parse_numbers
from ..models.protocols import Conditioning
from ..models.stored import exact
from .projection import RESAMPLERS, Projection

log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Largest difference from 1 of a sum of blend weights that counts as 1."""


def parse_weights(text: str, count: int) -> list[float]:
    """Parses the blend weights of `count` text encoders; logs a warning if they do not sum to 1.

    Args:
        text: Numbers separated by commas, semicolons or spaces.
        count: Number of encoders.

    Raises:
        ValueError: The count differs, a part is no finite number, or all weights are 0.
    """
    weights = parse_numbers(text, "weights")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers ({text!r}); expected {count}, one for each text encoder.")
    if not any(weights):
        raise ValueError(f"weights is {text!r}; expected one other than 0.")
    if not is_close_to_one(sum(weights)):
        log.warning("the weights sum to %g, not to 1: the output's std is another one than the encoders'", sum(weights))
    return weights


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_i w_i T_i in fp32.

    A tensor of weight 0 is not read, even if it has NaN. The result is exact for a single tensor of weight 1, and for
    equal tensors whose weights sum to 1.

    Args:
        weights: w_i.
        tensors: T_i, of one shape.
    """
    used = [(weight, exact(tensor)) for weight, tensor in zip(weights, tensors, strict=True) if weight]
    first = used[0][1]
    if is_close_to_one(sum(weight for weight, _ in used)) and all(torch.equal(first, tensor) for _, tensor in used[1:]):
        return first
    return sum(weight * tensor for weight, tensor in used)


def renormalised_weights(weights: Sequence[float], present: Sequence[bool]) -> list[float] | None:
    """Blend weights for a tensor that some encoders lack: w_i / (sum of w over those that have it), 0 for the others.

    Args:
        weights: w_i of all encoders.
        present: Whether each encoder has the tensor.

    Returns:
        The new weights; the same ones if all encoders have the tensor, None if the sum is 0.
    """
    if all(present):
        return list(weights)
    total = sum(weight for weight, has in zip(weights, present, strict=True) if has)
    if abs(total) < TOLERANCE:
        return None
    return [weight / total if has else 0.0 for weight, has in zip(weights, present, strict=True)]


def expect_same_shapes(first: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], number: int) -> None:
    """Raises ValueError if an encoder has other tensors or shapes than encoder 1.

    Args:
        first: Tensor name -> shape of encoder 1.
        other: Tensor name -> shape of the other encoder.
        number: Number of the other encoder, for the message.
    """
    for name in [*first, *(name for name in other if name not in first)]:
        expected, shape = (tuple(shapes[name]) if name in shapes else None for shapes in (first, other))
        if expected != shape:
            raise ValueError(
                f"text encoder {number} has {_format_shape(shape)} for {name}, text encoder 1 has "
                f"{_format_shape(expected)}; expected "
                'encoders of one architecture. Blend others in space "embeddings".'
            )


def blend_conditioning(weights: Sequence[float], conditionings: Sequence[Conditioning]) -> Conditioning:
    """sum_i w_i c_i of the contexts and of the pooled outputs, for weights w_i and conditionings c_i.

    Conditionings of weight 0 are ignored. Shorter contexts are extended (`extend_context`). If only some conditionings
    have a pooled output, their weights are renormalised for it (`renormalised_weights`). Masks are dropped.

    Raises:
        ValueError: Contexts or pooled outputs differ in width or batch size.
    """
    used = [(weight, conditioning) for weight, conditioning in zip(weights, conditionings, strict=True) if weight]
    weights, contexts = [weight for weight, _ in used], [conditioning.context for _, conditioning in used]
    _expect_equal("context", [context.shape[:1] + context.shape[2:] for context in contexts])
    length = max(context.shape[1] for context in contexts)
    context = weighted_sum(weights, [extend_context(context, length) for context in contexts]).to(contexts[0].dtype)
    return Conditioning(context, _blend_pooled(weights, [conditioning.pooled for _, conditioning in used]))


def _blend_pooled(weights: Sequence[float], pooled: Sequence[Tensor | None]) -> Tensor | None:
    """The weighted sum of the pooled outputs that are not None; None without any, or if their weights sum to 0."""
    present = [tensor for tensor in pooled if tensor is not None]
    weights = renormalised_weights(weights, [tensor is not None for tensor in pooled])
    if not present or weights is None:
        return None
    _expect_equal("pooled output", [tensor.shape for tensor in present])
    return weighted_sum(weights, [present[0] if tensor is None else tensor for tensor in pooled]).to(present[0].dtype)


def extend_context(context: Tensor, length: int) -> Tensor:
    """Extends a context to `length` tokens.

    If its length divides `length`, as for CLIP's chunks of 77 tokens, the whole context is repeated: attention without
    a mask then returns the same as for the context itself. Otherwise the last token is repeated, which is a pad or the
    end token; zeros would be tokens that no model was trained with.

    Args:
        context: (B, L, D), L <= length.
        length: New length.
    """
    if length % context.shape[1] == 0:
        return context.repeat(1, length // context.shape[1], 1)
    return torch.cat([context, context[:, -1:].expand(-1, length - context.shape[1], -1)], 1)


def blend_projections(weights: Sequence[float], projections: Sequence[Projection]) -> Projection:
    """A projection with the weights sum_i w_i W_i and scale 1.

    Args:
        weights: w_i.
        projections: With weights W_i, their scales multiplied into their output weights.

    Raises:
        ValueError: The projections differ in kind or size.
    """
    _check_projections(projections)
    with torch.inference_mode(False), torch.no_grad():
        states = [_unscaled_state(projection) for projection in projections]
        state = {name: weighted_sum(weights, [state[name] for state in states]) for name in states[0]}
        return Projection.from_state(projections[0].config(), state)


def _check_projections(projections: Sequence[Projection]) -> None:
    for number, projection in enumerate(projections[1:], 2):
        if projection.config() != projections[0].config():
            raise ValueError(
                f"the projection of text encoder {number} is {projection.config()}; expected that of text encoder 1, "
                f'{projections[0].config()}. Blend these in space "embeddings".'
            )


def _unscaled_state(projection: Projection) -> dict[str, Tensor]:
    """The state dict, in fp32, of an equal projection with scale 1."""
    state = {name: value.detach().float().clone() for name, value in projection.state_dict().items()}
    output = ("linear.",) if projection.kind in RESAMPLERS else ("linear.", "output.")
    scale = state.pop("scale")
    state = {name: value * scale if name.startswith(output) else value for name, value in state.items()}
    return state | {"scale": torch.ones_like(scale)}


def is_close_to_one(total: float) -> bool:
    """Whether a sum of blend weights is 1 within TOLERANCE."""
    return abs(total - 1) < TOLERANCE


def _format_shape(shape: tuple[int, ...] | None) -> str:
    """A shape such as "2 x 3"; "nothing" for a missing tensor."""
    return "nothing" if shape is None else " x ".join(map(str, shape)) or "one number"


def _expect_equal(what: str, shapes: Sequence[Sequence[int]]) -> None:
    """Raises ValueError unless all shapes, (batch, width) each, are equal; `what` is for the message."""
    if len({tuple(shape) for shape in shapes}) > 1:
        given = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
        raise ValueError(f"{what}: batch x width is {given}; expected the same for all, as one model reads.")
