"""Tensors on their way from the host to a device."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Movable = TypeVar("Movable", bound=Any)
STAGING = ("cuda",)
"""Kinds of devices whose copies have read pageable memory when the call returns, so that the source may change then."""


def upload(value: Movable, device: torch.device) -> Movable:
    """A tensor of the CPU, or anything with its `to`, on a device, without waiting for the device where that is safe.

    A blocking copy to an NVIDIA or AMD card waits until the card has done all that was asked of it before. One that
    does not block is safe on STAGING alone; Apple's Metal reads the source later.
    """
    return value.to(device, non_blocking=torch.device(device).type in STAGING)


def upload_as(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values of the CPU in the dtype and on the device of `like`; see `upload`."""
    return upload(values.to(like.dtype), like.device)
