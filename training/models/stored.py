"""Frozen weights in fewer bytes than those of the numbers that they stand for.

`StoredTensor` keeps a file's fp16, bf16, fp8 or int8 values, with their scale where the file has one, and makes the
numbers whenever an operation asks for them. `recast` does so for one product, and again in backward. It is to the fp32
weight what torchao's and ComfyUI's quantised tensors are, for layouts that need nothing but a scale and a rotation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_SAME = {aten.detach, aten.alias, aten.clone}


class StoredTensor(Tensor):
    """A tensor in fp32 by its dtype, whose values are made when they are needed: w = stored * scale, rotated back.

    Args:
        stored: the weight's shape, in any dtype of numbers.
        scale: of one value, or one for each row; None for none.
        rotation: width of the groups of inputs that ConvRot (arXiv 2512.03673) has rotated; 0 for none.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, stored: Tensor, scale: Tensor | None = None, rotation: int = 0) -> StoredTensor:
        options = {"dtype": torch.float32, "device": stored.device, "storage_size": 0}
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, **options)

    def __init__(self, stored: Tensor, scale: Tensor | None = None, rotation: int = 0):
        self.stored, self.scale, self.rotation = stored, scale, rotation

    def dequantize(self) -> Tensor:
        """The fp32 values."""
        values = self.stored.float()
        if self.scale is not None:
            per_row = (-1, *[1] * (values.ndim - 1)) if self.scale.numel() > 1 else ()
            values = values * self.scale.float().reshape(per_row)
        return rotated_back(values, self.rotation) if self.rotation else values

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.stored.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["stored"] if self.scale is None else ["stored", "scale"], self.rotation

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rotation: int, size: Any, stride: Any) -> StoredTensor:
        return StoredTensor(inner["stored"], inner.get("scale"), rotation)

    def __repr__(self) -> str:
        return f"StoredTensor({tuple(self.shape)}, {self.stored.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _SAME or _only_moves(func, kwargs):
            return args[0]._mapped(
                lambda tensor: func(tensor, *args[1:], **{**kwargs, "dtype": None} if "dtype" in kwargs else kwargs)
            )
        args, kwargs = tree_map_only(StoredTensor, StoredTensor.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def _mapped(self, change: Any) -> StoredTensor:
        return StoredTensor(change(self.stored), None if self.scale is None else change(self.scale), self.rotation)


def _only_moves(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies a tensor as it is, such as to another device."""
    return func.overloadpacket is aten._to_copy and kwargs.get("dtype") in (None, torch.float32)


def is_quantised(stored: Tensor) -> bool:
    """Whether a tensor is of a class that dequantises itself, as those of ComfyUI and torchao do; its dtype is then
    that of the values which it stands for."""
    return type(stored).dequantize is not Tensor.dequantize


def exact(weight: Tensor) -> Tensor:
    """A weight's values in fp32, of whatever it is stored as; the weight itself where it is that."""
    return (weight.dequantize() if is_quantised(weight) else weight).float()


def rotated_back(weight: Tensor, group: int) -> Tensor:
    """(N, K) weights of rotated inputs as those of the inputs: each group of a row times its Hadamard matrix."""
    matrix = hadamard(group).to(weight)
    return (weight.unflatten(-1, (-1, group)) @ matrix).flatten(-2)


@cache
def hadamard(size: int) -> Tensor:
    """The regular orthogonal Hadamard matrix of a power of 4, which is its own inverse."""
    if size < 4 or 4 ** (size.bit_length() // 2) != size:
        raise ValueError(f"convrot_groupsize is {size}; expected a power of 4, such as 256")
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5
