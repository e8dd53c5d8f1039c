"""Files of tensors made wrong: names, shapes, dtypes, values and metadata of safetensors; objects in pickles."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from odd import CANARY, changed, numbered, odd_value, overwritten

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "?")


def _edit_header(path: Path, edit: Callable[[dict], Any]) -> None:
    """Rewrites a safetensors file with its header edited, or replaced by what `edit` returns."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edited = edit(header)
    text = json.dumps(header if edited is None else edited).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _names(header: dict) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def tensor_name(path: Path, random: Random, others: Sequence[Path]) -> None:
    def edit(header: dict) -> None:
        chosen = random.choice(_names(header))
        many = random.random() < 0.3
        prefix = random.choice(("module.", "unet.", "base_model.model.", "text_encoders.t5xxl.transformer.", "x."))
        for name in _names(header) if many else [chosen]:
            entry = header.pop(name)
            header[prefix + name if many else numbered(name, random)] = entry

    _edit_header(path, edit)


def tensor_shape(path: Path, random: Random, others: Sequence[Path]) -> None:
    def edit(header: dict) -> None:
        entry = header[random.choice(_names(header))]
        shape = entry["shape"]
        entry["shape"] = random.choice(
            (shape[::-1], [1, *shape], [*shape, 1], [_product(shape)], [0], [], [10**9] * 4, [2**63], [-1], [0, *shape])
        )

    _edit_header(path, edit)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def tensor_dtype(path: Path, random: Random, others: Sequence[Path]) -> None:
    def edit(header: dict) -> None:
        entry = header[random.choice(_names(header))]
        same_size = {"F32": ("I32", "U32"), "F16": ("I16", "BF16"), "U8": ("I8", "BOOL")}.get(entry["dtype"], DTYPES)
        entry["dtype"] = random.choice((*same_size, *DTYPES))

    _edit_header(path, edit)


def tensor_values(path: Path, random: Random, others: Sequence[Path]) -> None:
    """NaN, infinity or zeros in one tensor."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    first, last = (8 + size + n for n in header[random.choice(_names(header))]["data_offsets"])
    fill = random.choice((b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\0\0", b"\xff\xff\x7f\x7f"))
    data[first:last] = (fill * (last - first))[: last - first]
    path.write_bytes(data)


def metadata(path: Path, random: Random, others: Sequence[Path]) -> None:
    """An entry of the metadata made odd; JSON inside it too."""

    def edit(header: dict) -> None:
        entries = header.setdefault("__metadata__", {})
        name = random.choice([*entries, "ss_network_args", "ss_network_dim", "modelspec.prediction_type"])
        text = entries.get(name, "{}")
        try:
            entries[name] = json.dumps(changed(json.loads(text), random))
        except (ValueError, RecursionError):
            entries[name] = random.choice((str(odd_value(random))[: 10**6], "{", "nan", "1e39", "9" * 5000))
        if random.random() < 0.1:
            del entries[name]

    _edit_header(path, edit)


def header(path: Path, random: Random, others: Sequence[Path]) -> None:
    _edit_header(path, lambda header: changed(header, random))


def many_tensors(path: Path, random: Random, others: Sequence[Path]) -> None:
    """Thousands of empty tensors under numbered names."""

    def edit(header: dict) -> None:
        stem = random.choice(_names(header))
        end = max(header[name]["data_offsets"][1] for name in _names(header))
        for number in range(random.choice((600, 20_000))):
            entry = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
            header[re.sub(r"\d+", str(number), stem, count=1) if re.search(r"\d", stem) else f"{stem}.{number}"] = entry

    _edit_header(path, edit)


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path):
        self._canary = folder / CANARY

    def __reduce__(self):
        return os.system, (f"touch '{self._canary}'",)


def pickled(path: Path, random: Random, others: Sequence[Path]) -> None:
    """A pickle with something inside it that a state dict does not hold."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    holders = [item for item in _dicts(content)] or [{"x": content}]
    holder = random.choice(holders)
    key = random.choice(list(holder) or ["x"])
    value = holder.get(key)
    match random.randrange(14):
        case 0:
            holder[key] = torch.zeros(1).expand(random.choice((1 << 12, 1 << 20)), 1 << 14)
        case 1:
            holder[key] = torch.zeros(2, 3, device="meta")
        case 2:
            holder[key] = torch.eye(3).to_sparse()
        case 3:
            holder[key] = holder
        case 4:
            holder[key] = _laughs()
        case 5:
            holder[key] = _Code(path.parent)
        case 6 if isinstance(value, torch.Tensor):
            holder[key] = random.choice(
                (value.T, value[None], value.flatten(), value.long(), value.to(torch.complex64))
            )
        case 7 if isinstance(value, torch.Tensor):
            holder[key] = torch.full_like(value.float(), random.choice((float("nan"), float("inf"), 1e38)))
        case 8:
            holder[numbered(str(key), random)] = holder.pop(key, None)
        case 9:
            holder[random.choice((0, (1, 2), None, b"x"))] = value
        case 10:
            content = random.choice(([content], (content, 1), "text", 5, None, {"state_dict": {"state_dict": content}}))
        case 11:
            holder.pop(key, None)
        case 12:
            holder[key] = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
        case _:
            holder[key] = changed({"x": 1}, random)
    torch.save(content, path, _use_new_zipfile_serialization=random.random() < 0.8)


def _dicts(value: Any) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _dicts(item)


def _laughs() -> list:
    """Small in a file, and 2**40 values when it is walked."""
    value: list = [0]
    for _ in range(40):
        value = [value, value]
    return value


def archive(path: Path, random: Random, others: Sequence[Path]) -> None:
    """The archive of a pickle, packed again or with a huge entry of zeros."""
    data = path.read_bytes()
    if not zipfile.is_zipfile(path):
        return overwritten(path, random, others)
    huge = random.random() < 0.5
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, bytes(1 << 28) if huge and "/data/" in entry.filename else content)
            huge = huge and "/data/" not in entry.filename
