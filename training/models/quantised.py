"""Weights in fp8 with a scale, as ComfyUI writes and reads them, unfolded; other quantised layouts are refused by name.

fp8 weights come as a plain cast, or multiplied by a scale for each tensor or row: `<layer>.scale_weight` of older files
with a tensor `scaled_fp8`, `<layer>.weight_scale` of newer ones with `<layer>.comfy_quant` (JSON as bytes) or
`_quantization_metadata` in the metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..common.foreign import metadata_json, parse_json, short

SCALES = (".scale_weight", ".weight_scale")
OF_ACTIVATIONS = (".scale_input", ".input_scale", ".comfy_quant")
FLAG = "scaled_fp8"
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
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
UNFOLDED = "Use the fp16, bf16 or fp8 file of the same model."
INTEGERS = ("I8", "U8", "I16", "I32", "I64", "F4", "BOOL")


def expect_readable_weights(dtypes: Mapping[str, str]) -> None:
    """Raises ValueError where a file's weights are quantised in another way than fp8; dtypes: by tensor name."""
    for ending, layout in OTHER_LAYOUTS.items():
        if any(name.endswith(ending) for name in dtypes):
            raise ValueError(
                f"its weights are quantised in {layout} layout; expected fp32, fp16, bf16 or fp8. {UNFOLDED}"
            )
    for name, dtype in dtypes.items():
        if name.endswith(".weight") and dtype in INTEGERS:
            raise ValueError(f"its tensor {name} is {dtype}; expected fp32, fp16, bf16 or fp8. {UNFOLDED}")


def unfolded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with scaled fp8 weights multiplied by their scale, fp32, and without the scales.

    Raises:
        ValueError: A format other than fp8, or a scale that does not fit its weight.
    """
    _expect_fp8(tensors, metadata)
    result = {name: value for name, value in tensors.items() if not _is_extra(name)}
    for name, scale in tensors.items():
        ending = next((ending for ending in SCALES if name.endswith(ending)), None)
        weight = f"{name.removesuffix(ending)}.weight" if ending else ""
        if ending and weight not in result:
            raise ValueError(f"its tensor {name} scales {weight}, which it lacks. Download the whole file again.")
        if ending:
            result[weight] = _scaled(weight, result[weight], scale)
    return result


def _is_extra(name: str) -> bool:
    return name.endswith((*SCALES, *OF_ACTIVATIONS)) or name.rpartition(".")[2] == FLAG


def _scaled(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale; scale: one number, or one for each row."""
    rows = len(weight) if weight.ndim else 1
    if scale.numel() not in (1, rows):
        raise ValueError(f"the scale of {name} has {scale.numel()} values; expected 1 or {rows}. {UNFOLDED}")
    shape = (-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else ()
    return weight.float() * scale.float().reshape(shape)


def _expect_fp8(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raises ValueError for layers that name a format other than fp8."""
    for layer, about in _formats(tensors, metadata):
        form = about.get("format") if isinstance(about, dict) else about
        if form not in FP8_FORMATS:
            raise ValueError(
                f"its layer {layer} is quantised as {short(form)}; expected fp8 or no quantisation. {UNFOLDED}"
            )


def _formats(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterable[tuple[str, object]]:
    layers = metadata_json(metadata, "_quantization_metadata", dict, {}).get("layers", {})
    yield from layers.items() if isinstance(layers, dict) else [("", layers)]
    for name, value in tensors.items():
        if name.endswith(".comfy_quant"):
            text = bytes(value.to(torch.uint8).flatten().tolist()).decode("utf-8")
            yield name.removesuffix(".comfy_quant"), parse_json(text, dict)
