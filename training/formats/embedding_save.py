"""Embeddings as files that other programs read.

safetensors: one file for ComfyUI, A1111, Forge, OneTrainer and diffusers. One CLIP alone stands under `emp_params`:
OneTrainer looks for that name, the others take whatever single tensor there is. SDXL stands under `clip_l` and
`clip_g`, a T5 under ComfyUI's name of it. "A1111 pt": A1111's own dictionary, which every program reads too; for SDXL
`clip_l` and `clip_g`, as A1111 knows no other. diffusers: the token as the key; for SDXL a second file `<name>_2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import atomic_path, read_pickle, read_tensors, write_tensors
from ..config.tokens import check_token
from ..models.concepts import Concept
from .embedding import Embedding
from .embedding_fit import family_of
from .lora_metadata import ARCHITECTURES, SIDES, STABILITY, model_hashes

FORMATS = ("safetensors", "A1111 pt", "diffusers")
TOKEN = "%token%"
_SUFFIXES = (".safetensors", ".pt", ".bin")
"""What ComfyUI tries behind `embedding:<name>`, in this order."""
_FIRST = 265
"""CLIP's id of "*", A1111's placeholder."""


@dataclass(frozen=True)
class _Output:
    """One file to write. ending: what follows the common name."""

    ending: str
    content: dict[str, Any]
    metadata: dict[str, str] | None = None


def save_embedding(folder: str | Path, embedding: Embedding, format: str, prefix: str = TOKEN) -> list[list[Path]]:
    """Writes each concept below `folder`, fp32; the files of each, in the order of the text encoders.

    prefix: the name without ending, may hold %token% and sub-folders. A name that other content has gets -2, -3, ...;
    equal content is left as it is. Errors: ValueError for an unknown format, one that cannot hold such an embedding, a
    token or prefix that gives no name, a prefix that leaves the folder.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}.")
    outputs = [
        (_stem(prefix, concept), _outputs(concept, embedding.metadata, format)) for concept in embedding.concepts
    ]
    return [_write(Path(folder), stem, parts) for stem, parts in outputs]


def token_file_name(token: str) -> str:
    """A token as a file name that `embedding:` can spell: letters, digits, `.`, `_` and `-` stay; "" when none do."""
    return re.sub(r"[^\w.-]", "", token).strip(".-")


def _stem(prefix: str, concept: Concept) -> str:
    name = token_file_name(concept.token)
    if TOKEN in prefix and not name:
        raise ValueError(f"token {concept.token} gives no file name; expected letters or digits. Set filename_prefix.")
    stem = prefix.replace(TOKEN, name).replace("\\", "/").strip()
    if not stem or stem.endswith("/") or Path(stem).is_absolute() or ".." in Path(stem).parts:
        raise ValueError(f"filename_prefix is {prefix!r}; expected a name below models/embeddings, without '..'.")
    return stem


def _outputs(concept: Concept, about: Mapping, format: str) -> list[_Output]:
    token = check_token(concept.token)
    vectors = {name: value.detach().float().cpu().contiguous().clone() for name, value in concept.vectors.items()}
    names = [name for name in ("clip_l", "clip_h", "clip_g") if name in vectors]
    if format != "safetensors" and len(names) < len(vectors):
        raise ValueError(
            f"format is {format!r} and {token} has vectors for {', '.join(vectors)}; expected safetensors."
        )
    if format == "diffusers":
        parts = [{token: vectors[name]} for name in names]
        endings = [f"{'_2' * i}.safetensors" for i in range(len(parts))]
        return [_Output(e, part, _metadata(concept, about, part)) for e, part in zip(endings, parts, strict=True)]
    single = next(iter(vectors.values())) if len(vectors) == 1 and names else None
    if format == "A1111 pt":
        return [_Output(".pt", vectors if single is None else _a1111(token, single, about))]
    content = vectors if single is None else {"emp_params": single}
    return [_Output(".safetensors", content, _metadata(concept, about, content))]


def _a1111(token: str, vectors: Tensor, about: Mapping) -> dict[str, Any]:
    return {
        "string_to_token": {"*": _FIRST},
        "string_to_param": {"*": vectors},
        "name": token,
        "step": about.get("steps"),
        "sd_checkpoint": None,
        "sd_checkpoint_name": about.get("base"),
    }


def _metadata(concept: Concept, about: Mapping, content: Mapping[str, Tensor]) -> dict[str, str]:
    """Token, step, base and run; ModelSpec 1.0.1 for the families that it has names for. There is no clock in it."""
    family = about.get("base") or family_of(concept.vectors)
    said = {"token": concept.token, "step": about.get("steps"), "base_model": family, "run": about.get("run")}
    said |= {"software": "Retune"}
    if family in ARCHITECTURES:
        spec = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{ARCHITECTURES[family]}/textual-inversion",
            "implementation": STABILITY,
            "title": about.get("run") or concept.token,
            "resolution": f"{SIDES[family]}x{SIDES[family]}",
            "trigger_phrase": concept.token,
            "hash_sha256": f"0x{model_hashes(content, {})[0]}",
        }
        said |= {f"modelspec.{key}": value for key, value in spec.items()}
    return {key: str(value) for key, value in said.items() if value not in (None, "")}


def _write(folder: Path, stem: str, outputs: list[_Output]) -> list[Path]:
    """Under the first name that is free, or whose files are these already."""
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        paths = [folder / (name + output.ending) for output in outputs]
        if any(_is_other(folder / (name + suffix), paths) for suffix in _SUFFIXES):
            continue
        pairs = list(zip(paths, outputs, strict=True))
        if all(not path.exists() or _holds(path, output) for path, output in pairs):
            for path, output in pairs:
                if not path.exists():
                    _write_one(path, output)
            return paths
    raise AssertionError("count ends")


def _is_other(path: Path, ours: list[Path]) -> bool:
    """Whether another file answers to the same `embedding:` name."""
    return path not in ours and path.exists()


def _write_one(path: Path, output: _Output) -> None:
    if path.suffix == ".pt":
        with atomic_path(path, durable=True) as temporary:
            torch.save(output.content, temporary)
    else:
        write_tensors(path, output.content, output.metadata)


def _holds(path: Path, output: _Output) -> bool:
    """Whether a file has this content already; one that cannot be read has not."""
    try:
        found, metadata = (read_pickle(path), None) if path.suffix == ".pt" else read_tensors(path)
    except ValueError:
        return False
    return metadata == output.metadata and _equal(found, output.content)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right
