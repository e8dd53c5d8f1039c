"""What a folder of images holds: pictures, masks, and everything else, which a report names."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..common.foreign import explain, printable
from ..common.text import count_noun, first_few
from .captions import CAPTION_SUFFIXES, METADATA
from .masks import is_label_file, is_mask_file
from .picture_files import NEEDED, endings
from .report import LISTED, Skipped

IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini", "ehthumbs.db")
"""Names that operating systems leave behind."""
_HEIC, _JXL = (f"opened with {NEEDED[kind]} only: install it, or convert them" for kind in ("HEIC", "JPEG XL"))
_RAW, _VIDEO = "raw photographs: develop them", "videos: save their frames as pictures"
_LAYERS, _VECTORS = (
    "work files with layers: export them as pictures",
    "drawings without pixels: export them as pictures",
)
KINDS = dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), _HEIC) | {".jxl": _JXL}
KINDS |= dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"), _RAW)
KINDS |= dict.fromkeys((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"), _VIDEO)
KINDS |= dict.fromkeys((".clip", ".kra", ".ora", ".psb", ".psd", ".xcf"), _LAYERS)
KINDS |= dict.fromkeys((".ai", ".emf", ".eps", ".pdf", ".ps", ".svg", ".wmf"), _VECTORS)
"""Ending -> why files of it are no images here; others are no pictures at all."""


@dataclass(frozen=True)
class FolderFiles:
    """The visible files below a folder by kind, as sorted relative posix paths."""

    images: tuple[str, ...]
    masks: tuple[str, ...]
    others: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    """Files and folders that cannot be used, with the reason."""

    @property
    def count_endings(self) -> str:
        """The most frequent endings of all, as in "3 x .txt, 1 x no extension"; "nothing" without files."""
        names = sorted((*self.images, *self.masks, *self.others))
        kinds = Counter(_ending(name) or "no extension" for name in names)
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(8)) or "nothing"


def list_folder(folder: Path, mask_folders: bool = False) -> FolderFiles:
    """Lists a folder with its sub-folders, those behind links too.

    Args:
        folder: The folder; hidden files and folders below it are left out.
        mask_folders: Sub-folders called `masks` hold masks, not images. Files that are named as masks never are images.
    """
    files, skipped = visible_files(folder)
    masks = [name for name in files if (is_mask_file(name) if mask_folders else is_label_file(name))]
    rest = sorted(set(files).difference(masks))
    known = endings()
    images = [name for name in rest if name.lower().endswith(known)]
    return FolderFiles(tuple(images), tuple(masks), tuple(sorted(set(rest).difference(images))), tuple(skipped))


def visible_files(folder: Path) -> tuple[list[str], list[Skipped]]:
    """Relative posix paths of all files below a folder that are not hidden, sorted; and what cannot be listed.

    Links to folders are followed. Each folder is read once, those without a link on their way first, so that a link to
    a folder above it ends.
    """
    files, skipped, seen = [], [], set()
    folders, links = deque([folder]), deque()
    while folders or links:
        directory = folders.popleft() if folders else links.popleft()
        name, real = directory.relative_to(folder).as_posix(), os.path.realpath(directory)
        if real in seen:
            skipped.append((printable(name), "it is a link to a folder that is read already"))
            continue
        seen.add(real)
        try:
            entries = sorted(_visible_entries(directory))
        except OSError as error:
            skipped.append((printable(name), f"this folder cannot be read ({explain(error)})"))
            continue
        for path in map(directory.joinpath, entries):
            relative = path.relative_to(folder).as_posix()
            if printable(relative) != relative:
                skipped.append((printable(relative), "its name is not UTF-8; rename it"))
            elif os.path.isdir(path):
                (links if os.path.realpath(path) != os.path.join(real, path.name) else folders).append(path)
            else:
                files.append(relative)
    return sorted(files), sorted(skipped)


def _visible_entries(directory: Path) -> Iterator[str]:
    return (name for name in os.listdir(directory) if not name.startswith(".") and name not in IGNORED)


def left_out(files: FolderFiles, used: Sequence[str], captions: str, masks: str) -> list[str]:
    """Lines on files that a data set has no use for, and why.

    Args:
        files: What the folder holds.
        used: Names of the pictures that have a caption.
        captions: The config's source of captions.
        masks: The config's source of masks.
    """
    texts = [name for name in files.others if _ending(name) in CAPTION_SUFFIXES or name == METADATA]
    rest = sorted(set(files.others).difference(texts))
    lines = [
        _kind_line(ending, [n for n in rest if _ending(n) == ending]) for ending in sorted(set(map(_ending, rest)))
    ]
    unused = [METADATA] if METADATA in texts and captions != METADATA else []
    texts = [name for name in texts if name != METADATA]
    if captions == "txt":
        stems = {_stem(name) for name in (*used, *files.images)}
        alone = [name for name in texts if _stem(name) not in stems]
        lines += [f"captions without a picture: {_some(alone)}"] if alone else []
    else:
        unused += texts
    if unused:
        lines.append(f"texts not used, since captions is {captions!r}: {_some(unused)}")
    if files.masks and masks != "files":
        lines.append(f"masks not used, since masks is {masks!r}: {_some(files.masks)}")
    return lines


def _kind_line(ending: str, names: Sequence[str]) -> str:
    why = KINDS.get(ending, "not pictures")
    return f"left out: {count_noun(len(names), f'{ending} file' if ending else 'file')} ({_first(names)}), {why}"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({_first(names)})"


def _first(names: Sequence[str]) -> str:
    return first_few(names, LISTED)


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    """A file's path without ending, in lower case."""
    return PurePosixPath(name).with_suffix("").as_posix().lower()
