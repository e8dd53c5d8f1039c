"""What objectives share when a step is run on tensors without values (`loop.estimate`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..common.live_bytes import LiveBytes
from ..models.protocols import Conditioning


def encoded(encode: Callable[[], Conditioning]) -> tuple[Conditioning, int]:
    """A prompt's conditioning without its graph, and the bytes that the graph keeps for backward, 0 without one.

    Text encoders read values (which tokens are pads, which are learned), so a prompt is encoded for real.
    """
    with LiveBytes() as live:
        text = encode()
    held = live.now if text.context.requires_grad else 0
    pooled = None if text.pooled is None else text.pooled.detach()
    return Conditioning(text.context.detach(), pooled, text.mask, text.prefix), held


def rehearsed_gradients(
    loss: Tensor, inputs: Sequence[Tensor], parameters: Iterable[Tensor], held: Tensor
) -> list[Tensor]:
    """The gradients of a loss at what trains.

    Args:
        loss: a number.
        inputs: leaves that the text encoder's graph would end in.
        parameters: what trains, in the graph or in the text encoder.
        held: stands for the text encoder's graph, which is freed last.
    """
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)[len(inputs) :]
    del held
    return [torch.empty_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
