"""ComfyUI's layers while a model trains: their weights are cast, or fetched from RAM, for each pass.

ComfyUI casts a weight for a forward pass and lets autograd keep the copy for the backward pass: of a UNet in fp16 that
computes in fp32 twice the weights. What it fetches from RAM lies in buffers that the next layers use again. Here a
frozen weight of a linear layer or a convolution is cast once for the forward and once for the backward pass, and no
copy is kept between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def training_layers(network: nn.Module) -> Iterator[None]:
    """While entered, ComfyUI's layers in a module tree compute in the dtype and on the device of their input.

    Whether a layer casts its weights afterwards is for ComfyUI to say, which may have offloaded it in the meantime.
    """
    layers = [m for m in network.modules() if hasattr(m, "comfy_cast_weights") and _operation(m) is not None]
    switched = [layer for layer in layers if not _casts(layer)]
    try:
        for layer in layers:
            layer.forward_comfy_cast_weights = partial(_forward, layer, _operation(layer))
        _set_casts(switched, True)
        yield
    finally:
        _set_casts(switched, False)
        for layer in layers:
            vars(layer).pop("forward_comfy_cast_weights", None)


def _casts(layer: nn.Module) -> bool:
    """Whether a layer casts its weights while they are on the device."""
    return getattr(layer, "prev_comfy_cast_weights", layer.comfy_cast_weights)


def _set_casts(layers: Sequence[nn.Module], casts: bool) -> None:
    """Sets `_casts`. A layer that ComfyUI has offloaded goes on casting until it is loaded again."""
    for layer in layers:
        offloaded = hasattr(layer, "prev_comfy_cast_weights")
        setattr(layer, "prev_comfy_cast_weights" if offloaded else "comfy_cast_weights", casts)


def _linear(layer: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _convolution(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer._conv_forward(x, weight, bias)


def _group_norm(layer: nn.GroupNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _rms_norm(layer: nn.RMSNorm, x: Tensor, weight: Tensor | None, bias: None) -> Tensor:
    return F.rms_norm(x, layer.normalized_shape, weight, layer.eps)


MATMULS = {nn.Linear: _linear, nn.Conv1d: _convolution, nn.Conv2d: _convolution}
NORMS = {nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm, nn.RMSNorm: _rms_norm}
"""Class of torch -> its output for a layer, an input, a weight and a bias."""


def _operation(layer: nn.Module) -> Callable | None:
    """What a layer computes; None for others than those above, which keep ComfyUI's forward pass."""
    return next((operation for kind, operation in (MATMULS | NORMS).items() if isinstance(layer, kind)), None)


def _forward(layer: nn.Module, operation: Callable, x: Tensor) -> Tensor:
    """A layer's output, in autocast's dtype where that is on and else in its input's."""
    weight, bias = layer.weight, layer.bias
    if operation in NORMS.values():  # small: their copies may stay
        return operation(layer, x, *_cast_both(layer, x.dtype, x.device, weight, bias))
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    cast = partial(_cast_both, layer, dtype, x.device)
    frozen = not any(value is not None and value.requires_grad for value in (weight, bias))
    if frozen and not _is_ready(layer, dtype, x.device) and not _is_unusual(layer):
        return _Recast.apply(x.to(dtype), weight, bias, layer, operation, cast)
    return operation(layer, x, *cast(weight, bias))


def _is_ready(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer's weight can be used as it is."""
    changed = layer.weight_function or layer.bias_function
    return layer.weight.dtype == dtype and layer.weight.device == device and not changed


def _is_unusual(layer: nn.Module) -> bool:
    """Whether a layer is a convolution whose gradient is not a plain transposed one: it pads with other than zeros."""
    return getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(getattr(layer, "padding", None), str)


def _cast_both(
    layer: nn.Module, dtype: torch.dtype, device: torch.device, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as a layer computes with them: on a device, in a dtype, with the patches that wait for this."""
    return _cast(weight, layer.weight_function, dtype, device), _cast(bias, layer.bias_function, dtype, device)


def _cast(value: Tensor | None, functions: Sequence[Callable], dtype: torch.dtype, device: torch.device):
    if value is None:
        return None
    cast = value.to(device, dtype, copy=bool(functions))
    for function in functions:
        cast = function(cast)
    return cast


class _Recast(torch.autograd.Function):
    """A layer's output for a frozen weight and bias, and its gradient at the input, with a cast of its own for each."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer, operation, cast):
        ctx.save_for_backward(weight)
        ctx.layer, ctx.cast, ctx.shape = layer, cast, x.shape
        return operation(layer, x, *cast(weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,), layer = ctx.saved_tensors, ctx.layer
        weight, _ = ctx.cast(weight, None)
        if isinstance(layer, nn.Linear):
            gradient = grad.reshape(-1, grad.shape[-1]).mm(weight).view(ctx.shape)
        else:
            gradient = _convolution_gradient(layer, ctx.shape, weight, grad)
        return gradient, None, None, None, None, None


def _convolution_gradient(layer: nn.Module, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    """Gradient at a convolution's input of this shape."""
    gradients = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input}
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return gradients[len(shape) - 2](shape, weight, grad, *options)
