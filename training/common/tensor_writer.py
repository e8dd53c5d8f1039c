"""The content of a safetensors file, written tensor by tensor: no more than one of them is copied into RAM.

safetensors' own `save_file` needs all tensors in RAM at once, and for a digest they would be read twice. The layout is
that of https://github.com/huggingface/safetensors, and the bytes are those that `save_file` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .distributed import whole

_NAMES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPES = {getattr(torch, name): code for name, code in _NAMES.items() if hasattr(torch, name)}
"""safetensors' names, in the order in which its tensors lie in a file: all are aligned."""
_ORDER = list(DTYPES)

Visit = Callable[[str, Tensor], Any]
"""Gets a tensor's name and its copy in RAM."""


def write_content(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    visit: Visit | None = None,
    late: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Writes a whole safetensors file; equal content gives equal bytes.

    Args:
        file: open for writing, empty.
        tensors: by name, on any device and of any strides.
        metadata: texts by name.
        visit: called with each tensor before it is written, in the file's order.
        late: called after the last one; its texts replace those of `metadata` of the same names and lengths.

    Raises:
        ValueError: a tensor's dtype has no place in a safetensors file.
    """
    header = _header(tensors, metadata)
    file.write(header)
    for name in _sorted_names(tensors):
        ready = whole(tensors[name]).detach().cpu().contiguous()
        if visit is not None:
            visit(name, ready)
        file.write(tensor_bytes(ready))
    if changed := late():
        text = _header(tensors, {**metadata, **changed})
        if len(text) != len(header):
            raise AssertionError(f"changed header has {len(text)} bytes; expected {len(header)}")
        file.seek(0)
        file.write(text)


def take_part(tensors: Mapping[str, Tensor]) -> None:
    """What the other processes do while one writes tensors, of which some are divided among them: all gather these."""
    for name in _sorted_names(tensors):
        whole(tensors[name])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, without copying."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _sorted_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the file's order: by dtype, the widest first, then by name."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is of {tensor.dtype}; expected one of safetensors' dtypes. Cast it first.")
    return sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of what lies where, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in _sorted_names(tensors):
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
