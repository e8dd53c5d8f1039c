"""Captions of image files: from text files, metadata.jsonl or file names; random changes of their tags."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from ..common import foreign
from ..common.text import expect_whole_characters, parse_json_line

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"
MAX_LENGTH = 20_000
"""Characters of the longest caption: 60 windows of a CLIP. What is longer is another text."""
TRAILING_NUMBER = re.compile(r"(?:^|[\s_-]+)\d+$|\s*\(\d+\)$")


def caption_from_text_file(image: Path) -> str | None:
    """The text of the .txt or .caption file with the image's stem, line breaks as spaces; None without such a file.

    Raises ValueError for a file that is no caption: too long, or not UTF-8.
    """
    for suffix in CAPTION_SUFFIXES:
        for path in (image.with_suffix(suffix), image.with_suffix(suffix.upper())):
            if path.exists() and not path.is_dir():
                return expect_caption(" ".join(read_text(path).split()), foreign.printable(str(path)))
    return None


def caption_from_name(image: Path) -> str:
    """The file's stem as a caption: underscores become spaces, trailing numbers ("_012", " (3)") are dropped."""
    return " ".join(TRAILING_NUMBER.sub("", image.stem).replace("_", " ").split())


def with_trigger(caption: str, word: str) -> str:
    """A caption that has a trigger word: put in front, with a comma, unless it stands somewhere in it already."""
    if not word or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{word}, {caption}" if caption else word


def read_metadata(folder: Path) -> list[tuple[str, str]]:
    """Reads the metadata.jsonl of a Hugging Face image folder.

    Each line is an object with `file_name` and `text` (or `caption`). Several lines may name the same file.

    Returns:
        (relative posix path, caption) pairs, sorted by path; a missing caption is "".

    Raises:
        ValueError: A line is something else, or its path leaves the folder; the message has the line number.
    """
    path = folder / METADATA
    if not path.exists():
        raise ValueError(f"{path} is missing; expected one JSON object a line with file_name and text.")
    lines = enumerate(read_text(path).split("\n"), start=1)  # str.splitlines cuts at U+2028 too, inside a caption
    rows = [_metadata_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return sorted(rows, key=lambda row: row[0])


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Raises ValueError for anything else than such a file."""
    return foreign.read_text(path, advice="Save it as UTF-8 text.")


def expect_caption(caption: str, where: str) -> str:
    """The caption. Raises ValueError, beginning with `where`, for one that no text encoder reads."""
    if len(caption) > MAX_LENGTH:
        raise ValueError(
            f"{where} has {len(caption)} characters ({caption[:40]}...); expected at most {MAX_LENGTH}. Put a "
            "description of the image there."
        )
    return expect_whole_characters(caption, where)


def _metadata_row(line: str, where: str) -> tuple[str, str]:
    """Parses a line into (relative path, caption); `where` is its position, for messages."""
    row = parse_json_line(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{where}: no file_name; expected {{"file_name": "a.png", "text": "a caption"}}.')
    caption = row.get("text", row.get("caption"))
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{where}: the caption is {caption!r}; expected a string.")
    caption = expect_caption(" ".join((caption or "").split()), where)
    return _relative_path(row["file_name"], where), caption


def _relative_path(name: str, where: str) -> str:
    """A file name as a relative posix path; ValueError if it leaves the folder, judged without the file system."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
        raise ValueError(f"{where}: file_name {name!r} points outside the folder; expected a path inside it.")
    return path.as_posix()


def vary_tags(
    caption: str,
    *,
    keep: int,
    shuffle: torch.Generator | None,
    dropout: float,
    random: torch.Generator,
    stays: Callable[[str], bool] = lambda tag: False,
) -> str:
    """Shuffles and drops a caption's comma-separated tags.

    Like shuffle_caption, keep_tokens and caption_tag_dropout_rate in sd-scripts.

    Args:
        caption: The caption.
        keep: Number of tags at the start that stay as they are.
        shuffle: Generator for the order of the others; None keeps their order.
        dropout: Probability of dropping each of the others, 0 to 1.
        random: Generator for the dropout.
        stays: Whether a tag is never dropped, such as one with the word that is learned.

    Returns:
        The new caption, which may be "".
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, others = tags[:keep], tags[keep:]
    if shuffle is not None:
        others = [others[i] for i in torch.randperm(len(others), generator=shuffle).tolist()]
    if dropout:
        draws = torch.rand(len(others), generator=random).tolist()
        others = [tag for tag, draw in zip(others, draws, strict=True) if draw >= dropout or stays(tag)]
    return ", ".join(fixed + others)
