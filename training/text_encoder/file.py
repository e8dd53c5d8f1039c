"""Saves a T5 text encoder as one file: name and hash of the T5, projection, scale and padding.

The file is safetensors with tensors `projection.*`; the rest is JSON in the metadata entry `retune.text_encoder`. It
does not contain the T5's weights, which are found by name and hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import write_tensors
from ..common.foreign import finite_number, label, metadata_json, read_tensors, reading, short, whole_number
from .projection import Projection
from .t5 import Padding
from .t5_file import file_hash

FORMAT_VERSION = 1
METADATA = "retune.text_encoder"
"""Metadata entry with the description, as JSON."""
RUN = "retune.run"
"""Metadata entry with facts about the run, as JSON."""
MOST_TOKENS = 1 << 16
"""Longest context that a file may ask for; with pads every prompt takes it."""
PREFIX = "projection."
"""Prefix of the projection's tensors."""


@dataclass(frozen=True, kw_only=True)
class SavedTextEncoder:
    """Everything needed to rebuild a T5 text encoder, except the T5's weights."""

    projection: Projection
    padding: Padding
    t5_file: str
    """Name of the T5's file or folder, without the path."""
    t5_sha256: str
    t5_config: dict
    tokenizer: str = ""
    """The tokenizer's fingerprint."""
    target_std: float | None = None
    """Output std that it was scaled to, before any training of the projection; None if it was not scaled."""
    dtype: str = "default"
    """Storage dtype of the T5 in ComfyUI."""
    keeps_clip: bool = False
    """Whether its context is appended to a CLIP's; that CLIP is not part of the file."""
    name: str = ""
    """Name of the file it was read from, for messages."""

    @property
    def width(self) -> int:
        """Width of its context."""
        return self.projection.width

    def check_width(self, width: int) -> None:
        """Raises ValueError unless the denoiser reads a context of this width."""
        if width != self.width:
            raise ValueError(
                f"text encoder {self.name} gives a width of {self.width}; expected the model's {width}. "
                "Use the model it was made for, or a new projection."
            )

    def check_keep_clip(self, has_clip: bool) -> None:
        """Raises ValueError if its context needs a CLIP's before it and there is none."""
        if self.keeps_clip and not has_clip:
            raise ValueError(
                f"text encoder {self.name} was made beside a CLIP, which is not part of its file; expected that CLIP. "
                "Connect it to keep_clip."
            )

    def check_pooled(self, width: int) -> None:
        """Raises ValueError unless its pooled output has the width that the denoiser reads, 0 for none."""
        pooled = self.projection.pooled_width
        if width and pooled != width:
            raise ValueError(
                f"text encoder {self.name} gives {f'a pooled output of {pooled}' if pooled else 'no pooled output'}; "
                f"expected {width}. Use one made for SDXL, or a new projection."
            )

    def check_t5(self, path: str | Path) -> None:
        """Raises ValueError if the T5 at `path` is not the one it was saved with."""
        sha256 = file_hash(path)
        if sha256 != self.t5_sha256:
            raise ValueError(
                f"{Path(path).name} is not the T5 that text encoder {self.name} was made with: its SHA-256 is "
                f"{sha256[:16]}..., expected {self.t5_sha256[:16]}... of {self.t5_file}. Put that file in place."
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError if a tokenizer is not the one it was saved with."""
        if self.tokenizer and fingerprint != self.tokenizer:
            raise ValueError(
                f"the tokenizer found for {self.t5_file} (fingerprint {fingerprint[:16]}) differs from the one that "
                f"text encoder {self.name} was made with ({self.tokenizer[:16]}). Put that tokenizer beside the T5."
            )

    def find_t5(self, folders: Iterable[str | Path]) -> Path:
        """Finds the T5 by name and hash in some folders and their sub-folders.

        Raises:
            FileNotFoundError: No file has its name.
            ValueError: The files of its name have other content.
        """
        folders = [Path(folder) for folder in folders]
        candidates = [path for folder in folders for path in _find_by_name(folder, Path(self.t5_file).name)]
        if not candidates:
            raise self._t5_not_in(folders)
        for path in candidates:
            with suppress(FileNotFoundError):  # a folder of this name may have other content, or lack shards
                if file_hash(path) == self.t5_sha256:
                    return path
        self.check_t5(candidates[0])
        raise AssertionError("check_t5 accepted a T5 of another hash")

    def _t5_not_in(self, folders: Iterable[Path]) -> FileNotFoundError:
        searched = ", ".join(str(folder) for folder in folders)
        return FileNotFoundError(
            f"text encoder {self.name} needs the T5 {self.t5_file} (SHA-256 {self.t5_sha256[:16]}...), which is "
            f"not in {searched}. Put it there."
        )


def _find_by_name(root: Path, name: str) -> list[Path]:
    """Files and folders of a name below a folder, sorted; also in linked folders, each visited once."""
    paths, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above it would lead round and round
            folders.clear()
            continue
        visited.add(real)
        if name in folders or name in files:
            paths.append(Path(folder) / name)
    return sorted(paths)


def save_text_encoder(path: str | Path, saved: SavedTextEncoder, run: Mapping[str, Any] | None = None) -> None:
    """Writes a T5 text encoder's file, with tensors in fp32.

    Args:
        path: The file.
        saved: The text encoder.
        run: Facts about the run that trained it, see `about_run`.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "t5_file": saved.t5_file,
        "t5_sha256": saved.t5_sha256,
        "t5_config": saved.t5_config,
        "tokenizer": saved.tokenizer,
        "width": saved.width,
        "projection": saved.projection.config(),
        "target_std": saved.target_std,
        "max_tokens": saved.padding.max_tokens,
        "pad": saved.padding.pad,
        "dtype": saved.dtype,
        "keeps_clip": saved.keeps_clip,
    }
    state = saved.projection.state_dict().items()
    tensors = {PREFIX + name: value.detach().float().cpu().contiguous().clone() for name, value in state}
    metadata = {METADATA: json.dumps(description)} | ({RUN: json.dumps(run)} if run else {})
    write_tensors(path, tensors, metadata)


def read_text_encoder(path: str | Path) -> SavedTextEncoder:
    """Reads a file written by `save_text_encoder`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another kind, or of a newer format version.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    with reading(path, advice="Save the text encoder again."):
        description = _description(path, metadata)
        try:
            return _from_description(path.name, description, tensors)
        except ValueError as error:
            raise ValueError(f"{label(path)} is damaged: {error}") from error


def _description(path: Path, metadata: Mapping[str, str]) -> dict:
    """The text encoder's description in a file's metadata; ValueError if there is none or its version is newer."""
    if METADATA not in metadata:
        raise ValueError(f"{path.name} is no saved text encoder; expected a file written by Save Text Encoder")
    description = metadata_json(metadata, METADATA)
    version = whole_number(description.get("format_version", 0), "its format version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(f"{path.name} has format version {version}; expected at most {FORMAT_VERSION}. Update retune.")
    return description


def _from_description(name: str, description: dict, tensors: dict) -> SavedTextEncoder:
    """Builds the text encoder from a file's JSON and tensors; KeyError or ValueError for what does not fit."""
    state = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    std = description["target_std"]
    most = whole_number(description["max_tokens"], "max_tokens", 2, MOST_TOKENS)
    return SavedTextEncoder(
        projection=Projection.from_state(_entry(description, "projection", dict), state),
        padding=Padding(max_tokens=most, pad=_entry(description, "pad", str)),
        t5_file=_entry(description, "t5_file", str),
        t5_sha256=_entry(description, "t5_sha256", str),
        t5_config=_entry(description, "t5_config", dict),
        tokenizer=_entry(description, "tokenizer", str),
        target_std=None if std is None else finite_number(std, "target_std"),
        dtype=_entry(description, "dtype", str),
        keeps_clip=_entry({"keeps_clip": False} | description, "keeps_clip", bool),
        name=name,
    )


def _entry(description: Mapping[str, Any], name: str, kind: type) -> Any:
    """An entry of a type. Raises KeyError where it is missing and ValueError for another type."""
    if not isinstance(description[name], kind):
        raise ValueError(f"its {name} is {short(description[name])}; expected a {kind.__name__}")
    return description[name]
