"""Short fingerprints of large tensors, to key caches and to identify base models."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 1024
SKETCHED = 8


@dataclass(frozen=True)
class Sampled:
    """All that a fingerprint reads of a tensor, to take it after the tensor has been rounded to another dtype."""

    shape: tuple[int, ...]
    values: bytes


def sampled(tensor: Tensor | Sampled) -> Sampled:
    """Shape and up to 1024 evenly spaced values of a tensor in fp32."""
    if isinstance(tensor, Sampled):
        return tensor
    return Sampled(tuple(tensor.shape), _spaced(tensor, SAMPLES).numpy().tobytes())


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor | Sampled]], *more: object) -> str:
    """32 hex digits over names, shapes and up to 1024 evenly spaced values of each tensor in fp32, and `more`.

    Values are sampled to be fast for any model; training or a merge changes nearly all values of a tensor.
    """
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        found = sampled(tensor)
        digest.update(f"{name}{found.shape}".encode())
        digest.update(found.values)
    return digest.hexdigest()[:32]


def tensors_sketch(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list]:
    """Name -> [shape, up to 8 evenly spaced values] of each tensor, to compare with `sketches_match`.

    For computed weights, such as a fit or a measured scale, whose last bits differ between machines and numbers of
    threads.
    """
    return {
        name: [list(t.shape), _spaced(t, SKETCHED).tolist()] for name, t in sorted(tensors, key=lambda item: item[0])
    }


def sketches_match(one: Mapping[str, Sequence], other: Mapping[str, Sequence]) -> bool:
    """Whether two sketches have equal names and shapes, and values within a thousandth of each tensor's largest."""
    if one.keys() != other.keys():
        return False
    return all(_near(one[name], other[name]) for name in one)


def _near(one: Sequence, other: Sequence) -> bool:
    (shape, values), (other_shape, other_values) = one, other
    if list(shape) != list(other_shape):
        return False
    largest = max((abs(value) for value in [*values, *other_values]), default=0.0)
    return all(abs(a - b) <= 1e-3 * largest for a, b in zip(values, other_values, strict=True))


def _spaced(tensor: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced values, fp32, on the CPU."""
    if type(tensor).dequantize is not Tensor.dequantize:  # of a class that stands for other numbers than it holds
        tensor = tensor.dequantize()
    flat = tensor.detach().reshape(-1)
    if flat.numel() > count:
        flat = flat[torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)]
    return flat.float().cpu()
