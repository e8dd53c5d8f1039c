"""Blocks of a network compiled one by one (`torch.compile`), or held channels last, for a time.

Each block compiles for each size of picture and batch: buckets are fixed, so after the first steps nothing compiles any
more. Whole networks would compile for minutes, and again at each change around them. Passes without gradients
(validation, samples) stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .blocks import Forward, units_to_recompute, wrapped

log = logging.getLogger(__name__)

MOST_VARIANTS = 1024
"""Compiled variants of one class of blocks: its blocks of other widths, times the sizes of pictures."""


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch cannot compile for a device: no C++ compiler for a CPU, no Triton for a GPU.

    Compiles a sum of two numbers, since no query tells whether a device's whole chain of tools is there.
    """
    probe = torch.compile(_probe, dynamic=False)
    try:
        probe(torch.zeros(2, device=device))
    except RuntimeError as error:  # those of dynamo and inductor are
        needs = "a C++ compiler (g++, clang++ or cl)" if device.type == "cpu" else "Triton (triton-windows on Windows)"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"compile_blocks is on, but torch cannot compile for {device} ({reason}); expected {needs}. Install it, or "
            "set compile_blocks off."
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@contextmanager
def compiled_blocks(network: nn.Module, enabled: bool) -> Iterator[None]:
    """While entered, if enabled, passes with gradients run compiled blocks; afterwards modules are as they were.

    Results are those of eager blocks up to the order of additions. Raises ValueError where torch finds no compiler.
    """
    if not enabled:
        yield
        return
    import torch._dynamo

    check_compiler(next(network.parameters()).device)
    units = units_to_recompute(network)
    log.info("compile_blocks: %d blocks compile in the first steps of each size, which takes minutes", len(units))
    limits = {"recompile_limit": MOST_VARIANTS, "accumulated_recompile_limit": MOST_VARIANTS}
    with torch._dynamo.config.patch(**limits), wrapped(units, _compiled):
        yield


def _compiled(unit: nn.Module, forward: Forward) -> Forward:
    fast = torch.compile(forward, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


@contextmanager
def channels_last(network: nn.Module, enabled: bool) -> Iterator[None]:
    """While entered, if enabled, weights of 2D convolutions lie in memory channels last, so that activations follow.

    Values are the same. Each Parameter stays the same object, and its order in memory comes back afterwards.
    """
    layers = [m for m in network.modules() if enabled and isinstance(m, nn.Conv2d)]
    before = [(layer.weight, layer.weight.stride()) for layer in layers if type(layer.weight.data) is torch.Tensor]
    try:
        for weight, _ in before:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, stride in before:
            weight.data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device).copy_(
                weight.data
            )
