"""Tensors on their way from the host to a device."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Movable = TypeVar("Movable", bound=Any)


def upload(value: Movable, device: torch.device) -> Movable:
    """A tensor of the CPU, or anything with its `to`, on a device, without waiting for the device where that is safe.

    A blocking copy to an NVIDIA or AMD card waits until the card has done all that was asked of it before. CUDA stages
    pageable memory before the call returns, so the source may change afterwards; Apple's Metal does not.
    """
    return value.to(device, non_blocking=torch.device(device).type == "cuda")
