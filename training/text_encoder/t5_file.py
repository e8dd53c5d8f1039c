"""Reads T5 weights from a safetensors file, a Hugging Face folder (sharded or not), or a .bin / .pt state dict.

Names and shapes are checked first, so that an unsuitable file fails before its weights are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.foreign import (
    TensorFile,
    is_file,
    label,
    open_tensors,
    parse_json,
    read_json,
    read_pickle,
    reading,
    short,
)
from ..models.stored import StoredTensor, exact
from .t5_config import t5_config, t5_names

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TORCH_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
EXPECTED_DTYPES = "expected fp32, fp16, bf16 or fp8 weights. Use the original file, or one in fp8 for less memory"


class T5Weights(NamedTuple):
    """A T5 encoder's state dict with `T5EncoderModel` names, its configuration, and the hash of its files."""

    state_dict: dict[str, Tensor]
    config: dict
    file_hash: str


def read_t5(path: str | Path, dtype: torch.dtype | None = torch.float32) -> T5Weights:
    """Reads a T5 encoder; fp8 weights are multiplied by their scales.

    Args:
        path: File or folder.
        dtype: Of the returned tensors; None for that of the file, with a weight and its scale as a `StoredTensor`.

    Raises:
        FileNotFoundError: The path or one of its shards does not exist.
        ValueError: The file has no complete T5 encoder, or one in an unsupported format.
    """
    path = Path(path)
    with _open_all(path) as source:
        _refuse_quantised(source.shapes)
        config = t5_config(source.shapes)
        _check_formats(source)
        state = {
            name: _read_weight(source, key, dtype)
            for name, key in t5_names(source.shapes).items()
            if name.endswith(".weight")
        }
    return T5Weights(state, config, file_hash(path))


def read_t5_config(path: str | Path) -> dict:
    """Reads only a T5's configuration, from file headers (a .bin file is read completely). Errors as `read_t5`."""
    with _open_all(Path(path)) as source:
        _refuse_quantised(source.shapes)
        return t5_config(source.shapes)


def embedded_sentencepiece(path: str | Path) -> bytes | None:
    """The sentencepiece model in the tensor `spiece_model` of ComfyUI's mT5 and UMT5 files, or None."""
    with _open_all(Path(path)) as source:
        key = next((key for key in source.shapes if key.rsplit(".", 1)[-1] == "spiece_model"), None)
        return None if key is None else bytes(source.read(key).to(torch.uint8).numpy())


def weight_files(path: Path) -> list[Path]:
    """The weight files of a T5: a single file, or those in a folder written by `save_pretrained`.

    Raises:
        FileNotFoundError: The path or a shard does not exist, or the folder has no unambiguous weight file.
        ValueError: The file is a GGUF file, a pipe or a device, or the folder's index is damaged.
    """
    if is_file(path):
        _refuse_gguf(path)
        return [path]
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{label(path)} is a pipe or a device; expected a file. Give the path of a file.")
        raise FileNotFoundError(f"no T5 at {path}; expected a .safetensors file or a Hugging Face folder")
    for name in INDEX_FILES:
        if is_file(path / name):
            return _shards(path / name)
    for name in WEIGHT_FILES:
        if is_file(path / name):
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
    with reading(path), open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _shards(index: Path) -> list[Path]:
    """The weight files that an index lists, all in its folder."""
    listed = read_json(index, dict)
    with reading(index):
        names = set(listed["weight_map"].values())
        for name in names:
            if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
                raise ValueError(f"a shard is {short(name)}; expected the name of a file in the index's folder")
    return [_existing(index.parent / name) for name in sorted(names)]


def _existing(file: Path) -> Path:
    """The shard's path; FileNotFoundError if it is missing."""
    if not is_file(file):
        raise FileNotFoundError(f"shard {file.name} is missing from {file.parent.name}. Download the folder again.")
    return file


def _refuse_gguf(path: Path) -> None:
    """Raises ValueError for a GGUF file."""
    with reading(path), path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise ValueError(f"{path.name} is a GGUF file; expected safetensors. Use the original or an fp8 version.")


@contextmanager
def _open_all(path: Path) -> Iterator[TensorFile]:
    """Opens the weight files of a T5 as one; what fails inside names the file or folder."""
    with ExitStack() as stack:
        sources = [_open(file, stack) for file in weight_files(path)]
        shapes = {key: shape for source in sources for key, shape in source.shapes.items()}
        source_of = {key: source for source in sources for key in source.shapes}
        with reading(path):
            if not sources:
                raise ValueError("its index lists no file; expected weights. Download the folder again")
            yield TensorFile(shapes, lambda key: source_of[key].read(key), sources[0].metadata)


def _open(file: Path, stack: ExitStack) -> TensorFile:
    if file.suffix.lower() in TORCH_ENDINGS:
        return _open_torch(file)
    return stack.enter_context(open_tensors(file))


def _open_torch(file: Path) -> TensorFile:
    """Opens a pickled state dict of tensors only."""
    state = read_pickle(file, mmap=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    return TensorFile({key: tuple(value.shape) for key, value in tensors.items()}, tensors.__getitem__)


def _read_weight(source: TensorFile, key: str, dtype: torch.dtype | None) -> Tensor:
    """A weight in a dtype, multiplied by its scale, or as it is for None.

    Raises ValueError where it is NaN or infinite.
    """
    weight = source.read(key)
    if not weight.is_floating_point():
        raise ValueError(f"{key} is stored as {str(weight.dtype)[6:]}; expected fp32, fp16, bf16 or fp8 weights")
    weight = _scaled(source, key, weight)
    numbers = weight.to(dtype or torch.float32) if type(weight) is Tensor else exact(weight).to(dtype or torch.float32)
    if not numbers.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"{key} holds NaN or infinity; expected numbers. Download the file again")
    return weight if dtype is None else numbers


def _scaled(source: TensorFile, key: str, weight: Tensor) -> Tensor:
    """A weight with its scale, where the file has one for it; otherwise as it is."""
    module = key.removesuffix("weight")
    scale = next((module + s for s in ("scale_weight", "weight_scale") if module + s in source.shapes), None)
    if scale is None:
        return weight
    factor = source.read(scale).float()
    if factor.numel() not in (1, len(weight)):
        raise ValueError(f"{scale} has {factor.numel()} values; expected 1 or one for each of {len(weight)} rows")
    return StoredTensor(weight, factor)


_QUANTISED = {
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "optimum-quanto": ("._data", "._scale"),
    "GPTQ or AWQ": (".qweight", ".qzeros"),
}
"""Library -> endings of the names of the tensors that it puts in place of weights."""


def _refuse_quantised(names: Iterable[str]) -> None:
    """Raises ValueError for the formats of other programs that hold no weights as numbers."""
    names = list(names)
    for library, endings in _QUANTISED.items():
        if any(name.endswith(endings) for name in names):
            raise ValueError(f"it is quantised by {library}; {EXPECTED_DTYPES}")


def _check_formats(source: TensorFile) -> None:
    """Raises ValueError for ComfyUI's quantised formats other than fp8."""
    for key in source.shapes:
        if key.endswith(".comfy_quant"):
            kind = parse_json(bytes(source.read(key).to(torch.uint8).numpy()).decode(), dict).get("format", "unknown")
            if kind not in FP8_FORMATS:
                raise ValueError(f"it is quantised as {short(kind)}; {EXPECTED_DTYPES}")
