"""How training differs from ComfyUI's inference: gradients, and kernels that are told of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def training_mode() -> Iterator[None]:
    """Leaves ComfyUI's inference mode (nodes run in it) and tells its kernels that gradients are wanted."""
    import comfy.model_management

    before = getattr(comfy.model_management, "in_training", False)
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = before
