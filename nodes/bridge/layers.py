"""ComfyUI's layers while a model trains: their weights are cast, or fetched from RAM, for each pass.

ComfyUI casts a weight for a forward pass and lets autograd keep the copy for the backward pass: of a UNet in fp16 that
computes in fp32 twice the weights. What it fetches from RAM lies in buffers that the next layers use again. Here the
weight of a linear layer or a convolution is cast for the forward and again for the backward pass
(`training.models.recast`), and no copy is kept between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ...training.models.recast import arithmetic_dtype, cast, is_quantised, product


@contextmanager
def training_layers(network: nn.Module) -> Iterator[None]:
    """While entered, ComfyUI's layers in a module tree compute in the dtype and on the device of their input.

    Whether a layer casts its weights afterwards is for ComfyUI to say, which may have offloaded it in the meantime.
    """
    castable = [module for module in network.modules() if hasattr(module, "comfy_cast_weights")]
    layers = [layer for layer in castable if _operation(layer) is not None]
    quantised = [layer for layer in castable if _is_quantised_linear(layer) and "forward" not in vars(layer)]
    switched = [layer for layer in layers if not _casts(layer)]
    try:
        for layer in layers:
            layer.forward_comfy_cast_weights = partial(_forward, layer, _operation(layer))
        for layer in quantised:
            layer.forward = partial(_quantised_forward, layer)
        _set_casts(switched, True)
        yield
    finally:
        _set_casts(switched, False)
        for layer in layers:
            vars(layer).pop("forward_comfy_cast_weights", None)
        for layer in quantised:
            vars(layer).pop("forward", None)


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


OPERATIONS = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
}
"""Class of torch -> its output for a layer, an input, a weight and a bias."""


def _operation(layer: nn.Module) -> Callable | None:
    """What a layer computes; None for others than those above, which keep ComfyUI's forward pass."""
    return next((operation for kind, operation in OPERATIONS.items() if isinstance(layer, kind)), None)


def _forward(layer: nn.Module, operation: Callable, x: Tensor) -> Tensor:
    """A layer's output; a product in autocast's dtype where that is on, anything else in its input's."""
    operand = partial(_operand, layer)
    if operation in (_linear, _convolution):
        x = x.to(arithmetic_dtype(x))
    if _is_recast(layer, x):
        return product(layer, x, operand, bias=True)
    weight, bias = (None if value is None else operand(value, x) for value in (layer.weight, layer.bias))
    return operation(layer, x, weight, bias)


def _is_quantised_linear(layer: nn.Module) -> bool:
    """Whether a layer is ComfyUI's own linear layer of quantised weights, which is none of torch's."""
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "out_features") and weight is not None and weight.ndim == 2 and is_quantised(weight)


def _quantised_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """As ComfyUI's forward pass, but for its rounding of the input: the weight is dequantised for each pass."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()
    scale = getattr(layer, "pre_quant_scale", None)
    x = x if scale is None else x * cast(scale, x)
    return product(layer, x.to(arithmetic_dtype(x)), partial(_operand, layer), bias=True)


def _is_recast(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a product with a weight that is not as it is computed with, and whose gradient is plain."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return False
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    weight, patched = layer.weight, layer.weight_function or layer.bias_function
    if patched:
        return not any(value is not None and value.requires_grad for value in (weight, layer.bias))
    return weight.dtype != x.dtype or weight.device != x.device or is_quantised(weight)


def _operand(layer: nn.Module, stored: Tensor, like: Tensor) -> Tensor:
    """A layer's weight or bias as it computes: dtype and device of `like`, with the patches that wait for this."""
    value, functions = cast(stored, like), layer.bias_function if stored is layer.bias else layer.weight_function
    if functions and value is stored:
        value = value.clone()  # ComfyUI's patches write into it
    for function in functions:
        value = function(value)
    return value
