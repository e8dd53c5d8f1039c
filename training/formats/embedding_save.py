"""Embeddings as files that other programs read.

safetensors: one file for ComfyUI, A1111, Forge, OneTrainer and diffusers. Vectors for a single CLIP have the key
`emp_params`: OneTrainer requires that key, the others read any single tensor. Vectors for SDXL have the keys `clip_l`
and `clip_g`, those for a T5 have ComfyUI's name of it. "A1111 pt": A1111's own dictionary, which every program reads
too; for SDXL `clip_l` and `clip_g`, the only form A1111 reads. diffusers: the token as the key; for SDXL a second file
`<name>_2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import atomic_path, is_reserved, write_tensors
from ..common.foreign import read_pickle, read_tensors
from ..config.tokens import check_token
from ..demo.editions import BASE
from ..models.concepts import Concept
from .embedding import Embedding
from .embedding_fit import family_of
from .lora_metadata import ARCHITECTURES, SIDES, STABILITY, model_hashes

FORMATS = ("safetensors", "A1111 pt", "diffusers")
TOKEN = "%token%"
_SUFFIXES = (".safetensors", ".pt", ".bin")
"""Suffixes that ComfyUI tries for `embedding:<name>`, in this order."""
_LONGEST_NAME = 200
"""Bytes of a file's name without its ending; most systems take 255, and a temporary name is longer."""
_PLACEHOLDER_ID = 265
"""CLIP's id of "*", A1111's placeholder."""


@dataclass(frozen=True)
class _Output:
    """One file to write; its name is the common stem + `ending`."""

    ending: str
    content: dict[str, Any]
    metadata: dict[str, str] | None = None


def save_embedding(folder: str | Path, embedding: Embedding, format: str, prefix: str = TOKEN) -> list[list[Path]]:
    """Writes each concept of an embedding, in fp32.

    A file name taken by other content gets -2, -3, ... appended; a file with the same content is left as it is.

    Args:
        folder: Where to write.
        embedding: The concepts, and metadata about their training.
        format: One of FORMATS.
        prefix: File name without suffix; may contain %token% and sub-folders.

    Returns:
        For each concept its files, in the order of the text encoders.

    Raises:
        ValueError: The format is unknown or cannot hold such an embedding, no file name results from token and prefix,
            or the prefix leaves the folder.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}.")
    outputs = [
        (_stem(prefix, concept), _outputs(concept, embedding.metadata, format)) for concept in embedding.concepts
    ]
    return [_write(Path(folder), stem, parts) for stem, parts in outputs]


def token_file_name(token: str) -> str:
    """A token reduced to what `embedding:<name>` can contain (letters, digits, `.`, `_`, `-`); may be ""."""
    return re.sub(r"[^\w.-]", "", token).strip(".-")


def expect_file_names(tokens: Sequence[str]) -> None:
    """Raises ValueError for a token whose embedding could not be saved under its name on every system."""
    for token in tokens:
        try:
            _stem(TOKEN, Concept(token, {}))
        except ValueError as error:
            raise ValueError(
                f"token {token[:40]!r} cannot name its embedding: {error} Choose another token."
            ) from error


def _stem(prefix: str, concept: Concept) -> str:
    """The file name without suffix; ValueError for an empty one or one that leaves the folder."""
    name = token_file_name(concept.token)
    if TOKEN in prefix and not name:
        raise ValueError(f"token {concept.token} gives no file name; expected letters or digits. Set filename_prefix.")
    stem = prefix.replace(TOKEN, name).replace("\\", "/").strip()
    parts = Path(stem).parts
    if any(map(is_reserved, parts)):
        raise ValueError(f"{stem} would be a device's name on Windows; expected another. Set filename_prefix.")
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in parts):
        raise ValueError(
            f"the file's name would have {len(stem)} characters; expected at most {_LONGEST_NAME} bytes. Set "
            "filename_prefix, or a shorter token."
        )
    if not stem or stem.endswith("/") or Path(stem).is_absolute() or ".." in Path(stem).parts:
        raise ValueError(f"filename_prefix is {prefix!r}; expected a name below models/embeddings, without '..'.")
    return stem


def _outputs(concept: Concept, metadata: Mapping, format: str) -> list[_Output]:
    """The files of one concept in a format; ValueError if the format cannot hold its text encoders."""
    token = check_token(concept.token)
    vectors = {name: value.detach().float().cpu().contiguous().clone() for name, value in concept.vectors.items()}
    clips = _clip_names(token, vectors, format)
    single = next(iter(vectors.values())) if len(vectors) == 1 and clips else None
    if format == "A1111 pt":
        return [_Output(".pt", vectors if single is None else _a1111_dictionary(token, single, metadata))]
    if format == "diffusers":
        contents = [{token: vectors[name]} for name in clips]
    else:
        contents = [vectors if single is None else {"emp_params": single}]
    endings = [f"{'_2' * i}.safetensors" for i in range(len(contents))]
    pairs = zip(endings, contents, strict=True)
    return [_Output(ending, content, _file_metadata(concept, metadata, content)) for ending, content in pairs]


def _clip_names(token: str, vectors: Mapping[str, Tensor], format: str) -> list[str]:
    """The CLIPs with vectors; ValueError if other encoders have vectors too and the format holds CLIPs only."""
    names = [name for name in ("clip_l", "clip_h", "clip_g") if name in vectors]
    if format != "safetensors" and len(names) < len(vectors):
        raise ValueError(
            f"format is {format!r} and {token} has vectors for {', '.join(vectors)}; expected safetensors."
        )
    return names


def _a1111_dictionary(token: str, vectors: Tensor, metadata: Mapping) -> dict[str, Any]:
    """What A1111 pickles for an embedding."""
    return {
        "string_to_token": {"*": _PLACEHOLDER_ID},
        "string_to_param": {"*": vectors},
        "name": token,
        "step": metadata.get("steps"),
        "sd_checkpoint": None,
        "sd_checkpoint_name": metadata.get("base"),
    } | ({BASE: metadata["model"]} if "model" in metadata else {})


def _file_metadata(concept: Concept, metadata: Mapping, content: Mapping[str, Tensor]) -> dict[str, str]:
    """Token, step, base and run; ModelSpec 1.0.1 for the families it defines. No date: equal content, equal file."""
    family = metadata.get("base") or family_of(concept.vectors)
    entries = {"token": concept.token, "step": metadata.get("steps"), "base_model": family, "run": metadata.get("run")}
    entries |= {"software": "Retune", BASE: metadata.get("model")}
    if family in ARCHITECTURES:
        spec = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{ARCHITECTURES[family]}/textual-inversion",
            "implementation": STABILITY,
            "title": metadata.get("run") or concept.token,
            "resolution": f"{SIDES[family]}x{SIDES[family]}",
            "trigger_phrase": concept.token,
            "hash_sha256": f"0x{model_hashes(content, {})[0]}",
        }
        entries |= {f"modelspec.{key}": value for key, value in spec.items()}
    return {key: str(value) for key, value in entries.items() if value not in (None, "")}


def _write(folder: Path, stem: str, outputs: list[_Output]) -> list[Path]:
    """Writes under the first of stem, stem-2, ... that is free or already has this content; returns the paths."""
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        paths = [folder / (name + output.ending) for output in outputs]
        if any(_is_taken(folder / (name + suffix), paths) for suffix in _SUFFIXES):
            continue
        pairs = list(zip(paths, outputs, strict=True))
        if all(not path.exists() or _has_content(path, output) for path, output in pairs):
            for path, output in pairs:
                if not path.exists():
                    _write_file(path, output)
            return paths
    raise AssertionError("count ends")


def _is_taken(path: Path, outputs: list[Path]) -> bool:
    """Whether `path` is an existing file, not among `outputs`, that ComfyUI may load under the same name."""
    return path not in outputs and path.exists()


def _write_file(path: Path, output: _Output) -> None:
    """Writes a pickle or a safetensors file, atomically."""
    if path.suffix == ".pt":
        with atomic_path(path, durable=True) as temporary, temporary.open("wb") as file:
            torch.save(output.content, file)  # given a path, it would put the temporary name into the file
    else:
        write_tensors(path, output.content, output.metadata)


def _has_content(path: Path, output: _Output) -> bool:
    """Whether a file has this content already; False for one that cannot be read."""
    try:
        content, metadata = (read_pickle(path), None) if path.suffix == ".pt" else read_tensors(path)
    except ValueError:
        return False
    return metadata == output.metadata and _equal(content, output.content)


def _equal(left: Any, right: Any) -> bool:
    """Equality of dictionaries of tensors and plain values; tensors also need the same dtype."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right
