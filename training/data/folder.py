"""A folder of captioned images as a data set."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..common.text import first_few
from ..config.folder import FolderConfig
from .buckets import Size, bucket_for, target_sizes
from .captions import METADATA, caption_from_name, caption_from_text_file, read_metadata
from .examples import Dataset, Example, content_key
from .images import EXTENSIONS, ImageError, check_image, has_alpha
from .masks import Mask, is_mask_file, mask_file
from .report import LISTED, Skipped, format_report

log = logging.getLogger(__name__)

FOLDER_REPEATS = re.compile(r"([1-9]\d{0,2})_")
IGNORED_FOLDERS = ("__MACOSX",)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, description); may raise an exception to cancel."""


def load_folder(config: FolderConfig, on_progress: Progress | None = None) -> Dataset:
    """Builds a data set from a folder: decodes every image once to check it, and assigns its caption and bucket.

    Images are in the order of their relative posix paths on every file system.

    Args:
        config: The folder, and how to read it.
        on_progress: Called after each image.

    Raises:
        ValueError: The folder is missing or has no images, or an image has no caption and the config says "stop".
        ImageError: (a ValueError) An image is unreadable and the config says "stop".
    """
    folder = Path(config.folder).expanduser()
    rows, skipped, notes = _find_captions(folder, config)
    buckets = target_sizes(config.resolution, config.buckets)
    examples, sizes = [], []
    for done, (name, caption) in enumerate(rows, start=1):
        try:
            key, size, mask = _read_image(folder / name, config.masks)
        except ImageError as error:
            if config.on_bad_image == "stop":
                raise
            log.warning("%s: %s; skipped.", error.path, error.reason)
            skipped.append((name, error.reason))
        else:
            width, height = bucket_for(*size, buckets)
            repeats = folder_repeats(name)
            examples.append(Example(key, caption, width, height, folder / name, name, repeats, config.weight, mask))
            sizes.append(size)
        if on_progress:
            on_progress(done, len(rows), f"reading images: {name}")
    if not examples:
        raise ValueError(f"{folder} has no usable image; all were skipped: {_list_reasons(skipped)}.")
    dataset = Dataset(tuple(examples), config.crop, config.flip, config.repeats)
    notes += _mask_notes(dataset, folder, config.masks)
    return replace(dataset, report=format_report(dataset, folder.name or str(folder), sizes, skipped, notes))


def _mask_notes(dataset: Dataset, folder: Path, masks: str) -> list[str]:
    """A line for the report on how many images have a mask; empty if masks are off."""
    if masks == "none":
        return []
    count = sum(example.mask is not None for example in dataset.examples)
    if not count:
        log.warning("%s: masks is %r, but no image has one; all count whole.", folder, masks)
    return [f"masks: {count} of {len(dataset.examples)} images"]


def find_images(folder: Path, mask_files: bool = False) -> list[str]:
    """Relative posix paths of all image files below a folder, sorted.

    Args:
        folder: Searched with its sub-folders; hidden files and folders are left out.
        mask_files: Leave out files that are named as masks.

    Raises:
        ValueError: The folder does not exist or has no images; the message lists what it has.
    """
    _check_folder(folder)
    files = [name for name in _visible_files(folder) if not (mask_files and is_mask_file(name))]
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    if not images:
        content = _count_extensions(files)
        raise ValueError(f"folder {folder} holds no images; found {content}. Expected {', '.join(EXTENSIONS)} files.")
    return images


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        state = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"folder {folder} {state}; expected a folder of images.")


def _count_extensions(files: Iterable[str]) -> str:
    """The most frequent extensions, as in "3 x .txt, 1 x no extension"; "nothing" without files."""
    kinds = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in files)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(8)) or "nothing"


def folder_repeats(name: str) -> int:
    """Repeats of an image by its relative path: the number of its innermost folder called `10_name`, else 1.

    The number has at most three digits, so that the year in "2024_holiday" does not count.
    """
    matches = [FOLDER_REPEATS.match(part) for part in PurePosixPath(name).parent.parts]
    return next((int(match[1]) for match in reversed(matches) if match), 1)


def _visible_files(folder: Path) -> list[str]:
    """Relative posix paths of all files below a folder that are not hidden, sorted."""
    files = []
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS]
        files += [(Path(directory) / name).relative_to(folder).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)


def _find_captions(folder: Path, config: FolderConfig) -> tuple[list[tuple[str, str]], list[Skipped], list[str]]:
    """(name, caption) rows, images skipped because they have no caption, and notes for the report."""
    images = find_images(folder, config.masks == "files")
    notes = []
    if config.captions == "metadata.jsonl":
        rows = read_metadata(folder)
        notes = _unlisted_images(images, rows)
    else:
        rows = [(name, _caption(folder / name, config)) for name in images]
    missing = [name for name, caption in rows if not caption]
    if missing and config.on_missing_caption == "stop":
        raise ValueError(
            f"{len(missing)} of {len(rows)} images in {folder} have no caption ({first_few(missing, LISTED)}); "
            f"expected one each ({_expected_caption(config.captions)}). Add them, or choose to skip images without "
            "a caption."
        )
    return [row for row in rows if row[1]], [(name, "it has no caption") for name in missing], notes


def _unlisted_images(images: Sequence[str], rows: Iterable[tuple[str, str]]) -> list[str]:
    """A note about images without a line in metadata.jsonl, if there are any."""
    unlisted = sorted(set(images) - {name for name, _ in rows})
    if not unlisted:
        return []
    return [f"not in {METADATA}: {len(unlisted)} of {len(images)} images ({first_few(unlisted, LISTED)})"]


def _caption(image: Path, config: FolderConfig) -> str:
    """An image's caption by the config's source of captions, or ""."""
    if config.captions == "one caption":
        return config.caption.strip()
    return caption_from_name(image) if config.captions == "file name" else caption_from_text_file(image) or ""


def _expected_caption(captions: str) -> str:
    """Where a source of captions expects the caption, for messages."""
    return {
        "txt": "text in a .txt or .caption file of the same name",
        METADATA: f'"text" in its line of {METADATA}',
        "file name": "words in the file name",
    }[captions]


def _read_image(path: Path, masks: str) -> tuple[str, Size, Mask | None]:
    """An image's content key, size and mask; ImageError if it is unreadable or its mask has another size."""
    data = _read_bytes(path)
    size = check_image(data, path)
    mask = None
    if masks == "alpha" and has_alpha(data, path):
        mask = Mask(content_key(data), alpha=True, source=path)
    elif masks == "files" and (label := mask_file(path)):
        mask = Mask(content_key(_read_bytes(label)), source=label)
        _, height, width = mask.pixels().shape
        if (width, height) != size:
            raise ImageError(label, f"this mask is {width} x {height}, its image {size[0]} x {size[1]}")
    return content_key(data), size, mask


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(path, (error.strerror or str(error)).lower()) from error


def _list_reasons(skipped: list[Skipped]) -> str:
    """The first few skipped files with their reasons."""
    return first_few([f"{name}: {reason}" for name, reason in skipped], LISTED)
