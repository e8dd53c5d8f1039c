"""Weights in another dtype than that of the arithmetic: cast for one product, and cast again in backward.

A weight that is cast before `nn.functional.linear` or `conv2d` stays in memory, as a copy, until backward has passed:
autograd saves the operand. `RecastLinear` and `RecastConv2d` save the stored weight in its place, which is in memory
anyway, and make the operand again for backward. So no copy of a weight outlives its layer, neither of a cast one nor of
a dequantised one: frozen fp16, bf16, fp8 and int8 weights are held once, and fp32 masters too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parameters import ParameterRef, parameter_refs
from .stored import StoredTensor, exact, is_quantised

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Operand = Callable[[Tensor, Tensor], Tensor]
"""(stored weight or bias, tensor of the arithmetic's dtype and device) -> the operand: cast, moved or dequantised."""


def cast(stored: Tensor, like: Tensor) -> Tensor:
    """The stored tensor, dequantised, in the dtype and on the device of `like`; itself where it has both already."""
    moved = stored.to(like.device)
    return (moved.dequantize() if is_quantised(moved) else moved).to(like.dtype)


class RecastLinear(torch.autograd.Function):
    """y = x W^T + b, of whose operands only the stored W is kept, and x where W trains.

    dL/dx = dL/dy W, dL/dW = (dL/dy)^T x, each product in the dtype of dL/dy and then cast, as autocast has it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Operand) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.operand, ctx.bias_dtype = operand, None if bias is None else bias.dtype
        return F.linear(x, operand(weight, x), None if bias is None else operand(bias, x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient.matmul(ctx.operand(weight, gradient)) if of_x else None,
            rows.t().mm(x.reshape(-1, x.shape[-1])).to(weight) if of_weight else None,
            rows.sum(0).to(ctx.bias_dtype) if of_bias else None,
            None,
        )


class RecastConv2d(torch.autograd.Function):
    """y = x * W + b, of whose operands only the stored W is kept, and x where W trains."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Operand, geometry: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.operand, ctx.geometry, ctx.shape = operand, geometry, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.conv2d(x, operand(weight, x), None if bias is None else operand(bias, x), **geometry)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if x is None:  # only its shape matters
            x = gradient.new_empty(1).expand(ctx.shape)
        stride, padding, dilation, groups = (ctx.geometry[n] for n in ("stride", "padding", "dilation", "groups"))
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            x,
            ctx.operand(weight, gradient),
            [gradient.shape[1]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            ctx.needs_input_grad[:3],
        )
        return (
            of_x,
            None if of_weight is None else of_weight.to(weight),
            None if of_bias is None else of_bias.to(ctx.bias_dtype),
            None,
            None,
        )


class RecastTransposed(torch.autograd.Function):
    """y = x W for a frozen W of one dimension of outputs and one of inputs, with nothing kept but the stored W."""

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


def product(layer: nn.Module, x: Tensor, operand: Operand = cast, *, bias: bool = False) -> Tensor:
    """A linear or 2D convolution layer's weight applied to x.

    Args:
        layer: its stored weight may have any dtype that `operand` reads.
        x: of the arithmetic's dtype, on its device.
        operand: makes the weight to compute with.
        bias: whether the layer's bias is added.
    """
    added = layer.bias if bias else None
    if isinstance(layer, nn.Conv2d):
        return RecastConv2d.apply(x, layer.weight, added, operand, geometry_of(layer))
    return RecastLinear.apply(x, layer.weight, added, operand)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed: autocast's where it is on, else that of x."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def recast_forward(layer: nn.Module, x: Tensor, operand: Operand = cast) -> Tensor:
    """A linear or 2D convolution layer's output, of whose weight no copy outlives the call.

    A weight that has the arithmetic's dtype and device already takes torch's own way.
    """
    dtype, weight = arithmetic_dtype(x), layer.weight
    plain = operand is cast and not is_quantised(weight)
    if plain and weight.dtype == dtype and weight.device == x.device:
        return type(layer).forward(layer, x)
    return product(layer, x.to(dtype), operand, bias=True)


def recastable(network: nn.Module) -> list[nn.Module]:
    """The linear and 2D convolution layers of a module tree whose forward pass is torch's own."""
    kinds = (nn.Linear.forward, nn.Conv2d.forward)
    layers = [m for m in network.modules() if getattr(type(m), "forward", None) in kinds and "forward" not in vars(m)]
    return [m for m in layers if not isinstance(m, nn.Conv2d) or _has_numeric_padding(m)]


def _has_numeric_padding(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def store_in(network: nn.Module, dtype: torch.dtype, trains: Callable[[str], bool]) -> None:
    """Rounds the weights and biases of linear and convolution layers to a dtype, one after another, into memory of
    their own.

    Those of them that train stay as they are, since masters begin with all their digits, and so do frozen ones in fp8
    or int8, which `recasting` unfolds for each product. Other parameters become fp32: norms, which autocast computes in
    fp32.

    Args:
        network: whose parameters are replaced.
        dtype: of the arithmetic that the network is meant for.
        trains: whether a parameter, by its name in the network, is not rounded.
    """
    of_layers = recastable_names(network)
    for name, ref in parameter_refs(network).items():
        value = ref.tensor.detach()
        if name not in of_layers or (trains(name) and _is_compressed(value)):
            replace_weight(ref, exact(value))
        else:
            replace_weight(ref, value if trains(name) or _is_compressed(value) else value.to(dtype))


def hold(network: nn.Module) -> nn.Module:
    """Lets linear and convolution layers keep their weights as the file has them, and compute in the dtype of their
    inputs; for good, and one layer after another, into memory of their own. Returns the network.

    Its outputs have the bits of a network in fp32, since each layer's weights are unfolded to fp32 for its product. By
    their dtype the weights are fp32 too, which libraries look at to choose that of their inputs.
    """
    of_layers = recastable_names(network)
    for name, ref in parameter_refs(network).items():
        value = ref.tensor.detach()
        if name not in of_layers:
            replace_weight(ref, exact(value))
        else:
            replace_weight(ref, value if is_quantised(value) or value.dtype == torch.float32 else StoredTensor(value))
    for layer in recastable(network):
        layer.forward = partial(recast_forward, layer)
    return network


def recastable_names(network: nn.Module) -> set[str]:
    """Names of the weights and biases of `recastable` layers."""
    paths = {module: path for path, module in network.named_modules()}
    return {f"{paths[layer]}.{name}" for layer in recastable(network) for name in ("weight", "bias")}


def _is_compressed(value: Tensor) -> bool:
    """Whether a weight has fewer bytes than in half precision."""
    return is_quantised(value) or value.dtype in FP8


def replace_weight(ref: ParameterRef, value: Tensor) -> None:
    """Makes a value the parameter's, in its own dtype and in memory of its own: what it was may lie in a file."""
    old = ref.tensor
    if is_quantised(value) or value.untyped_storage()._cdata == old.untyped_storage()._cdata:
        value = value.clone()
    if is_quantised(value) or is_quantised(old):
        ref.owner._parameters[ref.attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        old.data = value


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
