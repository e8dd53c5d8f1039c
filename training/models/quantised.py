"""Weights in fp8 or int8 with a scale, as ComfyUI writes and reads them; other quantised layouts are refused by name.

fp8 weights come as a plain cast, or multiplied by a scale for each tensor or row: `<layer>.scale_weight` of older files
with a tensor `scaled_fp8`, `<layer>.weight_scale` of newer ones with `<layer>.comfy_quant` (JSON as bytes) or
`_quantization_metadata` in the metadata. int8 weights come in the newer way alone (`int8_tensorwise`), and may be those
of inputs that ConvRot has rotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..common.foreign import metadata_json, parse_json, short, whole_number
from .stored import StoredTensor, exact, hadamard

SCALES = (".scale_weight", ".weight_scale")
OF_ACTIVATIONS = (".scale_input", ".input_scale", ".comfy_quant")
FLAG = "scaled_fp8"
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
"""Format's name -> dtype of its weights."""
OTHER_LAYOUTS = {
    ".quant_map": "bitsandbytes' 4 bits (nf4 or fp4)",
    ".absmax": "bitsandbytes' 4 bits (nf4 or fp4)",
    ".SCB": "bitsandbytes' 8 bits",
    ".weight._data": "quanto's",
    ".qweight": "GPTQ's or AWQ's",
    ".weight_scale_2": "nvfp4",
    ".proj_down": "SVDQuant's (nunchaku)",
}
"""Ending of a tensor's name -> whose layout it is."""
EXPECTED = "expected fp32, fp16, bf16, fp8 or int8 in ComfyUI's layout"
UNFOLDED = "Use the fp16, bf16 or fp8 file of the same model."
INTEGERS = ("I8", "U8", "I16", "I32", "I64", "F4", "BOOL")


def expect_readable_weights(dtypes: Mapping[str, str]) -> None:
    """Raises ValueError where a file's weights are quantised in an unknown way; dtypes: by tensor name."""
    for ending, layout in OTHER_LAYOUTS.items():
        if any(name.endswith(ending) for name in dtypes):
            raise ValueError(f"its weights are quantised in {layout} layout; {EXPECTED}. {UNFOLDED}")
    for name, dtype in dtypes.items():
        scaled = dtype == "I8" and f"{name}_scale" in dtypes
        if name.endswith(".weight") and dtype in INTEGERS and not scaled:
            raise ValueError(f"its tensor {name} is {dtype}; {EXPECTED}. {UNFOLDED}")


def unfolded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with scaled weights as the fp32 numbers that they stand for, and without the scales. See `scaled`."""
    found = scaled(tensors, metadata)
    return {name: exact(value) if isinstance(value, StoredTensor) else value for name, value in found.items()}


def scaled(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with each scaled weight as a `StoredTensor`, and without the scales; nothing is computed.

    Raises:
        ValueError: An unknown format, or a scale or weight that does not fit it.
    """
    formats = dict(_formats(tensors, metadata))
    _expect_known(formats)
    result = {name: value for name, value in tensors.items() if not _is_extra(name)}
    for name, scale in tensors.items():
        ending = next((ending for ending in SCALES if name.endswith(ending)), None)
        weight = f"{name.removesuffix(ending)}.weight" if ending else ""
        if ending and weight not in result:
            raise ValueError(f"its tensor {name} scales {weight}, which it lacks. Download the whole file again.")
        if ending:
            result[weight] = _scaled(weight, result[weight], scale, formats.get(name.removesuffix(ending), {}))
    return result


def _is_extra(name: str) -> bool:
    return name.endswith((*SCALES, *OF_ACTIVATIONS)) or name.rpartition(".")[2] == FLAG


def _scaled(name: str, weight: Tensor, scale: Tensor, about: Mapping[str, object]) -> StoredTensor:
    """weight * scale; scale: one number, or one for each row; about: the layer's format."""
    rows = len(weight) if weight.ndim else 1
    if scale.numel() not in (1, rows):
        raise ValueError(f"the scale of {name} has {scale.numel()} values; expected 1 or {rows}. {UNFOLDED}")
    wanted = FORMATS.get(about.get("format"))
    if weight.dtype != wanted and (wanted == torch.int8 or weight.dtype == torch.int8):
        raise ValueError(
            f"its tensor {name} is {weight.dtype}, and its format {short(about.get('format'))}. {UNFOLDED}"
        )
    return StoredTensor(weight, scale, _rotation(name, weight, about) if wanted == torch.int8 else 0)


def _rotation(name: str, weight: Tensor, about: Mapping[str, object]) -> int:
    """Width of the groups that ConvRot rotates in the inputs of an int8 layer; 0 where it does not."""
    inner = about.get("params")
    options = {**(inner if isinstance(inner, dict) else {}), **about}
    if not options.get("convrot"):
        return 0
    group = whole_number(options.get("convrot_groupsize", 256), "convrot_groupsize", 4, 1 << 16)
    hadamard(group)
    if weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"{name} is {tuple(weight.shape)}; expected rows of a multiple of {group}. {UNFOLDED}")
    return group


def _expect_known(formats: Mapping[str, object]) -> None:
    """Raises ValueError for layers that name an unknown format."""
    for layer, about in formats.items():
        form = about.get("format") if isinstance(about, dict) else about
        if not isinstance(about, dict) or form not in FORMATS:
            raise ValueError(
                f"its layer {layer} is quantised as {short(form)}; expected fp8, int8_tensorwise or no quantisation. "
                f"{UNFOLDED}"
            )


def _formats(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterable[tuple[str, object]]:
    layers = metadata_json(metadata, "_quantization_metadata", dict, {}).get("layers", {})
    yield from layers.items() if isinstance(layers, dict) else [("", layers)]
    for name, value in tensors.items():
        if name.endswith(".comfy_quant"):
            text = bytes(value.to(torch.uint8).flatten().tolist()).decode("utf-8")
            yield name.removesuffix(".comfy_quant"), parse_json(text, dict)
