"""LoRAs as patches of a MODEL and a CLIP: ComfyUI's own, and what these lack.

ComfyUI reads the tensors and works out LoRA, LoHa, LoKr, full diffs and their kin; it knows kohya's and its own names.
Here: the names of the other tools, a check of every shape before anything is patched (ComfyUI would log an error while
sampling and leave the layer out), DoRA as it was trained, and sums that do not depend on the order of files.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...training.common.text import first_few
from ...training.formats.lora import Lora, LoraModule, dora_axis, parse_lora
from ...training.formats.lora_blocks import BlockWeights, block_weights
from ...training.formats.lora_keys import BIAS, kohya_aliases
from ...training.formats.lora_report import WIDTHS, LoraReport, base_of_lora

log = logging.getLogger(__name__)

ADDITIVE = ("lora", "loha", "lokr")
"""ComfyUI's names of the kinds whose difference does not depend on the weight they are added to."""


@dataclass(frozen=True)
class Row:
    """A LoRA to put on, with its strengths and its block weights as text."""

    lora: Lora
    strength_model: float
    strength_clip: float
    blocks: str = ""


class Dora(WeightAdapterBase):
    """Another adapter whose result is brought to learned magnitudes: W + s (m (W + dW) / ||W + dW|| - W).

    As it was trained (arXiv 2402.09353, LyCORIS, peft, OneTrainer), with the norm of the merged weight for both axes;
    ComfyUI's own takes the norm of the bare weight when there is one magnitude per output.
    """

    name = "dora"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights  # (adapter, magnitudes, their axis)

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, dtype=torch.float32, bases=None
    ):
        patch, magnitudes, axis = self.weights
        merged = _patched(weight, 1.0, patch, key, function, dtype).float()
        norm = torch.linalg.vector_norm(merged, dim=[d for d in range(merged.ndim) if d != axis], keepdim=True)
        magnitudes = comfy.model_management.cast_to_device(magnitudes, weight.device, torch.float32)
        scaled = merged * magnitudes.reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps)
        weight += (strength * (scaled - weight)).to(weight.dtype)
        return weight


class StackedPatch(WeightAdapterBase):
    """Several patches with their strengths, each worked out on the weight as it came: their order does not matter."""

    name = "together"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights  # ((strength, patch), ...)

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, dtype=torch.float32, bases=None
    ):
        base = weight.clone()
        for own_strength, patch in self.weights:  # at strength 1: ComfyUI squares that of OFT, and ignores that of set
            weight += strength * own_strength * (_patched(base, 1.0, patch, key, function, dtype) - base)
        return weight


def _patched(weight: Tensor, strength: float, patch, key: str, function, dtype: torch.dtype) -> Tensor:
    patches = [(strength, patch, 1.0, None, function)]
    return comfy.lora.calculate_weight(patches, weight.clone(), key, intermediate_dtype=dtype)


def _is_linear(patch) -> bool:
    return patch[0] == "diff" if isinstance(patch, tuple) else patch.name in ADDITIVE


class PatchTarget:
    """The network of a MODEL or CLIP: shapes of its weights, and which of them the names of LoRA layers mean."""

    def __init__(self, patcher, names: Mapping[str, str | tuple]):
        self.patcher, self.names = patcher, names
        self.weights = patcher.model.state_dict()
        self.patches: dict[str | tuple, list] = defaultdict(list)

    def find(self, module: LoraModule) -> str | tuple | None:
        """The weight that a layer's name means: its key, or (key, (axis, start, length)) for a part of one."""
        return next((self.names[name] for name in kohya_aliases(module.name) if name in self.names), None)

    def shape(self, target: str | tuple) -> tuple[int, ...] | None:
        """None when there is no such weight or it is packed (quantised)."""
        key, part = (target, None) if isinstance(target, str) else target[:2]
        weight = self.weights.get(key)
        if weight is None or not weight.is_floating_point():
            return None
        shape = list(weight.shape)
        if part:
            shape[part[0]] = part[2]
        return tuple(shape)

    def holds(self, target: str | tuple) -> bool:
        return (target if isinstance(target, str) else target[0]) in self.weights

    def read(self, module: LoraModule, target: str | tuple) -> dict[str | tuple, object]:
        """ComfyUI's patches of a layer, by the weights they are for. Raises ValueError when a shape does not fit."""
        tensors = {f"x.{name}": value for name, value in _for_comfyui(module).items() if name != "dora_scale"}
        patches = comfy.lora.load_lora(tensors, {"x": target}, log_missing=False)
        for key, patch in patches.items():
            shape = self.shape(key)
            if shape is not None and isinstance(patch, tuple):
                patches[key] = (patch[0], (_reshaped(patch[1][0], shape),))
            elif shape is not None and "reshape_weight" not in module.tensors:
                _check_fit(module.shape, shape)
        if "dora_scale" in module.tensors and target in patches:
            scale = module.tensors["dora_scale"]
            axis = dora_axis(scale, self.shape(target) or module.shape)
            patches[target] = Dora(set(), (patches[target], scale, axis))
        return patches

    def patched(self, owner):
        """A clone of `owner` (the MODEL or CLIP) with all patches that were put here."""
        calls = defaultdict(dict)
        for key, parts in self.patches.items():
            linear = all(_is_linear(patch) for _, patch in parts)
            alone = len(parts) == 1 and (parts[0][0] == 1 or isinstance(parts[0][1], Dora))
            if not linear and not alone:
                parts = [(1.0, StackedPatch(set(), tuple(parts)))]
            for turn, (strength, patch) in enumerate(parts):
                calls[turn, strength][key] = patch
        result = owner.clone()
        for (_, strength), patches in calls.items():
            result.add_patches(patches, strength)
        return result


def apply_loras(model, clip, rows: Iterable[Row]):
    """(MODEL, CLIP, uses): clones with all rows added up, W' = W + sum of strength_i dW_i, and one LoraUse per row.

    Raises ValueError before anything is patched when a layer does not fit. clip may be None.
    """
    unet = PatchTarget(model, unet_names(model))
    text = None if clip is None else PatchTarget(clip.patcher, text_names(clip))
    uses = [_add(row, unet, text) for row in rows]
    return unet.patched(model), None if clip is None else text.patched(clip), uses


def _add(row: Row, unet: PatchTarget, text: PatchTarget | None) -> LoraReport:
    """Puts one row's patches into the targets."""
    use = LoraReport(row.lora, row.strength_model, row.strength_clip, family_of(unet), has_clip=text is not None)
    use.unused += row.lora.other_keys
    blocks = block_weights(row.blocks, unet.weights)
    known = [*unet.weights, *(text.weights if text else ())]
    if "=" in row.blocks and (idle := blocks.unmatched(known)):
        use.notes.append(f"block weights {first_few(idle)} fit no parameter's name.")
    misfits = []
    for module in row.lora.modules.values():
        target = unet.find(module)
        owner, strength = (unet, row.strength_model) if target is not None else (text, row.strength_clip)
        target = text.find(module) if target is None and text else target
        if target is None:
            use.unused += module.keys.values()
            continue
        try:
            patches = owner.read(module, target)
        except ValueError as error:
            misfits.append(f"{module.name} ({error})")
            continue
        used = _put(patches, owner, strength, blocks, module, use)
        use.model_layers += used and owner is unet
        use.text_layers += used and owner is text
    if misfits:
        raise ValueError(_misfit_message(row.lora, misfits, use.family))
    return use


def _put(
    patches: Mapping, owner: PatchTarget, strength: float, blocks: BlockWeights, module: LoraModule, use: LoraReport
):
    """Whether any of a layer's patches has a weight to go on; keys of those that have none are noted as unused."""
    held = {key: patch for key, patch in patches.items() if owner.holds(key)}
    for key, patch in held.items():
        weight = blocks.weight_for(key if isinstance(key, str) else key[0])
        use.zero_weight_layers += weight == 0
        if strength * weight:
            owner.patches[key].append((strength * weight, patch))
    if len(held) < len(patches) or not held:
        use.unused += [name for role, name in module.keys.items() if role in BIAS or not held]
    return bool(held)


def _misfit_message(lora: Lora, misfits: list[str], family: str) -> str:
    base = base_of_lora(lora)
    made = f" It was made for {base}, the model is {family or 'of another kind'}." if base.family else ""
    return (
        f"{lora.name} does not fit this model: {first_few(misfits, limit=3)}.{made} Nothing of it was applied. Choose "
        "a LoRA for this model, or disable its row."
    )


def _for_comfyui(module: LoraModule) -> dict[str, Tensor]:
    """A layer's tensors, LoKr's Tucker factors multiplied out: ComfyUI fails on them and leaves the layer out."""
    tensors = dict(module.tensors)
    if "lokr_t2" not in tensors:
        return tensors
    core, a, b = (tensors.pop(name).float() for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
    second = torch.einsum("rs...,ro,si->oi...", core, a, b).contiguous()
    scale = module.alpha / module.rank if module.alpha is not None and "lokr_w1" in tensors else 1.0
    return tensors | {"lokr_w2": second * scale}  # with both factors whole ComfyUI takes no alpha


def _check_fit(found: tuple[int, int | None] | None, shape: tuple[int, ...]) -> None:
    """found: rows and columns that a layer makes, None for what is not known."""
    wanted = (shape[0], torch.Size(shape[1:]).numel())
    if found is not None and (found[0] != wanted[0] or found[1] not in (None, wanted[1])):
        raise ValueError(f"made for {found[0]} x {found[1] or '?'}; expected {wanted[0]} x {wanted[1]}")


def _reshaped(difference: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A full difference in a weight's shape: 1x1 convolutions are linear layers elsewhere."""
    _check_fit((difference.shape[0], difference.shape[1:].numel()) if difference.ndim else (1, 1), shape or (1,))
    return difference.reshape(shape)


def unet_names(model) -> dict[str, str | tuple]:
    """LoRA layer name -> weight of a MODEL: ComfyUI's table, and LyCORIS's prefix before the original names."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    extra = {f"lycoris_{n.removeprefix('lora_unet_')}": key for n, key in names.items() if n.startswith("lora_unet_")}
    return extra | names


def text_names(clip) -> dict[str, str | tuple]:
    """LoRA layer name -> weight of a CLIP: ComfyUI's table, and kohya's names for a T5 of any size and place."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    extra = {}
    for key in clip.patcher.model.state_dict():
        if match := re.search(r"\.transformer\.(encoder\.(?:block|final_layer_norm)\..*|shared)\.weight$", key):
            extra |= {f"{start}{match[1].replace('.', '_')}": key for start in ("lora_te_", *T5_STARTS)}
    return extra | names


T5_STARTS = ("lora_te1_", "lora_te2_", "lora_te3_")


def family_of(unet: PatchTarget) -> str:
    """SD1.x, SD2.x or SDXL by the width that cross-attention reads; empty for others."""
    widths = (value.shape[1] for name, value in unet.weights.items() if name.endswith("attn2.to_k.weight"))
    return WIDTHS.get(next(widths, 0), "")


def lora_of(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Lora:
    """A file's tensors, or a LORA_MODEL's, after ComfyUI's own conversions. Raises ValueError as `parse_lora`."""
    return parse_lora(name, comfy.lora_convert.convert_lora(dict(tensors)), metadata)
