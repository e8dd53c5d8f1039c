"""Activation checkpointing of any network, block by block, without help from the network's own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The smallest modules that are made of layers: residual blocks, attentions, resamplers. A layer that stands alone
    between them belongs to none."""
    children = list(network.children())
    inner = [block for child in children for block in blocks_of(child)]
    return inner if inner or not children or isinstance(network, CONTAINERS) else [network]


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """While entered, a forward pass keeps the input of each block alone, and the backward pass computes the block
    again: the memory of one block instead of all, the same gradients to the last bit.

    The blocks must not draw random numbers, as a network in evaluation mode does not. The backward pass may come after.
    """
    blocks = blocks_of(network)
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
