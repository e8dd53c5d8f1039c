"""Writes LoRA files that other programs read: kohya's layout, or diffusers' with peft's LoraConfig in the metadata."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..common.files import write_tensors
from ..common.text import first_few
from .lora import Lora, LoraModule, magnitude_axis, parse_lora
from .lora_keys import BIAS, DOWN, MID, PEFT, UP
from .lora_metadata import LoraDescription, build_metadata
from .lora_names import TEXT, UNET, Naming, detect_naming
from .lora_report import layout_of

log = logging.getLogger(__name__)

FORMATS = ("kohya", "diffusers")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_lora(
    path: str | Path,
    lora: Mapping[str, Tensor] | Lora,
    format: Literal["kohya", "diffusers"] = "kohya",
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    description: LoraDescription | None = None,
    *,
    base: str = "auto",
) -> list[str]:
    """Writes a LoRA as one safetensors file.

    Args:
        path: The file.
        lora: ComfyUI's LORA_MODEL (key -> tensor), or a LoRA that was read from a file.
        format: Layout of the file.
        dtype: Dtype of the stored tensors; alpha is always fp32.
        description: Facts for the metadata. A UNet2DConditionModel's config in `description.run["unet"]` decides the
            layer names, whatever `base` is.
        base: The model's family, or "auto"; see `detect_naming`.

    Returns:
        Warnings, which are logged too.

    Raises:
        ValueError: The format cannot express the LoRA, the layout of its layers is unknown, or it has numbers that are
            NaN or too large for fp16. Nothing has been written then.
    """
    description = description or LoraDescription()
    for name, value, choices in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
    lora = lora if isinstance(lora, Lora) else parse_lora("the LoRA", lora, description.file_metadata)
    naming = detect_naming(lora, base, description.unet_config)
    warnings: list[str] = []
    if lora.other_keys:
        warnings.append(f"left out {first_few(lora.other_keys)}: no part of a LoRA.")
    if format == "kohya":
        tensors, peft_metadata = kohya_tensors(lora, naming, warnings, keep=base == "auto"), {}
    else:
        tensors, peft_metadata = diffusers_tensors(lora, naming)
    tensors = _cast(tensors, DTYPES[dtype], warnings)
    write_tensors(path, tensors, build_metadata(tensors, lora, naming, description, format) | peft_metadata)
    for warning in warnings:
        log.warning("%s: %s", Path(path).name, warning)
    return warnings


def kohya_tensors(
    lora: Lora, naming: Naming, warnings: list[str] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """A LoRA's tensors under kohya's names, with an alpha for every layer that has a rank.

    Layers without a name in kohya's format (norms and embeddings of text encoders) keep ComfyUI's.

    Args:
        lora: The LoRA.
        naming: The layer naming of its model.
        warnings: Gets a line for each limitation of the result.
        keep: Whether a CLIP's layers that have kohya's names keep them, whatever the family in `naming`.

    Raises:
        ValueError: A layer's name is not understood, or two layers get one name.
    """
    result, unnamed, warnings = {}, [], [] if warnings is None else warnings
    _check_names(lora, naming)
    for module in lora.modules.values():
        layer = naming.comfyui_name(module.name)
        name = naming.own_kohya_name(module.name, clip=keep) or (naming.kohya_name(layer) if layer else None)
        if name is None:
            name = module.name
            unnamed += [name] if not name.startswith("lora_") else []
        for role, value in reshape_to_weight(module, naming.kernel_size(layer) if layer else None).items():
            if result.setdefault(f"{name}.{role}", value) is not value:
                raise ValueError(f"{lora.name} has two layers for {name}; expected one. {module.name} is spare.")
    warnings += _kohya_warnings(lora, naming, unnamed)
    return result


def _check_names(lora: Lora, naming: Naming) -> None:
    """Raises ValueError for names that are neither understood nor kohya's or ComfyUI's as they are."""
    written = ("lora_", UNET, TEXT)
    unknown = [n for n in lora.modules if not n.startswith(written) and naming.comfyui_name(n) is None]
    if unknown:
        raise ValueError(
            f"{lora.name} has {first_few(unknown)}, which are no layers of a Stable Diffusion UNet, a CLIP or a T5 "
            f"that {layout_of(lora)} files have; expected known names. Use the file as it is."
        )


def _kohya_warnings(lora: Lora, naming: Naming, unnamed: list[str]) -> list[str]:
    """Limitations of a LoRA in kohya's format; `unnamed` has the layers without a name in it."""
    warnings = []
    if unnamed:
        warnings.append(
            f"kohya's format has no name for {first_few(unnamed)}; they keep theirs, which ComfyUI alone reads."
        )
    if any(naming.dora_axis(module) == 0 for module in lora.modules.values()):
        warnings.append(
            "DoRA with a magnitude per output: ComfyUI's own loader divides by the norm of the bare weight and gives "
            "another picture; RetuneApplyLora and LyCORIS read it as it was trained."
        )
    if naming == Naming() and any(re.search(r"(in|out)put_blocks|middle_block", name) for name in lora.modules):
        warnings.append("its layers are as well SD1.x's as SDXL's; they have SD1.x's names. Choose the base.")
    return warnings


def reshape_to_weight(module: LoraModule, kernel: tuple[int, ...] | None) -> dict[str, Tensor]:
    """A layer's tensors, reshaped to the dimensions of its weight, with alpha if it has a rank.

    ComfyUI's trainer stores convolutions flat, (r, in k k) and (out, r).

    Args:
        kernel: Kernel of its weight as `Naming.kernel_size` returns it.
    """
    tensors = dict(module.tensors)
    if module.rank is not None and "alpha" not in tensors:
        tensors["alpha"] = torch.tensor(float(module.rank))
    if DOWN in tensors and MID not in tensors:
        down = tensors[DOWN]
        kernel = down.shape[2:] if kernel is None or math.prod(down.shape[2:]) > 1 else kernel
        tensors |= _reshape_pair(down, tensors[UP], kernel)
    if "dora_scale" in tensors:
        tensors["dora_scale"] = _expand_magnitude(module, tensors["dora_scale"], kernel or ())
    return tensors


def _reshape_pair(down: Tensor, up: Tensor, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    """lora_down as (r, in, *kernel) and lora_up as (out, r, 1, ...)."""
    return {
        DOWN: down.reshape(down.shape[0], -1, *kernel),
        UP: up.reshape(up.shape[0], up.shape[1], *(1 for _ in kernel)),
    }


def diffusers_tensors(lora: Lora, naming: Naming) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA's tensors and metadata for diffusers' `load_lora_weights`.

    Tensors are named `<component>.<path>.lora_A.weight`; alpha is in peft's LoraConfig in the metadata.

    Raises:
        ValueError: A layer is not LoRA, LoCon or DoRA with a magnitude per output.
    """
    result: dict[str, Tensor] = {}
    components: dict[str, dict[str, LoraModule]] = {}
    for module in lora.modules.values():
        layer = naming.comfyui_name(module.name)
        location = naming.diffusers_path(layer) if layer else None
        _check_peft(lora, module, location is not None, naming.dora_axis(module))
        component, path = location
        tensors = _merge_tucker_core(reshape_to_weight(module, naming.kernel_size(layer)))
        if path in components.setdefault(component, {}):
            raise ValueError(
                f"{lora.name} has two layers for {component}.{path}; expected one, {module.name} too many."
            )
        components[component][path] = LoraModule(module.name, tensors, {})
        result |= {f"{component}.{path}.{role}": value for role, value in _to_peft(tensors).items()}
    settings = {}
    for component, modules in components.items():
        settings |= {f"{component}.{key}": value for key, value in peft_settings(lora.name, modules).items()}
    return result, {"format": "pt", PEFT: json.dumps(settings, sort_keys=True)}


def peft_settings(name: str, modules: Mapping[str, LoraModule]) -> dict:
    """The fields of peft's LoraConfig for one component: the most frequent rank and alpha, patterns for the others.

    Paths have no `text_model.` prefix, which transformers 5 dropped: peft compares the ends of names.

    Args:
        name: Name of the LoRA, for messages.
        modules: Path in the component -> layer.
    """
    ranks = {path.removeprefix("text_model."): module.rank for path, module in modules.items()}
    alphas = {path.removeprefix("text_model."): module.alpha for path, module in modules.items()}
    doras = {"dora_scale" in module.tensors for module in modules.values()}
    if len(doras) > 1:
        raise ValueError(f"{name} is DoRA in a part of its layers; diffusers takes all or none. Save it as kohya.")
    other = {"target_modules": sorted(ranks), "use_dora": doras == {True}, "bias": "none"}
    return _ranks_and_alphas(ranks, alphas) | other


def _ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict:
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _int_if_whole(alpha),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: _int_if_whole(value) for path, value in alphas.items() if value != alpha},
    }


def _int_if_whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _check_peft(lora: Lora, module: LoraModule, has_name: bool, axis: int | None) -> None:
    """Raises ValueError for a layer that diffusers' format cannot express; arguments as in `_reason_against_peft`."""
    reason = _reason_against_peft(module, has_name, axis)
    if reason:
        hint = " (resize-lora turns LoHa, LoKr and full differences into LoRA)" if "LoRA and DoRA" in reason else ""
        raise ValueError(f"{lora.name} has {module.name}: {reason}. Save it as kohya{hint}.")


def _reason_against_peft(module: LoraModule, has_name: bool, axis: int | None) -> str:
    """Why diffusers' format cannot express a layer; "" if it can.

    Args:
        has_name: Whether the layer has a name in diffusers.
        axis: Axis of its DoRA magnitude, see `dora_axis`.
    """
    if not has_name:
        return "diffusers' loader takes no such layer"
    if DOWN not in module.tensors:
        return f"it is {module.kind}, and diffusers' format holds LoRA and DoRA alone"
    if unsupported := [role for role in module.tensors if role in (*BIAS, "reshape_weight", "diff", "set_weight")]:
        return f"it has {first_few(unsupported)}, for which diffusers' format has no place"
    if axis == 1:
        return "its DoRA has a magnitude per input, and peft knows one per output alone"
    return ""


def _merge_tucker_core(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies the core of a Tucker LoCon into its down projection, which gives the same dW."""
    if MID not in tensors:
        return tensors
    core, down, up = (tensors[name].float() for name in (MID, DOWN, UP))
    down = torch.einsum("mn...,ni->mi...", core, down.flatten(1))
    up = up.reshape(*up.shape[:2], *(1 for _ in down.shape[2:]))
    return {name: value for name, value in tensors.items() if name != MID} | {DOWN: down, UP: up}


def _to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors under peft's names; DoRA magnitudes are (out,), for convolutions (1, out, 1, 1).

    peft writes a magnitude's name without `.weight` and reads both forms; transformers 5 reads those of text encoders
    with `.weight` only.
    """
    result = {"lora_A.weight": tensors[DOWN], "lora_B.weight": tensors[UP]}
    if "dora_scale" in tensors:
        scale = tensors["dora_scale"].flatten()
        result["lora_magnitude_vector.weight"] = scale.reshape(1, -1, 1, 1) if tensors[DOWN].ndim == 4 else scale
    return result


def _expand_magnitude(module: LoraModule, scale: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A DoRA magnitude in LyCORIS's shape, (out, 1, ...) or (1, in, ...), with as many axes as the weight."""
    kernel = kernel or (module.tensors[DOWN].shape[2:] if DOWN in module.tensors else ()) or scale.shape[2:]
    ones = (1 for _ in kernel)
    return scale.reshape(-1, 1, *ones) if magnitude_axis(module, kernel) == 0 else scale.reshape(1, -1, *ones)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, warnings: list[str]) -> dict[str, Tensor]:
    """Casts tensors, except alpha, to the file's dtype. Raises ValueError for overflow, warns of underflow to 0."""
    result, underflowed = {}, []
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu()
        if name.endswith(".alpha"):
            result[name] = tensor.reshape(()).to(torch.float32, copy=True)
        elif not tensor.is_floating_point():
            result[name] = tensor.clone()
        else:
            result[name] = _cast_weight(name, tensor, dtype)
            if ((result[name] == 0) & (tensor != 0)).float().mean() > 0.01:
                underflowed.append(name)
    if underflowed:
        warnings.append(
            f"a part of {first_few(underflowed)} is too small for {str(dtype)[6:]} and becomes 0; fp32 keeps it."
        )
    return result


def _cast_weight(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast copy; ValueError if a value overflows."""
    result = tensor.to(dtype, copy=True)
    if not torch.isfinite(result.float()).all():
        largest = tensor.float().abs().max().item()
        raise ValueError(f"{name} holds {largest:.3g}; fp16 ends at 65504. Choose dtype bf16 or fp32.")
    return result
