"""Models whose weights stay where they are, for those under dynamic VRAM, where weights come and go.

ComfyUI makes such a clone with `clone(disable_dynamic=True)`: it reads the model again by the recipe that the loader
left in `cached_patcher_init`. Where a loader left none, the weights are copied. Neither shares weights with the
original.
"""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...training.models.stored import is_quantised
from ..common.weights import in_declared_dtype, without_inference_tensors

MANAGED = (
    "_v",
    "_v_bias",
    "_v_block",
    "_v_signature",
    "_v_weight",
    "_pins",
    "_pin_state",
    "_prefetch",
    "bias_function",
    "bias_lowvram_function",
    "comfy_cast_weights",
    "dynamic_patchers",
    "dynamic_pins",
    "dynamic_vbars",
    "seed_key",
    "weight_function",
    "weight_lowvram_function",
)
"""Attributes that dynamic VRAM sets on a model and its modules: where their weights are, and what is done to them."""


def is_dynamic(patcher) -> bool:
    """Whether a ModelPatcher uses dynamic VRAM."""
    return patcher.is_dynamic()


def static_clone(patcher):
    """A clone of a ModelPatcher; under dynamic VRAM one with weights of its own, which stay where they are.

    Raises ValueError for a model under dynamic VRAM that can be neither read again nor copied, or has a bypass LoRA.
    """
    if not is_dynamic(patcher):
        return patcher.clone()
    _expect_no_bypass(patcher)
    source = patcher.clone()
    if source.cached_patcher_init is None:
        source.cached_patcher_init = (_copied, (patcher,))
    static = source.clone(disable_dynamic=True)
    static.cached_patcher_init = patcher.cached_patcher_init
    _cast_as_declared(static.model)
    static.size = 0  # of the original's file; ComfyUI measures it again
    return static


def _expect_no_bypass(patcher) -> None:
    """Raises ValueError for what is injected into the very layers of a model, where a copy would lack it."""
    if patcher.injections:
        raise ValueError(
            f"{type(patcher.model).__name__} carries a LoRA that is put on without merging (bypass); expected one in "
            "the weights, of which training under dynamic VRAM has a copy. Use ComfyUI's Load LoRA or Apply LoRA, or "
            "start ComfyUI with --disable-dynamic-vram."
        )


def static_clip(clip):
    """The CLIP itself; under dynamic VRAM a clone with weights of its own, which stay where they are."""
    if not is_dynamic(clip.patcher) or clip.cond_stage_model is not clip.patcher.model:
        return clip  # a blend, which has no weights of its own, says so itself
    static = clip.clone()
    static.patcher = static_clone(clip.patcher)
    static.cond_stage_model = static.patcher.model
    return static


def static_vae(vae):
    """The VAE itself; under dynamic VRAM a copy with weights of its own, which stay where they are."""
    if not is_dynamic(vae.patcher):
        return vae
    static = copy.copy(vae)
    static.patcher = static_clone(vae.patcher)
    static.first_stage_model = static.patcher.model.to(vae.vae_dtype)  # as without dynamic VRAM
    return static


def _copied(patcher, disable_dynamic: bool = True):
    """A ModelPatcher without dynamic VRAM around a copy of another's model: a recipe for one that has none."""
    import comfy.model_management
    import comfy.model_patcher

    # Takes loaded weights, object patches and injections of all clones off the model.
    comfy.model_management.unload_model_and_clones(patcher, unload_additional_models=False, all_devices=True)
    with torch.inference_mode(False):
        model = _copied_model(patcher.model)
    return comfy.model_patcher.ModelPatcher(model, patcher.load_device, patcher.offload_device)


def _copied_model(model: nn.Module) -> nn.Module:
    """A copy of a model's modules and tensors, without what dynamic VRAM set on it; other objects are shared.

    Raises ValueError where that cannot be copied.
    """
    quantised = (value for value in model.parameters() if is_quantised(value))  # which deepcopy knows nothing of
    clones = {id(value): nn.Parameter(value.detach().clone(), requires_grad=False) for value in quantised}
    try:
        copied = copy.deepcopy(model, _not_copied(model) | clones)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} comes from a loader that ComfyUI's dynamic VRAM cannot read again, and cannot be "
            f"copied ({error}); expected a model of a loader that leaves a recipe. Load it with ComfyUI's own loader, "
            "or start ComfyUI with --disable-dynamic-vram."
        ) from error
    for module in copied.modules():
        for name in MANAGED:
            vars(module).pop(name, None)
    return copied


def _not_copied(model: nn.Module) -> dict[int, Any]:
    """copy.deepcopy's memo for a model: what stands in the copy for the objects that are not copied themselves."""
    memo: dict[int, Any] = {}
    waiting, seen = [model], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, Tensor | MethodType | partial):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            attributes = vars(value)
            managed = [attributes[name] for name in (*MANAGED, "current_patcher") if name in attributes]
            memo |= {id(each): None for each in managed if not isinstance(each, bool | int | str | None)}
            waiting += attributes.values()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        else:
            memo.setdefault(id(value), value)
    return memo


def _cast_as_declared(model: nn.Module) -> None:
    """Gives weights the dtypes that ComfyUI chose for the model, which dynamic VRAM leaves for later, in place."""
    with torch.inference_mode(False), torch.no_grad():
        without_inference_tensors(model)
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    cast = in_declared_dtype(module, name, value)
                    if cast is not value:
                        module._parameters[name] = nn.Parameter(cast, requires_grad=False)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = in_declared_dtype(module, name, value)
