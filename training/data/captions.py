"""Captions of image files: from text files, metadata.jsonl or file names; random changes of their tags."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from ..common.text import parse_json_line

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"
TRAILING_NUMBER = re.compile(r"(?:^|[\s_-]+)\d+$|\s*\(\d+\)$")


def caption_from_text_file(image: Path) -> str | None:
    """The text of the .txt or .caption file with the image's stem, line breaks as spaces; None without such a file."""
    for suffix in CAPTION_SUFFIXES:
        path = image.with_suffix(suffix)
        if path.is_file():
            return " ".join(read_text(path).split())
    return None


def caption_from_name(image: Path) -> str:
    """The file's stem as a caption: underscores become spaces, trailing numbers ("_012", " (3)") are dropped."""
    return " ".join(TRAILING_NUMBER.sub("", image.stem).replace("_", " ").split())


def read_metadata(folder: Path) -> list[tuple[str, str]]:
    """Reads the metadata.jsonl of a Hugging Face image folder.

    Each line is an object with `file_name` and `text` (or `caption`). Several lines may name the same file.

    Returns:
        (relative posix path, caption) pairs, sorted by path; a missing caption is "".

    Raises:
        ValueError: A line is something else, or its path leaves the folder; the message has the line number.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected one JSON object a line with file_name and text.")
    lines = enumerate(read_text(path).splitlines(), start=1)
    rows = [_metadata_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return sorted(rows, key=lambda row: row[0])


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Raises ValueError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); expected UTF-8. Save it as UTF-8.") from error


def _metadata_row(line: str, where: str) -> tuple[str, str]:
    """Parses a line into (relative path, caption); `where` is its position, for messages."""
    row = parse_json_line(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{where}: no file_name; expected {{"file_name": "a.png", "text": "a caption"}}.')
    caption = row.get("text", row.get("caption"))
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{where}: the caption is {caption!r}; expected a string.")
    return _relative_path(row["file_name"], where), " ".join((caption or "").split())


def _relative_path(name: str, where: str) -> str:
    """A file name as a relative posix path; ValueError if it leaves the folder, judged without the file system."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
        raise ValueError(f"{where}: file_name {name!r} points outside the folder; expected a path inside it.")
    return path.as_posix()


def vary_tags(
    caption: str, *, keep: int, shuffle: torch.Generator | None, dropout: float, random: torch.Generator
) -> str:
    """Shuffles and drops a caption's comma-separated tags.

    Like shuffle_caption, keep_tokens and caption_tag_dropout_rate in sd-scripts.

    Args:
        caption: The caption.
        keep: Number of tags at the start that stay as they are.
        shuffle: Generator for the order of the others; None keeps their order.
        dropout: Probability of dropping each of the others, 0 to 1.
        random: Generator for the dropout.

    Returns:
        The new caption, which may be "".
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, others = tags[:keep], tags[keep:]
    if shuffle is not None:
        others = [others[i] for i in torch.randperm(len(others), generator=shuffle).tolist()]
    if dropout:
        draws = torch.rand(len(others), generator=random).tolist()
        others = [tag for tag, draw in zip(others, draws, strict=True) if draw >= dropout]
    return ", ".join(fixed + others)
