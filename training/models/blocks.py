"""The blocks of a UNet, of diffusers and of ComfyUI alike: their order, and how they are wrapped for a time.

A block is a residual block or one transformer block. SD1.5's UNet has 38 of them, SDXL's 87.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import nn

from .protocols import Denoiser

RESIDUAL = ("ResnetBlock2D", "ResBlock")
"""Classes of diffusers and of ComfyUI."""
TRANSFORMER_BLOCK = "BasicTransformerBlock"
TRANSFORMERS = ("Transformer2DModel", "SpatialTransformer")
"""One or more transformer blocks between a norm and two projections."""
_STAGES = ("input_blocks", "middle_block", "output_blocks")

Forward = Callable


def blocks_in_order(denoiser: Denoiser) -> list[nn.Module]:
    """The network's blocks in the order in which they run, which the canonical (LDM) names tell."""
    kinds = (*RESIDUAL, TRANSFORMER_BLOCK)
    blocks = [(path, module) for path, module in denoiser.network.named_modules() if type(module).__name__ in kinds]
    return [module for _, module in sorted(blocks, key=lambda block: _place(denoiser, *block))]


def _place(denoiser: Denoiser, path: str, block: nn.Module) -> tuple[int, ...]:
    """Stage and numbers in the canonical name of a block's first parameter, such as input_blocks.4.1...blocks.0."""
    parameter = next(name for name, _ in block.named_parameters())
    name = denoiser.canonical_name(f"{path}.{parameter}")
    return (_STAGES.index(name.split(".")[0]), *map(int, re.findall(r"\d+", name)))


def units_to_recompute(network: nn.Module) -> list[nn.Module]:
    """The modules that keep nothing but their input for backward: residual blocks and transformers.

    Of a transformer of many blocks (SDXL has ten) each block is a unit: recomputed together, they would need as much
    memory as the rest of the network keeps.
    """
    deep = {id(block) for module in network.modules() if _depth(module) > 1 for block in module.transformer_blocks}
    return [
        module
        for module in network.modules()
        if type(module).__name__ in RESIDUAL or _depth(module) == 1 or id(module) in deep
    ]


def _depth(module: nn.Module) -> int:
    """Number of blocks of a transformer; 0 for any other module."""
    return len(module.transformer_blocks) if type(module).__name__ in TRANSFORMERS else 0


def recomputed(network: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
    """While entered, if enabled, blocks recompute their activations in the backward pass to save memory.

    The gradient has the same bits. (ComfyUI's own `use_checkpoint` fails with frozen weights; diffusers' keeps what
    lies between a transformer's norm and its blocks.)
    """
    return recomputing(units_to_recompute(network) if enabled else [])


def recomputing(units: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """`recomputed` for given modules."""
    from torch.utils.checkpoint import checkpoint

    return wrapped(units, lambda unit, forward: partial(checkpoint, forward, use_reentrant=False))


@contextmanager
def wrapped(modules: Iterable[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """While entered, a module's `forward` is `wrap(module, forward)`; afterwards it is what it was. May be nested."""
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
