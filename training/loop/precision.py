"""Mixed precision: what "auto" is on a device, autocast and loss scaling of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: torch.device, scaled: bool = True) -> str:
    """What precision "auto" is on a device, by its kind alone: a run is then the same on every such device.

    bf16 where the card computes in it, fp16 on older NVIDIA cards, and fp32 on CPUs and Apple GPUs.

    Args:
        device: where the run computes.
        scaled: whether the run's gradients survive fp16 with loss scaling; without, older cards compute in fp32.
    """
    if has_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" and scaled else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU has units for bf16: NVIDIA's since Ampere, AMD's under ROCm, Intel's where torch says so."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "xpu" and torch.xpu.is_bf16_supported()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to the dtype of `precision`, "auto" being the device's default; nothing for fp32."""
    dtype = DTYPES[default_precision(device) if precision == "auto" else precision]
    if dtype == torch.float32:
        return nullcontext()
    # Without the cache of casts: older torch reuses those of a pass without gradients in the next one with them.
    return torch.autocast(device.type, dtype, cache_enabled=False)


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """torch's dynamic loss scaler, which does nothing unless the precision is fp16."""
    precision = default_precision(device) if precision == "auto" else precision
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
