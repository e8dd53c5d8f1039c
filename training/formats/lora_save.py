"""LoRA files as other programs read them: kohya's layout, and diffusers' with peft's settings in the metadata."""

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
from .lora import BIAS, DOWN, MID, PEFT, UP, Lora, LoraModule, magnitude_axis, parse_lora
from .lora_metadata import LoraDescription, build_metadata
from .lora_names import Naming, detect_naming

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
    """Writes a LORA_MODEL's tensors, or a LoRA that was read, as one safetensors file; warnings, which are logged too.

    base: the model's family or "auto", see `detect_naming`; description.run["unet"], a UNet2DConditionModel's config,
    goes before both. alpha stays fp32 in every dtype. Raises ValueError, before anything is written, for what the format
    cannot express, layers of an unknown layout, NaN, or values beyond fp16.
    """
    description = description or LoraDescription()
    for name, value, known in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
    lora = lora if isinstance(lora, Lora) else parse_lora("the LoRA", lora, description.file_metadata)
    naming = detect_naming(lora, base, description.unet_config)
    warnings: list[str] = []
    if lora.other_keys:
        warnings.append(f"left out {first_few(lora.other_keys)}: no part of a LoRA.")
    if format == "kohya":
        tensors, more = kohya_tensors(lora, naming, warnings), {}
    else:
        tensors, more = diffusers_tensors(lora, naming)
    tensors = _stored(tensors, DTYPES[dtype], warnings)
    write_tensors(path, tensors, build_metadata(tensors, lora, naming, description, format) | more)
    for warning in warnings:
        log.warning("%s: %s", Path(path).name, warning)
    return warnings


def kohya_tensors(lora: Lora, naming: Naming, warnings: list[str] | None = None) -> dict[str, Tensor]:
    """The tensors under kohya's names, alpha written out for every layer that has a rank.

    Layers without a name there (norms and embeddings of text encoders) keep ComfyUI's, with a warning.
    """
    result, kept, warnings = {}, [], [] if warnings is None else warnings
    for module in lora.modules.values():
        layer = naming.comfyui_name(module.name)
        name = naming.kohya_name(layer) if layer else None
        if name is None:
            name = module.name
            kept += [name] if not name.startswith("lora_") else []
        for role, value in reshape_to_weight(module, naming.kernel_size(layer) if layer else None).items():
            if result.setdefault(f"{name}.{role}", value) is not value:
                raise ValueError(f"{lora.name} has two layers for {name}; expected one. {module.name} is spare.")
    if kept:
        warnings.append(
            f"kohya's format has no name for {first_few(kept)}; they keep theirs, which ComfyUI alone reads."
        )
    if any(naming.dora_axis(module) == 0 for module in lora.modules.values()):
        warnings.append(
            "DoRA with a magnitude per output: ComfyUI's own loader divides by the norm of the bare weight and gives "
            "another picture; RetuneApplyLora and LyCORIS read it as it was trained."
        )
    if naming == Naming() and any(re.search(r"(in|out)put_blocks|middle_block", name) for name in lora.modules):
        warnings.append("its layers are as well SD1.x's as SDXL's; they have SD1.x's names. Choose the base.")
    return result


def reshape_to_weight(module: LoraModule, kernel: tuple[int, ...] | None) -> dict[str, Tensor]:
    """A layer's tensors in the shapes that its weight asks for, with alpha where it has a rank.

    kernel: as `Naming.kernel_size`. ComfyUI's trainer stores convolutions flat, (r, in k k) and (out, r).
    """
    tensors = dict(module.tensors)
    if module.rank is not None and "alpha" not in tensors:
        tensors["alpha"] = torch.tensor(float(module.rank))
    if DOWN in tensors and MID not in tensors:
        down, up = tensors[DOWN], tensors[UP]
        kernel = down.shape[2:] if kernel is None or math.prod(down.shape[2:]) > 1 else kernel
        tensors[DOWN] = down.reshape(down.shape[0], -1, *kernel)
        tensors[UP] = up.reshape(up.shape[0], up.shape[1], *(1 for _ in kernel))
    if "dora_scale" in tensors:
        tensors["dora_scale"] = _magnitudes(module, tensors["dora_scale"], kernel or ())
    return tensors


def diffusers_tensors(lora: Lora, naming: Naming) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as `load_lora_weights` reads them: `<component>.<path>.lora_A.weight`, alpha as peft's.

    Raises ValueError with the reason for whatever is no LoRA, LoCon or DoRA with a magnitude per output.
    """
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, LoraModule]] = {}
    for module in lora.modules.values():
        layer = naming.comfyui_name(module.name)
        named = naming.diffusers_path(layer) if layer else None
        _check_peft(lora, module, named is not None, naming.dora_axis(module))
        component, path = named
        tensors = _without_core(reshape_to_weight(module, naming.kernel_size(layer)))
        if path in parts.setdefault(component, {}):
            raise ValueError(
                f"{lora.name} has two layers for {component}.{path}; expected one, {module.name} too many."
            )
        parts[component][path] = LoraModule(module.name, tensors, {})
        result |= {f"{component}.{path}.{role}": value for role, value in _peft(tensors).items()}
    settings = {}
    for component, modules in parts.items():
        settings |= {f"{component}.{key}": value for key, value in peft_settings(lora.name, modules).items()}
    return result, {"format": "pt", PEFT: json.dumps(settings, sort_keys=True)}


def peft_settings(name: str, modules: Mapping[str, LoraModule]) -> dict:
    """LoraConfig's fields for one component's layers: the commonest rank and alpha, the others by pattern.

    Paths stand without `text_model.`, which transformers 5 dropped: peft compares the ends of names.
    """
    ranks = {path.removeprefix("text_model."): module.rank for path, module in modules.items()}
    alphas = {path.removeprefix("text_model."): module.alpha for path, module in modules.items()}
    doras = {"dora_scale" in module.tensors for module in modules.values()}
    if len(doras) > 1:
        raise ValueError(f"{name} is DoRA in a part of its layers; diffusers takes all or none. Save it as kohya.")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: _plain(value) for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": doras == {True},
        "bias": "none",
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _check_peft(lora: Lora, module: LoraModule, has_name: bool, axis: int | None) -> None:
    """Raises ValueError for a layer that diffusers' format cannot hold."""
    reason = None
    if not has_name:
        reason = "diffusers' loader takes no such layer"
    elif DOWN not in module.tensors:
        reason = f"it is {module.kind}, and diffusers' format holds LoRA and DoRA alone"
    elif more := [role for role in module.tensors if role in (*BIAS, "reshape_weight", "diff", "set_weight")]:
        reason = f"it has {first_few(more)}, for which diffusers' format has no place"
    elif axis == 1:
        reason = "its DoRA has a magnitude per input, and peft knows one per output alone"
    if reason:
        text = " (resize-lora turns LoHa, LoKr and full differences into LoRA)" if "LoRA and DoRA" in reason else ""
        raise ValueError(f"{lora.name} has {module.name}: {reason}. Save it as kohya{text}.")


def _without_core(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Tucker LoCon's core multiplied into its down projection, which is the same weight."""
    if MID not in tensors:
        return tensors
    core, down, up = (tensors[name].float() for name in (MID, DOWN, UP))
    down = torch.einsum("mn...,ni->mi...", core, down.flatten(1))
    up = up.reshape(*up.shape[:2], *(1 for _ in down.shape[2:]))
    return {name: value for name, value in tensors.items() if name != MID} | {DOWN: down, UP: up}


def _peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under peft's names; its magnitudes are (out,), for convolutions (1, out, 1, 1).

    peft leaves `.weight` off a magnitude's name and reads both; transformers 5 reads a text encoder's with it alone.
    """
    result = {"lora_A.weight": tensors[DOWN], "lora_B.weight": tensors[UP]}
    if "dora_scale" in tensors:
        scale = tensors["dora_scale"].flatten()
        result["lora_magnitude_vector.weight"] = scale.reshape(1, -1, 1, 1) if tensors[DOWN].ndim == 4 else scale
    return result


def _magnitudes(module: LoraModule, scale: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """As LyCORIS has them, (out, 1, ...) or (1, in, ...), with as many axes as the weight."""
    kernel = kernel or (module.tensors[DOWN].shape[2:] if DOWN in module.tensors else ()) or scale.shape[2:]
    ones = (1 for _ in kernel)
    return scale.reshape(-1, 1, *ones) if magnitude_axis(module, kernel) == 0 else scale.reshape(1, -1, *ones)


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype, warnings: list[str]) -> dict[str, Tensor]:
    """In the file's dtype. Raises ValueError where fp16 has no such number; warns where it makes numbers 0."""
    result, lost = {}, []
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu()
        if name.endswith(".alpha"):
            result[name] = tensor.reshape(()).to(torch.float32, copy=True)
            continue
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        result[name] = tensor.to(dtype, copy=True)
        if not torch.isfinite(result[name].float()).all():
            largest = tensor.float().abs().max().item()
            raise ValueError(f"{name} holds {largest:.3g}; fp16 ends at 65504. Choose dtype bf16 or fp32.")
        if ((result[name] == 0) & (tensor != 0)).float().mean() > 0.01:
            lost.append(name)
    if lost:
        warnings.append(f"a part of {first_few(lost)} is too small for {str(dtype)[6:]} and becomes 0; fp32 keeps it.")
    return result
