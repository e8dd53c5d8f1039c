"""Reading the patched weights of a MODEL or CLIP, and returning changed weights as patches on a clone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...training.formats.lora_names import TEXT, UNET


def with_unet_weights(model, weights: Mapping[str, Tensor]):
    """A clone of a MODEL whose UNet has these weights, named without `diffusion_model.`; see `set_weights`."""
    result = model.clone()
    set_weights(result, {UNET + name: value for name, value in weights.items()})
    return result


def with_text_weights(clip, weights: Mapping[str, Tensor]):
    """A clone of a CLIP with these weights, named with the prefix `text_encoders.`; see `set_weights`."""
    result = clip.clone()
    set_weights(result.patcher, {name.removeprefix(TEXT): value for name, value in weights.items()})
    return result


def set_weights(patcher, weights: Mapping[str, Tensor]) -> None:
    """Patches a new clone of a ModelPatcher so that its patched weights have these values.

    `set` patches, exact in fp32, which replace earlier `set` patches (a reset). A weight with other patches (a LoRA)
    keeps them and gets the difference as a further patch, since a `set` would overwrite them.

    Args:
        patcher: the clone, changed in place.
        weights: key in the model's state dict -> value.
    """
    for key, value in weights.items():
        if all(_is_set(patch) for patch in patcher.patches.get(key, [])):
            patcher.patches.pop(key, None)
        if key in patcher.patches:
            difference = value.detach().cpu() - patched_weight(patcher, key)
            patcher.add_patches({key: ("diff", (difference,))})
        else:
            patcher.add_patches({key: ("set", (value.detach().cpu(),))})


def _is_set(patch: tuple) -> bool:
    """Whether an entry of ModelPatcher.patches, (strength, value, strength of the model, ...), is a `set`."""
    value = patch[1]
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "set"


def patched_weight(patcher, key: str) -> Tensor:
    """A copy of a weight of a ModelPatcher in fp32 on the CPU, patches applied, whether the model is loaded or not."""
    import comfy.lora

    with torch.inference_mode(False), torch.no_grad():
        weight = base_weight(patcher, key).to("cpu", torch.float32, copy=True)
        return comfy.lora.calculate_weight(patcher.patches[key], weight, key) if key in patcher.patches else weight


def base_weight(patcher, key: str) -> Tensor:
    """A weight of a ModelPatcher without patches, wherever it is, as ComfyUI computes with it.

    Under dynamic VRAM a weight that is not loaded has its file's dtype, and one that no file has is not made yet.
    """
    import comfy.utils

    unpatched = patcher.backup.get(key)
    weight = (comfy.utils.get_attr(patcher.model, key) if unpatched is None else unpatched.weight).detach()
    if patcher.is_dynamic():
        path, _, name = key.rpartition(".")
        weight = in_declared_dtype(patcher.model.get_submodule(path), name, weight)
    if weight.is_meta:
        return torch.zeros_like(weight, device="cpu")
    return weight if type(weight) is Tensor else weight.dequantize()


def in_declared_dtype(owner: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A module's weight or buffer in the dtype that ComfyUI chose for the model; quantised ones are left alone."""
    dtype = getattr(owner, f"{name}_comfy_model_dtype", None)
    is_plain = type(weight.data) is Tensor
    return weight.to(dtype) if dtype is not None and is_plain else weight


def without_inference_tensors(module: nn.Module) -> None:
    """Replaces parameters and buffers that were made in inference mode by ordinary copies of the same values."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, value in tensors.items():
                if value is not None and value.is_inference():
                    copied = value.detach().clone()
                    is_parameter = tensors is owner._parameters
                    tensors[name] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied


def attention_weights(model) -> dict[str, Tensor]:
    """A MODEL's attention weights, named without `diffusion_model.`, in fp32, patches applied."""
    names = [
        name for name, _ in model.model.diffusion_model.named_parameters() if ".attn1." in name or ".attn2." in name
    ]
    return {name: patched_weight(model, UNET + name) for name in names}
