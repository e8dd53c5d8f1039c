"""Mixed precision: autocast and loss scaling of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to the dtype of `precision` ("fp32", "bf16" or "fp16"); nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    # Without the cache of casts: older torch reuses those of a pass without gradients in the next one with them.
    return torch.autocast(device.type, dtype, cache_enabled=False)


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """torch's dynamic loss scaler, which does nothing unless the precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
