"""Where the captions of a folder come from (text files, metadata.jsonl, file names, one for all); varied tags."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"
TRAILING_NUMBER = re.compile(r"(?:^|[\s_-]+)\d+$|\s*\(\d+\)$")


def caption_from_text_file(image: Path) -> str | None:
    """The caption in the .txt (else .caption) file of the same stem, line breaks as spaces; None if there is none."""
    for suffix in CAPTION_SUFFIXES:
        path = image.with_suffix(suffix)
        if path.is_file():
            return " ".join(read_text(path).split())
    return None


def caption_from_name(image: Path) -> str:
    """The file's stem as words: underscores become spaces, trailing numbering ("_012", " (3)") is dropped."""
    return " ".join(TRAILING_NUMBER.sub("", image.stem).replace("_", " ").split())


def read_metadata(folder: Path) -> list[tuple[str, str]]:
    """(relative posix path, caption) pairs of a Hugging Face image folder's metadata.jsonl, in the order of the paths.

    Each line is an object with `file_name` and `text` (or `caption`); several lines may caption one file. A missing
    caption is "". Raises ValueError with the line number for anything else, and for paths that leave the folder.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected one JSON object a line with file_name and text.")
    lines = enumerate(read_text(path).splitlines(), start=1)
    rows = [_metadata_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return sorted(rows, key=lambda row: row[0])


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises ValueError naming the file otherwise."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); expected UTF-8. Save it as UTF-8.") from error


def _metadata_row(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{where}: no file_name; expected {{"file_name": "a.png", "text": "a caption"}}.')
    caption = row.get("text", row.get("caption"))
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{where}: the caption is {caption!r}; expected a string.")
    return _inside(row["file_name"], where), " ".join((caption or "").split())


def _inside(name: str, where: str) -> str:
    """The file name as a plain relative path; the check is on the words alone, so it is the same on every system."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
        raise ValueError(f"{where}: file_name {name!r} points outside the folder; expected a path inside it.")
    return path.as_posix()


def vary_tags(
    caption: str, *, keep: int, shuffle: torch.Generator | None, dropout: float, random: torch.Generator
) -> str:
    """A caption's comma-separated tags in a new order (drawn from `shuffle`, if given), a share of them left out.

    The first `keep` tags stay as they are. Each of the others is left out with probability `dropout`, drawn from
    `random`. As shuffle_caption, keep_tokens and caption_tag_dropout_rate in sd-scripts. May return "".
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, others = tags[:keep], tags[keep:]
    if shuffle is not None:
        others = [others[i] for i in torch.randperm(len(others), generator=shuffle).tolist()]
    if dropout:
        draws = torch.rand(len(others), generator=random).tolist()
        others = [tag for tag, draw in zip(others, draws, strict=True) if draw >= dropout]
    return ", ".join(fixed + others)
