"""Reads T5 weights from a safetensors file, a Hugging Face folder (sharded or not), or a .bin / .pt state dict.

Names and shapes are checked first, so that an unsuitable file fails before its weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .t5_config import t5_config, t5_names

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TORCH_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class T5Weights(NamedTuple):
    """A T5 encoder's state dict with `T5EncoderModel` names, its configuration, and the hash of its files."""

    state_dict: dict[str, Tensor]
    config: dict
    file_hash: str


@dataclass(frozen=True)
class _Source:
    """Open weight files: shapes by tensor name, a function that reads a tensor, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_t5(path: str | Path, dtype: torch.dtype = torch.float32) -> T5Weights:
    """Reads a T5 encoder; fp8 weights are multiplied by their scales.

    Args:
        path: File or folder.
        dtype: Dtype of the returned tensors.

    Raises:
        FileNotFoundError: The path or one of its shards does not exist.
        ValueError: The file has no complete T5 encoder, or one in an unsupported format.
    """
    path = Path(path)
    files = weight_files(path)
    with _open_all(files) as source:
        try:
            config = t5_config(source.shapes)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        _check_quantisation(path, source)
        state = {
            name: _read_weight(source, key, dtype)
            for name, key in t5_names(source.shapes).items()
            if name.endswith(".weight")
        }
    return T5Weights(state, config, file_hash(path))


def read_t5_config(path: str | Path) -> dict:
    """Reads only a T5's configuration, from file headers (a .bin file is read completely). Errors as `read_t5`."""
    path = Path(path)
    with _open_all(weight_files(path)) as source:
        try:
            return t5_config(source.shapes)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def embedded_sentencepiece(path: str | Path) -> bytes | None:
    """The sentencepiece model in the tensor `spiece_model` of ComfyUI's mT5 and UMT5 files, or None."""
    with _open_all(weight_files(Path(path))) as source:
        key = next((key for key in source.shapes if key.rsplit(".", 1)[-1] == "spiece_model"), None)
        return None if key is None else bytes(source.read(key).to(torch.uint8).numpy())


def weight_files(path: Path) -> list[Path]:
    """The weight files of a T5: a single file, or those in a folder written by `save_pretrained`.

    Raises:
        FileNotFoundError: The path or a shard does not exist, or the folder has no unambiguous weight file.
        ValueError: The file is a GGUF file.
    """
    if path.is_file():
        _refuse_gguf(path)
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no T5 at {path}; expected a .safetensors file or a Hugging Face folder")
    for name in INDEX_FILES:
        if (path / name).is_file():
            shards = sorted(set(json.loads((path / name).read_text(encoding="utf-8"))["weight_map"].values()))
            return [_existing(path / shard) for shard in shards]
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return [path / name]
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return single
    for file in sorted(path.glob("*.gguf")):
        _refuse_gguf(file)
    raise FileNotFoundError(
        f"folder {path.name} has {len(single)} safetensors files and no index; expected model.safetensors, "
        "model.safetensors.index.json or a single safetensors file"
    )


def file_hash(path: str | Path) -> str:
    """SHA-256 of a weight file; for several shards, SHA-256 of their digests in the order of their names."""
    digests = []
    for file in weight_files(Path(path)):
        stat = file.stat()
        digests.append(_digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(path: str, size: int, modified: int) -> str:
    """SHA-256 of a file, cached by path, size and modification time: hashing T5-XXL takes many seconds."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _existing(file: Path) -> Path:
    """The shard's path; FileNotFoundError if it is missing."""
    if not file.is_file():
        raise FileNotFoundError(f"shard {file.name} is missing from {file.parent.name}. Download the folder again.")
    return file


def _refuse_gguf(path: Path) -> None:
    """Raises ValueError for a GGUF file."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise ValueError(f"{path.name} is a GGUF file; expected safetensors. Use the original or an fp8 version.")


@contextmanager
def _open_all(files: list[Path]) -> Iterator[_Source]:
    """Opens weight files as one source."""
    with ExitStack() as stack:
        sources = [_open(file, stack) for file in files]
        shapes = {key: shape for source in sources for key, shape in source.shapes.items()}
        source_of = {key: source for source in sources for key in source.shapes}
        yield _Source(shapes, lambda key: source_of[key].read(key), sources[0].metadata)


def _open(file: Path, stack: ExitStack) -> _Source:
    return _open_torch(file) if file.suffix.lower() in TORCH_ENDINGS else _open_safe(file, stack)


def _open_safe(file: Path, stack: ExitStack) -> _Source:
    from safetensors import SafetensorError, safe_open

    try:
        opened = stack.enter_context(safe_open(str(file), framework="pt"))
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged or no safetensors file ({error}). Download it again.") from error
    shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    return _Source(shapes, opened.get_tensor, opened.metadata() or {})


def _open_torch(file: Path) -> _Source:
    """Opens a pickled state dict of tensors only."""
    import pickle
    import zipfile

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file.name} is damaged or holds more than tensors. Convert it to safetensors.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return _Source({key: tuple(value.shape) for key, value in tensors.items()}, tensors.__getitem__)


def _read_weight(source: _Source, key: str, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype; an fp8 weight is multiplied by its scale."""
    weight = source.read(key)
    module = key.removesuffix("weight")
    scale = next((module + s for s in ("scale_weight", "weight_scale") if module + s in source.shapes), None)
    if scale is None:
        return weight.to(dtype)
    factor = source.read(scale).float()
    return (weight.float() * (factor.reshape(-1, 1) if factor.numel() > 1 else factor)).to(dtype)


def _check_quantisation(path: Path, source: _Source) -> None:
    """Raises ValueError for ComfyUI's quantised formats other than fp8."""
    for key in source.shapes:
        if key.endswith(".comfy_quant"):
            kind = json.loads(bytes(source.read(key).numpy())).get("format", "unknown")
            if kind not in FP8_FORMATS:
                raise ValueError(f"{path.name} is quantised as {kind}; expected fp32, fp16, bf16 or fp8 weights.")
