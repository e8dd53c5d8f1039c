"""Frozen weights in another dtype than that of the arithmetic: cast for one product, and cast again in backward.

A weight that is cast before `nn.functional.linear` or `conv2d` stays in memory, as a copy, until backward has passed:
autograd saves the operand. `FrozenLinear` and `FrozenConv2d` save the stored weight in its place, which is in memory
anyway, and make the operand again when its gradient is asked for. So no copy of a frozen weight outlives its layer,
neither of a cast one nor of a dequantised one, and fp16, bf16, fp8 and int8 weights are held once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Operand = Callable[[Tensor, Tensor], Tensor]
"""(stored weight or bias, tensor of the arithmetic's dtype and device) -> the operand: cast, moved or dequantised."""


def cast(stored: Tensor, like: Tensor) -> Tensor:
    """The stored tensor in the dtype and on the device of `like`; itself where it has both already."""
    return stored.to(like.device, like.dtype)


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for frozen W and b; nothing but the stored W is kept, for dL/dx = dL/dy W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Operand) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.operand = operand
        return F.linear(x, operand(weight, x), None if bias is None else operand(bias, x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient.matmul(ctx.operand(weight, gradient)), None, None, None


class FrozenConv2d(torch.autograd.Function):
    """y = x * W + b for frozen W and b; nothing but the stored W is kept, for dL/dx."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Operand, geometry: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.operand, ctx.geometry, ctx.shape = operand, geometry, x.shape
        return F.conv2d(x, operand(weight, x), None if bias is None else operand(bias, x), **geometry)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        operand = ctx.operand(weight, gradient)
        return nn.grad.conv2d_input(ctx.shape, operand, gradient, **ctx.geometry), None, None, None, None


class FrozenTransposed(torch.autograd.Function):
    """y = x W for a frozen W, of one dimension of outputs and one of inputs; nothing but the stored W is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, operand: Operand) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.operand = operand
        return x.matmul(operand(weight, x).flatten(1))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return F.linear(gradient, ctx.operand(weight, gradient).flatten(1)), None, None


def geometry_of(layer: nn.Conv2d) -> dict[str, Any]:
    """A convolution's stride, padding, dilation and groups."""
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


def frozen_product(layer: nn.Module, x: Tensor, operand: Operand = cast, *, bias: bool = False) -> Tensor:
    """A linear or 2D convolution layer's frozen weight applied to x.

    Args:
        layer: its stored weight may have any dtype that `operand` reads.
        x: of the arithmetic's dtype, on its device.
        operand: makes the weight to compute with.
        bias: whether the layer's bias is added.
    """
    added = layer.bias if bias else None
    if isinstance(layer, nn.Conv2d):
        return FrozenConv2d.apply(x, layer.weight, added, operand, geometry_of(layer))
    return FrozenLinear.apply(x, layer.weight, added, operand)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed: autocast's where it is on, else that of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def recast_forward(layer: nn.Module, x: Tensor, operand: Operand = cast) -> Tensor:
    """A linear or 2D convolution layer's output, of whose weight no copy outlives the call.

    A weight that trains, or that has the arithmetic's dtype and device already, takes torch's own way.
    """
    dtype, weight = arithmetic_dtype(x), layer.weight
    trains = weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    if trains or (operand is cast and weight.dtype == dtype and weight.device == x.device):
        return type(layer).forward(layer, x)
    return frozen_product(layer, x.to(dtype), operand, bias=True)


def recastable(network: nn.Module) -> list[nn.Module]:
    """The linear and 2D convolution layers of a module tree whose forward pass is torch's own."""
    kinds = (nn.Linear.forward, nn.Conv2d.forward)
    layers = [m for m in network.modules() if getattr(type(m), "forward", None) in kinds and "forward" not in vars(m)]
    return [m for m in layers if not isinstance(m, nn.Conv2d) or _has_numeric_padding(m)]


def _has_numeric_padding(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def store_in(network: nn.Module, dtype: torch.dtype, exact: Callable[[str], bool]) -> None:
    """Rounds the weights and biases of linear and convolution layers to a dtype, one after another, and makes all other
    parameters fp32: norms, which autocast computes in fp32, and what trains, whose masters begin with all its digits.

    Args:
        network: whose parameters are replaced.
        dtype: of the arithmetic that the network is meant for.
        exact: whether a parameter, by its name in the network, is not rounded.
    """
    paths = {module: path for path, module in network.named_modules()}
    rounded = {f"{paths[layer]}.{name}" for layer in recastable(network) for name in ("weight", "bias")}
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtype if name in rounded and not exact(name) else torch.float32)


@contextmanager
def recasting(layers: Iterable[nn.Module], operand: Operand = cast) -> Iterator[None]:
    """While entered, these layers compute by `recast_forward`; afterwards they are as they were.

    Args:
        layers: linear and 2D convolution layers, such as `recastable(network)`.
        operand: makes the weight or bias to compute with from the stored one.
    """
    changed = [layer for layer in layers if "forward" not in vars(layer)]
    try:
        for layer in changed:
            layer.forward = partial(recast_forward, layer, operand=operand)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)
