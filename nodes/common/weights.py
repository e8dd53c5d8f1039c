"""Reading the patched weights of a MODEL or CLIP, and returning changed weights as patches on a clone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...training.formats.lora_names import TEXT, UNET


def with_unet_weights(model, weights: Mapping[str, Tensor]):
    """A clone of a MODEL whose UNet has these weights (names without `diffusion_model.`); see `set_weights`."""
    result = model.clone()
    set_weights(result, {UNET + name: value for name, value in weights.items()})
    return result


def with_text_weights(clip, weights: Mapping[str, Tensor]):
    """A clone of a CLIP with these weights (names with `text_encoders.` before ComfyUI's); see `set_weights`."""
    result = clip.clone()
    set_weights(result.patcher, {name.removeprefix(TEXT): value for name, value in weights.items()})
    return result


def set_weights(patcher, weights: Mapping[str, Tensor]) -> None:
    """Gives a fresh clone of a ModelPatcher these weights.

    `set` patches, exact in fp32. A weight that carries other patches (a LoRA) keeps them and gets the difference as one
    more patch, since a `set` would wipe them; earlier `set` patches (a reset) are replaced.
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
    """Whether an entry of ModelPatcher.patches is a `set`: (strength, value, strength of the model, ...)."""
    value = patch[1]
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "set"


def patched_weight(model, key: str) -> Tensor:
    """A weight of a MODEL in fp32 on the CPU, its patches applied, wherever the model is loaded."""
    import comfy.lora
    import comfy.utils

    held = model.backup.get(key)
    weight = comfy.utils.get_attr(model.model, key) if held is None else held.weight
    with torch.inference_mode(False), torch.no_grad():
        weight = weight.detach().to("cpu", torch.float32, copy=True)
        return comfy.lora.calculate_weight(model.patches[key], weight, key) if key in model.patches else weight


def attention_weights(model) -> dict[str, Tensor]:
    """Names (without `diffusion_model.`) and fp32 values of a MODEL's attention weights, patches applied."""
    names = [
        name for name, _ in model.model.diffusion_model.named_parameters() if ".attn1." in name or ".attn2." in name
    ]
    return {name: patched_weight(model, UNET + name) for name in names}
