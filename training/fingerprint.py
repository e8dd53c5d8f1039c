"""Short names for the content of big things, to key caches and to tell one base model from another."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES = 1024


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]], *more: object) -> str:
    """32 hex digits over names, shapes and up to 1024 evenly spaced values of each tensor, in fp32.

    A sample, not every byte: fast for any model, and training or a merge changes nearly every value it touches.
    """
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() > SAMPLES:
            flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
        digest.update(flat.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
