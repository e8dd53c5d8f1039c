"""One file for a swapped text encoder: which T5 (name and hash), its projection, scale and padding.

Safetensors; tensors `projection.*`, the rest as JSON in the metadata entry `retune.text_encoder`. The T5 weights stay
where they are and are recognised by their hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import read_tensors, write_tensors
from .projection import Projection
from .t5 import Padding
from .t5_file import file_hash

FORMAT_VERSION = 1
METADATA = "retune.text_encoder"
RUN = "retune.run"
PREFIX = "projection."


@dataclass(frozen=True, kw_only=True)
class SavedTextEncoder:
    """Everything needed to rebuild a T5 text encoder beside the T5 file itself."""

    projection: Projection
    padding: Padding
    t5_file: str
    """File or folder name of the T5, without its directory."""
    t5_sha256: str
    t5_config: dict
    tokenizer: str = ""
    """The tokenizer's fingerprint."""
    target_std: float | None = None
    """What the output was scaled to, before any training of the projection; None when it was not."""
    dtype: str = "default"
    """Storage dtype of the T5 in ComfyUI."""
    keeps_clip: bool = False
    """Whether a CLIP's context came before the T5's; that CLIP is not part of the file."""
    name: str = ""
    """The file this was read from, for messages."""

    @property
    def width(self) -> int:
        return self.projection.width

    def check_width(self, width: int) -> None:
        """Raises ValueError when the denoiser reads another width."""
        if width != self.width:
            raise ValueError(
                f"text encoder {self.name} gives a width of {self.width}; expected the model's {width}. "
                "Use the model it was made for, or a new projection."
            )

    def check_keep_clip(self, given: bool) -> None:
        """Raises ValueError when this stood beside a CLIP and none is `given`."""
        if self.keeps_clip and not given:
            raise ValueError(
                f"text encoder {self.name} was made beside a CLIP, which is not part of its file; expected that CLIP. "
                "Connect it to keep_clip."
            )

    def check_pooled(self, width: int) -> None:
        """Raises ValueError when the denoiser reads a pooled output (`width` above 0) that this does not give."""
        found = self.projection.pooled_width
        if width and found != width:
            raise ValueError(
                f"text encoder {self.name} gives {f'a pooled output of {found}' if found else 'no pooled output'}; "
                f"expected {width}. Use one made for SDXL, or a new projection."
            )

    def check_t5(self, path: str | Path) -> None:
        """Raises ValueError when the T5 at `path` is not the one this was made with."""
        found = file_hash(path)
        if found != self.t5_sha256:
            raise ValueError(
                f"{Path(path).name} is not the T5 that text encoder {self.name} was made with: its SHA-256 is "
                f"{found[:16]}..., expected {self.t5_sha256[:16]}... of {self.t5_file}. Put that file in place."
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError when the tokenizer is not the one this was made with."""
        if self.tokenizer and fingerprint != self.tokenizer:
            raise ValueError(
                f"the tokenizer found for {self.t5_file} (fingerprint {fingerprint[:16]}) differs from the one that "
                f"text encoder {self.name} was made with ({self.tokenizer[:16]}). Put that tokenizer beside the T5."
            )

    def find_t5(self, folders: Iterable[str | Path]) -> Path:
        """The T5 under one of `folders`, by name and hash. Errors: as `check_t5`; FileNotFoundError names the file."""
        folders = [Path(folder) for folder in folders]
        places = [place for folder in folders for place in _named(folder, Path(self.t5_file).name)]
        if not places:
            looked = ", ".join(str(folder) for folder in folders)
            raise FileNotFoundError(
                f"text encoder {self.name} needs the T5 {self.t5_file} (SHA-256 {self.t5_sha256[:16]}...), which is "
                f"not in {looked}. Put it there."
            )
        for place in places:
            with suppress(FileNotFoundError):  # a folder of this name may hold something else, or not all its shards
                if file_hash(place) == self.t5_sha256:
                    return place
        self.check_t5(places[0])
        raise AssertionError("check_t5 accepted a T5 of another hash")


def _named(root: Path, name: str) -> list[Path]:
    """Files and folders of this name below a folder, linked folders included, sorted."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        if name in folders or name in files:
            found.append(Path(folder) / name)
    return sorted(found)


def save_text_encoder(path: str | Path, saved: SavedTextEncoder, about: Mapping[str, Any] | None = None) -> None:
    """Writes a text encoder's description and projection, fp32. about: what its run was, see `stock_file.about_run`."""
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
    more = {RUN: json.dumps(about)} if about else {}
    write_tensors(path, tensors, {METADATA: json.dumps(description), **more})


def read_text_encoder(path: str | Path) -> SavedTextEncoder:
    """Reads what `save_text_encoder` wrote.

    Errors: ValueError for a damaged file, one of another kind or a newer format; FileNotFoundError when not there.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if METADATA not in metadata:
        raise ValueError(f"{path.name} is no saved text encoder; expected a file written by Save Text Encoder")
    description = json.loads(metadata[METADATA])
    version = description.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(f"{path.name} has format version {version}; expected at most {FORMAT_VERSION}. Update retune.")
    try:
        return _from_description(path.name, description, tensors)
    except KeyError as error:
        raise ValueError(
            f"{path.name} is damaged: its description lacks {error}. Save the text encoder again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def _from_description(name: str, description: dict, tensors: dict) -> SavedTextEncoder:
    state = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    projection = Projection.from_state(description["projection"], state)
    return SavedTextEncoder(
        projection=projection,
        padding=Padding(max_tokens=description["max_tokens"], pad=description["pad"]),
        t5_file=description["t5_file"],
        t5_sha256=description["t5_sha256"],
        t5_config=description["t5_config"],
        tokenizer=description["tokenizer"],
        target_std=description["target_std"],
        dtype=description["dtype"],
        keeps_clip=description.get("keeps_clip", False),
        name=name,
    )
