"""Opens and parses every file that somebody else may have written; any failure is a `ValueError` with the file's name.

Readers return what is safe to use: of a regular file, of a size that the file's own allows, without code. Work on a
file's content that may fail in a library's or in torch's words goes into `with reading(path):`.
"""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .signatures import downloaded_kind

log = logging.getLogger(__name__)

MB = 1 << 20
JSON_MOST = 256 * MB
"""Bytes of the largest JSON or text file that is read; the largest known tokenizer.json has 33 MB."""
_SHARED_NAMES = ("config", "index", "merges", "model", "pytorch_model", "scheduler", "spiece", "tokenizer", "vocab")
"""Beginnings of file names that every model folder has, so that the folder's name tells them apart."""
_NUMBER_DIGITS, _LAYERS = 6, 512
_DEPTH, _VALUES = 64, 1_000_000
"""Nesting and number of values that a pickle may have; training states of whole models stay far below."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch.save wrote before it wrote archives."""
_INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_LEGACY_PICKLES = 4
"""The pickles at their start: a number, a version, the system, and the content with its storages' sizes."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
SAVE_AGAIN = "Save or download it again."


class FileError(ValueError):
    """A file that cannot be used; the message names it."""


@contextmanager
def reading(path: str | Path, other: str = "of another kind", advice: str = SAVE_AGAIN) -> Iterator[None]:
    """Turns whatever fails inside into a `FileError` that names the file; the cause stays attached.

    A `ValueError` keeps its words behind the file's name. A missing file stays a FileNotFoundError, and an
    accelerator's lack of memory what it is. Of nested uses, the innermost names its file.

    Args:
        path: The file or folder that the work inside reads.
        other: What it is if it is not damaged, such as "no safetensors file".
        advice: What its owner can do.
    """
    try:
        yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        name = label(path)
        log.debug("%s cannot be used", name, exc_info=error)
        if kind := downloaded_kind(path):
            message = f"{name} is {kind[0]}. {kind[1]}"
        elif type(error) is ValueError:
            message = str(error) if name in str(error) else f"{name}: {error}"
        else:
            message = f"{name} is damaged or {other} ({explain(error)}). {advice}"
        raise FileError(message) from error


def _is_failure(error: BaseException) -> bool:
    """Whether an exception says that a file cannot be used, in whatever words."""
    if isinstance(error, FileError | FileNotFoundError | torch.OutOfMemoryError):
        return False
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"  # a panic of a Rust library


def label(path: str | Path) -> str:
    """A file's name for messages, with its folder's where many models have one of this name; always printable."""
    path = Path(path)
    name = f"{path.parent.name}/{path.name}" if path.name.startswith(_SHARED_NAMES) and path.parent.name else path.name
    return printable(name)


def printable(text: str) -> str:
    """A text that can be encoded and printed: bytes that are no text, and halves of characters, become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def explain(error: BaseException) -> str:
    """An exception in words, in one line of at most 300 characters."""
    match error:
        case json.JSONDecodeError():
            return f"not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return f"byte {error.start} is no UTF-8 text"
        case KeyError():
            return f"it has no entry {error.args[0] if error.args else ''!r:.200}"
        case RecursionError():
            return "it is nested too deeply"
        case MemoryError():
            return "its content needs more memory than there is"
        case OSError() if error.strerror:
            return error.strerror
    text = printable(" ".join(str(error).split()))
    return text[:300] or type(error).__name__


def unforeseen(what: str, error: Exception) -> str:
    """The first sentence on an error that no check foresaw; what: the verb, the node or the run that failed."""
    return f"{what} failed: {explain(error)} ({type(error).__name__}), which no check foresaw."


def existing_file(path: str | Path) -> Path:
    """The path of a regular file.

    Raises:
        FileNotFoundError: There is none.
        FileError: It is a folder, a pipe or a device, whose reading might never end, or it may not be looked at.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{printable(str(path))} does not exist") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{label(path)} cannot be opened ({explain(error)}). Check the path and its rights.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise FileError(f"{label(path)} is {kind}; expected a file. Give the path of a file.")
    return path


def is_file(path: str | Path) -> bool:
    """Whether a regular file is there; False where the path may not be looked at or is too long."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | Path, most: int = JSON_MOST, advice: str = SAVE_AGAIN) -> bytes:
    """A regular file's bytes. Raises FileError for one of more than `most` bytes or that cannot be read."""
    path = existing_file(path)
    with reading(path, "not readable", advice):
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"its size is {size / MB:.0f} MB; expected at most {most / MB:.0f} MB. {advice}")
        with path.open("rb") as file:
            return file.read(size)


def read_text(path: str | Path, most: int = JSON_MOST, advice: str = SAVE_AGAIN) -> str:
    """A UTF-8 file's text, without byte order mark; line ends stay as they are. Raises FileError."""
    data = read_bytes(path, most, advice)
    with reading(path, "no UTF-8 text", advice):
        return data.decode("utf-8-sig")


def read_json(path: str | Path, expected: type | None = None, advice: str = SAVE_AGAIN) -> Any:
    """A JSON file's value. Raises FileError when it is damaged or not of the type `expected`."""
    text = read_text(path, advice=advice)
    with reading(path, "no JSON", advice):
        return parse_json(text, expected)


def metadata_json(metadata: Mapping[str, str], name: str, expected: type | None = dict, default: Any = None) -> Any:
    """The JSON value of an entry in a safetensors file's metadata; `default`, if given, where it has none.

    Raises ValueError without the file's name: use it inside `reading`.
    """
    if name not in metadata:
        if default is not None:
            return default
        raise ValueError(f"its metadata has no entry {name}; expected a file that this package wrote")
    try:
        return parse_json(metadata[name], expected)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata entry {name} is damaged ({explain(error)})") from error


_TYPES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def parse_json(text: str, expected: type | None = None) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError; use it inside `reading`.

    Texts with half a character (a lone surrogate) are refused: neither files nor tokenizers take them.
    """
    value = json.loads(text)
    if _SURROGATE_ESCAPE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError(r"a text in it has half a character (\ud800 to \udfff alone); expected whole characters")
    if expected is not None and not isinstance(value, expected):
        raise ValueError(f"its content is {_kind(value)}; expected {_TYPES[expected]}")
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return "empty (null)" if value is None else _TYPES.get(type(value), f"a {type(value).__name__}")


def whole_number(value: Any, what: str, least: int = 1, most: int = 1 << 20) -> int:
    """A whole number from a file, as int. Raises ValueError, to be used inside `reading`, for anything else."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise ValueError(f"{what} is {short(value)}; expected a whole number from {least} to {most}")
    return number


def finite_number(value: Any, what: str) -> float:
    """A finite number from a file, as float; texts with a number count. Raises ValueError, for use inside `reading`."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {short(value)}; expected a finite number")
    return number


def short(value: Any) -> str:
    """A value from a file in at most 60 characters, for messages."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = printable(repr(value[:80] if isinstance(value, str | bytes | list | tuple) else value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def count_numbered(names: Iterable[str], before: str, gaps: bool = False) -> int:
    """How many layers a file has: the numbers that follow `before` in its names, which must be 0 to n - 1.

    A name alone does not make a layer: a file of one layer with the number 999999999 is refused, not counted so far,
    and so is one of more than 512, which no known model has.

    Args:
        names: The tensors' names.
        before: What stands before the number, such as "encoder.block.".
        gaps: Counts to the largest number, for a caller that lists what is missing; up to as many layers as names.

    Raises:
        ValueError: A number is missing or too large; to be used inside `reading`.
    """
    names = list(names)
    after = (name[len(before) :].partition(".")[0] for name in names if name.startswith(before))
    digits = {text for text in after if text.isascii() and text.isdigit()}
    largest = max(digits, key=lambda text: (len(text), text), default="")
    most = min(_LAYERS, len(names) if gaps else len(digits))
    if len(largest) > _NUMBER_DIGITS or largest and int(largest) >= most:
        raise ValueError(
            f"the largest number after {before} is {largest:.20} and it has {len(digits)} of them; expected all from 0 "
            f"on, at most {_LAYERS}. Download the whole file again"
        )
    return 1 + int(largest) if largest else 0


@dataclass(frozen=True)
class TensorFile:
    """An open file of tensors.

    Attributes:
        shapes: Name -> shape.
        read: Gives the tensor of a name.
        metadata: Texts by name, of a safetensors file.
        dtypes: Name -> safetensors' name of the dtype, such as "F16"; empty for a pickle.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_tensors(path: str | Path) -> Iterator[TensorFile]:
    """A safetensors file whose shapes are looked at before tensors are read; they stay mapped until it is closed.

    Raises:
        FileNotFoundError: There is none.
        FileError: It is damaged or another kind of file, or work on its content fails inside.
    """
    from safetensors import safe_open

    path = existing_file(path)
    with reading(path, "no safetensors file"), safe_open(str(path), framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
        yield TensorFile(shapes, file.get_tensor, file.metadata() or {}, dtypes)


def expect_tensors(path: str | Path) -> Path:
    """The path of a safetensors file whose header is sound; raises as `read_tensors`."""
    with open_tensors(path):
        return Path(path)


def read_tensors(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, copied, and metadata. (Windows cannot replace a file that stays mapped.)

    prefix: reads only tensors whose names begin with it. Raises ValueError for a damaged file or one of another kind,
    FileNotFoundError where there is none.
    """
    with open_tensors(path) as file:
        return {name: file.read(name).clone() for name in file.shapes if name.startswith(prefix)}, file.metadata


def read_pickle(path: str | Path, mmap: bool = False) -> Any:
    """The content of a file that torch.save wrote, on the CPU: tensors, numbers, texts, lists and dicts.

    mmap: tensors stay in the file until they are used. Raises ValueError for a damaged file, for one with code, and for
    one whose content is larger than the file or endless; FileNotFoundError where there is none.
    """
    path = existing_file(path)
    with reading(path, "holds more than tensors", "Convert it to safetensors."):
        size = path.stat().st_size
        zipped = zipfile.is_zipfile(path)
        stored = zipped and _is_stored_archive(path, size)
        source = path if zipped else _honest_pickle(path)
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and stored)
        except ValueError as error:  # torch's own, such as "negative seek value" of a file that is cut off
            raise pickle.UnpicklingError(str(error)) from error
        _expect_plain(content, size)
        return content


def _honest_pickle(path: Path) -> io.BytesIO:
    """The content of a file in the format before archives. Raises ValueError where a storage is larger than the file.

    torch makes each storage before it reads it, and Python takes as much memory as it is told to read from a file.
    """
    data = path.read_bytes()
    stream = io.BytesIO(data)
    if data.startswith(_LEGACY):
        for _ in range(_LEGACY_PICKLES):
            number = 0
            for operation, value, _ in pickletools.genops(stream):
                number = value if operation.name in _INTEGERS else number
                if operation.name == "BINPERSID" and int(number) > len(data):
                    raise ValueError(f"one of its tensors has {short(number)} numbers; expected at most its size")
    stream.seek(0)
    return stream


def _is_stored_archive(path: Path, size: int) -> bool:
    """Whether an archive is not compressed. Raises ValueError if it unpacks to much more than its size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > 2 * size + 64 * MB:
        raise ValueError(f"its content unpacks to {unpacked / MB:.0f} MB; expected about its size, {size / MB:.0f} MB")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _expect_plain(content: Any, size: int) -> None:
    """Raises ValueError unless a pickle's content is a tree of plain values and dense tensors about as large as it."""
    waiting, values, needed = [(content, 0)], 0, 0
    while waiting:
        item, depth = waiting.pop()
        values += 1
        if depth > _DEPTH or values > _VALUES:
            raise ValueError("its content contains itself or is nested too deeply; expected tensors by name")
        if isinstance(item, Tensor):
            needed += _dense_bytes(item)
        elif isinstance(item, Mapping):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, torch.nn.ParameterDict):  # of the first implementation of embeddings
            waiting += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += [(part, depth + 1) for part in item]
    if needed > 4 * size + 64 * MB:
        raise ValueError(f"its tensors unfold to {needed / MB:.0f} MB; expected about its size, {size / MB:.0f} MB")


def _dense_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's copy. Raises ValueError for a sparse, quantised or empty-handed (meta) tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        raise ValueError("one of its tensors is sparse, quantised or without values; expected dense tensors")
    return tensor.numel() * tensor.element_size()
