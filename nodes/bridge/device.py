"""Where weights are while a model trains, and how training differs from ComfyUI's inference.

ComfyUI moves weights between memories, may hold them in evictable memory (dynamic VRAM), runs nodes in inference mode
and casts weights for inference only. Everything that undoes this for a training step is here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def training_mode() -> Iterator[None]:
    """While entered, autograd works: ComfyUI's inference mode is off, and its kernels are told to support gradients."""
    import comfy.model_management

    previous = getattr(comfy.model_management, "in_training", False)
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = previous


def load_fully(patchers: Sequence, memory: int = 0) -> None:
    """Loads ModelPatchers whole, patches applied, on their devices, with `memory` bytes left free for activations."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([*patchers], memory_required=memory, force_full_load=True)


def without_inference_tensors(module: nn.Module) -> None:
    """Replaces parameters and buffers that were made in inference mode by ordinary copies of the same values."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, value in tensors.items():
                if value is not None and value.is_inference():
                    copied = value.detach().clone()
                    is_parameter = tensors is owner._parameters
                    tensors[name] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied


@contextmanager
def casting_weights(network: nn.Module) -> Iterator[None]:
    """While entered, layers cast weights to their input's dtype, so that fp16 weights work with fp32 masters."""
    is_fp32 = {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    layers = [m for m in network.modules() if not is_fp32 and getattr(m, "comfy_cast_weights", None) is False]
    try:
        for layer in layers:
            layer.comfy_cast_weights = True
        yield
    finally:
        for layer in layers:
            layer.comfy_cast_weights = False


def is_dynamic(patcher) -> bool:
    """Whether a ModelPatcher uses dynamic VRAM, where weights come and go while a module runs."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def static_clone(patcher):
    """A clone of a ModelPatcher; under dynamic VRAM one that shares no weights and keeps them where they are."""
    return patcher.clone(disable_dynamic=True) if is_dynamic(patcher) else patcher.clone()


def static_clip(clip):
    """The CLIP itself; under dynamic VRAM a clone that shares no weights and keeps them where they are."""
    if not is_dynamic(clip.patcher):
        return clip
    static = clip.clone(disable_dynamic=True)
    static.cond_stage_model = static.patcher.model
    return static


def static_vae(vae):
    """The VAE itself; under dynamic VRAM a copy that shares no weights and keeps them where they are."""
    if not is_dynamic(vae.patcher):
        return vae
    static = copy.copy(vae)
    static.patcher = vae.patcher.clone(disable_dynamic=True)
    static.first_stage_model = static.patcher.model
    return static
