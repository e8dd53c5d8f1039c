"""LoRAs as patches of a MODEL and a CLIP.

ComfyUI computes LoRA, LoHa, LoKr, full differences and others, for files with kohya's names or its own. Added here: the
names of other tools, a check of every shape before anything is patched (ComfyUI would log an error while sampling and
leave the layer out), DoRA as it was trained, and sums that do not depend on the order of files.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...training.common.foreign import reading
from ...training.common.text import first_few
from ...training.demo.editions import CONV_IN, edition_of_unet
from ...training.formats.lora import Lora, LoraModule, dora_axis, parse_lora
from ...training.formats.lora_blocks import BlockWeights, block_weights
from ...training.formats.lora_keys import BIAS, kohya_aliases
from ...training.formats.lora_names import UNET
from ...training.formats.lora_report import WIDTHS, LoraReport, base_of_lora

log = logging.getLogger(__name__)

ADDITIVE = ("lora", "loha", "lokr")
"""ComfyUI's names of the adapters whose difference dW does not depend on the weight it is added to."""

T5_PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")


@dataclass(frozen=True)
class Row:
    """A LoRA to apply, as in a row of the node Apply LoRA."""

    lora: Lora
    strength_model: float
    strength_clip: float
    blocks: str = ""
    """Block weights as the user wrote them (`block_weights`)."""
    is_file: bool = True
    """Whether it was read from a file, whose metadata say which model it was made for."""


class Dora(WeightAdapterBase):
    """An adapter with learned magnitudes m (DoRA, arXiv 2402.09353): W + s (m (W + dW) / ||W + dW|| - W).

    The norm is that of the merged weight for either axis, as LyCORIS, peft and OneTrainer train it. ComfyUI's DoRA uses
    the norm of the unmerged weight where there is one magnitude per output.
    """

    name = "dora"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights  # (adapter, magnitudes m, axis of W that m runs along)

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
    """Several patches of one weight, each computed from the unpatched weight: W + s sum_i s_i (patch_i(W) - W).

    So their order does not matter, which it does where ComfyUI applies them one after the other.
    """

    name = "together"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights  # ((strength, patch), ...)

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, dtype=torch.float32, bases=None
    ):
        base = weight.clone()
        for patch_strength, patch in self.weights:
            patched = _patched(base, 1.0, patch, key, function, dtype)  # ComfyUI squares OFT's strength, ignores set's
            weight += strength * patch_strength * (patched - base)
        return weight


def _patched(weight: Tensor, strength: float, patch, key: str, function, dtype: torch.dtype) -> Tensor:
    """A copy of the weight with one patch applied by ComfyUI."""
    patches = [(strength, patch, 1.0, None, function)]
    return comfy.lora.calculate_weight(patches, weight.clone(), key, intermediate_dtype=dtype)


def _is_additive(patch) -> bool:
    """Whether a patch adds a difference that does not depend on the weight."""
    return patch[0] == "diff" if isinstance(patch, tuple) else patch.name in ADDITIVE


class PatchTarget:
    """A MODEL or CLIP to which LoRAs are applied: its weights, and the patches that are collected for them.

    Args:
        patcher: the ModelPatcher.
        names: LoRA layer name -> key of a weight, or (key, (axis, start, length)) for a slice of one.
    """

    def __init__(self, patcher, names: Mapping[str, str | tuple]):
        self.patcher, self.names = patcher, names
        self.weights = patcher.model.state_dict()
        self.patches: dict[str | tuple, list] = defaultdict(list)

    def find(self, module: LoraModule) -> str | tuple | None:
        """The weight that a LoRA layer's name stands for, as in `names`; None when there is no such name."""
        return next((self.names[name] for name in kohya_aliases(module.name) if name in self.names), None)

    def shape(self, target: str | tuple) -> tuple[int, ...] | None:
        """Shape of a weight or slice; None when there is no such weight or it is quantised."""
        key, part = (target, None) if isinstance(target, str) else target[:2]
        weight = self.weights.get(key)
        if weight is None or not weight.is_floating_point():
            return None
        shape = list(weight.shape)
        if part:
            shape[part[0]] = part[2]
        return tuple(shape)

    def has(self, target: str | tuple) -> bool:
        """Whether there is such a weight."""
        return (target if isinstance(target, str) else target[0]) in self.weights

    def read(self, module: LoraModule, target: str | tuple) -> dict[str | tuple, object]:
        """A LoRA layer as ComfyUI's patches, by weight or slice. Raises ValueError when a shape does not fit."""
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
        """A clone of `owner`, the MODEL or CLIP, with all collected patches."""
        calls = defaultdict(dict)  # (round, strength) -> patches: add_patches has one strength, and one patch a weight
        for key, parts in self.patches.items():
            additive = all(_is_additive(patch) for _, patch in parts)
            alone = len(parts) == 1 and (parts[0][0] == 1 or isinstance(parts[0][1], Dora))
            if not additive and not alone:
                parts = [(1.0, StackedPatch(set(), tuple(parts)))]
            for number, (strength, patch) in enumerate(parts):
                calls[number, strength][key] = patch
        result = owner.clone()
        for (_, strength), patches in calls.items():
            result.add_patches(patches, strength)
        return result


def apply_loras(model, clip, rows: Iterable[Row]):
    """Adds up LoRAs on a MODEL and CLIP: W' = W + sum_i strength_i dW_i.

    Args:
        model: a MODEL.
        clip: a CLIP, or None.
        rows: the LoRAs with their strengths; their order has no effect on the weights.

    Returns:
        Patched clones of MODEL and CLIP (None without one), and one LoraReport per row.

    Raises:
        ValueError: before anything is patched, when a layer does not fit.
    """
    unet = PatchTarget(model, unet_names(model))
    text = None if clip is None else PatchTarget(clip.patcher, text_names(clip))
    edition = edition_of_unet(unet.weights.get(UNET + CONV_IN))
    uses = [_add(row, unet, text, edition) for row in rows]
    return unet.patched(model), None if clip is None else text.patched(clip), uses


def _add(row: Row, unet: PatchTarget, text: PatchTarget | None, edition: str) -> LoraReport:
    """Collects one row's patches in the targets, and reports what was used."""
    strengths, has_clip = (row.strength_model, row.strength_clip), text is not None
    edition = edition if row.is_file else ""
    use = LoraReport(row.lora, *strengths, family_of(unet), edition=edition, has_clip=has_clip)
    use.unused += row.lora.other_keys
    if not row.is_file and any(is_on(target.patcher, row.lora) for target in (unet, text) if target):
        use.notes.append("it is on this model already and is now applied twice. Connect the model without it.")
    blocks = block_weights(row.blocks, unet.weights)
    names = [*unet.weights, *(text.weights if text else ())]
    if "=" in row.blocks and (unmatched := blocks.unmatched(names)):
        use.notes.append(f"block weights {first_few(unmatched)} fit no parameter's name.")
    misfits, seen = [], {}
    for module in row.lora.modules.values():
        target = unet.find(module)
        owner, strength = (unet, row.strength_model) if target is not None else (text, row.strength_clip)
        target = text.find(module) if target is None and text else target
        if target is None:
            use.unused += module.keys.values()
            continue
        try:
            patches = owner.read(module, target)
            _check_once(module, patches, seen.setdefault(owner, {}))
        except ValueError as error:
            misfits.append(f"{module.name} ({error})")
            continue
        used = _collect(patches, owner, strength, blocks, module, use)
        use.model_layers += used and owner is unet
        use.text_layers += used and owner is text
    if misfits:
        raise ValueError(_misfit_message(row.lora, misfits, use.family))
    return use


def _check_once(module: LoraModule, patches: Iterable, seen: dict) -> None:
    """Raises ValueError when another layer of the file, in `seen` by its weight, has a patch for the same weight."""
    for key in patches:
        if (other := seen.setdefault(key, module.name)) != module.name:
            raise ValueError(f"is the layer {other} again; expected each once")


def _collect(
    patches: Mapping, owner: PatchTarget, strength: float, blocks: BlockWeights, module: LoraModule, use: LoraReport
) -> bool:
    """Whether any patch of a layer has a weight in `owner`; keys of patches that have none are recorded as unused."""
    usable = {key: patch for key, patch in patches.items() if owner.has(key)}
    for key, patch in usable.items():
        weight = blocks.weight_for(key if isinstance(key, str) else key[0])
        use.zero_weight_layers += weight == 0
        if strength * weight:
            owner.patches[key].append((strength * weight, patch))
    if len(usable) < len(patches) or not usable:
        use.unused += [name for role, name in module.keys.items() if role in BIAS or not usable]
    return bool(usable)


def _misfit_message(lora: Lora, misfits: list[str], family: str) -> str:
    base = base_of_lora(lora)
    made = f" It was made for {base}, the model is {family or 'of another kind'}." if base.family else ""
    return (
        f"{lora.name} does not fit this model: {first_few(misfits, limit=3)}.{made} Nothing of it was applied. Choose "
        "a LoRA for this model, or disable its row."
    )


def _for_comfyui(module: LoraModule) -> dict[str, Tensor]:
    """A layer's tensors for ComfyUI, which leaves out a LoKr layer with Tucker factors: these are multiplied out."""
    tensors = dict(module.tensors)
    if "lokr_t2" not in tensors:
        return tensors
    core, a, b = (tensors.pop(name).float() for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
    second = torch.einsum("rs...,ro,si->oi...", core, a, b).contiguous()
    scale = module.alpha / module.rank if module.alpha is not None and "lokr_w1" in tensors else 1.0
    return tensors | {"lokr_w2": second * scale}  # ComfyUI applies no alpha to unfactorised w1 and w2


def _check_fit(size: tuple[int, int | None] | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError when a layer's rows and columns (None: unknown) are not those of a weight of this shape."""
    expected = (shape[0], torch.Size(shape[1:]).numel())
    if size is not None and (size[0] != expected[0] or size[1] not in (None, expected[1])):
        raise ValueError(f"made for {size[0]} x {size[1] or '?'}; expected {expected[0]} x {expected[1]}")


def _reshaped(difference: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A full difference in the weight's shape: some tools write a 1x1 convolution as a linear layer."""
    _check_fit((difference.shape[0], difference.shape[1:].numel()) if difference.ndim else (1, 1), shape or (1,))
    return difference.reshape(shape)


def unet_names(model) -> dict[str, str | tuple]:
    """LoRA layer name -> weight of a MODEL: ComfyUI's names, and LyCORIS's prefix before the original (LDM) names."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    extra = {f"lycoris_{n.removeprefix('lora_unet_')}": key for n, key in names.items() if n.startswith("lora_unet_")}
    return extra | names


def text_names(clip) -> dict[str, str | tuple]:
    """LoRA layer name -> weight of a CLIP: ComfyUI's names, and kohya's for a T5 in any position."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    t5_names = {}
    for key in clip.patcher.model.state_dict():
        if match := re.search(r"\.transformer\.(encoder\.(?:block|final_layer_norm)\..*|shared)\.weight$", key):
            t5_names |= {prefix + match[1].replace(".", "_"): key for prefix in T5_PREFIXES}
    return t5_names | names


def is_on(patcher, lora: Lora) -> bool:
    """Whether the patches of a MODEL or CLIP hold a layer of a LoRA, number by number."""
    parts = [value for module in lora.modules.values() for value in module.tensors.values() if value.ndim > 1]
    sought = max((part for part in parts if part.any()), key=lambda part: part.numel(), default=None)
    held = (value for patches in patcher.patches.values() for patch in patches for value in _tensors(patch[1]))
    return sought is not None and any(_are_equal(value, sought) for value in held)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (one, other)]
    return kinds[0] == kinds[1] and torch.equal(one, other)


def _tensors(part) -> Iterator[Tensor]:
    """The tensors in a patch, of whatever kind."""
    if isinstance(part, Tensor):
        yield part
    for inner in part if isinstance(part, tuple | list) else getattr(part, "weights", ()):
        yield from _tensors(inner)


def family_of(unet: PatchTarget) -> str:
    """Model family ("SD1.x", "SD2.x", "SDXL") by the width of the cross-attention's context; empty for others."""
    widths = (value.shape[1] for name, value in unet.weights.items() if name.endswith("attn2.to_k.weight"))
    return WIDTHS.get(next(widths, 0), "")


def lora_of(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Lora:
    """The LoRA in a file's or a LORA_MODEL's tensors, after ComfyUI's conversions of other formats.

    Args:
        name: for messages.
        tensors: by the file's keys.
        metadata: the file's.

    Raises:
        ValueError: as `parse_lora`.
    """
    with reading(name):
        return parse_lora(name, comfy.lora_convert.convert_lora(dict(tensors)), metadata)
