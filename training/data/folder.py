"""A folder of captioned images as a data set."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..common.text import first_few
from ..config.folder import FolderConfig
from .buckets import Size, bucket_for, make_buckets
from .captions import METADATA, caption_from_name, caption_from_text_file, read_metadata
from .examples import Dataset, Example, content_key
from .images import EXTENSIONS, ImageError, check_image, has_alpha
from .masks import Mask, is_mask_file, mask_file
from .report import LISTED, Skipped, format_report

log = logging.getLogger(__name__)

FOLDER_REPEATS = re.compile(r"([1-9]\d{0,2})_")
IGNORED_FOLDERS = ("__MACOSX",)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what); may raise to cancel."""


def load_folder(config: FolderConfig, on_progress: Progress | None = None) -> Dataset:
    """Reads every image of a folder once: proves that it decodes, hashes it, gives it a caption and a size.

    The order is that of the relative posix paths, whatever the file system. Raises ValueError for a missing folder, no
    images, missing captions; ImageError (a ValueError) for an unreadable image when it should stop.
    """
    folder = Path(config.folder).expanduser()
    rows, skipped, notes = _captioned(folder, config)
    buckets = _sizes(config.resolution, config.buckets)
    examples, sizes = [], []
    for done, (name, caption) in enumerate(rows, start=1):
        try:
            key, size, mask = _inspect(folder / name, config.masks)
        except ImageError as error:
            if config.on_bad_image == "stop":
                raise
            log.warning("%s: %s; skipped.", error.path, error.reason)
            skipped.append((name, error.reason))
        else:
            width, height = bucket_for(*size, buckets)
            times = folder_repeats(name)
            examples.append(Example(key, caption, width, height, folder / name, name, times, config.weight, mask))
            sizes.append(size)
        if on_progress:
            on_progress(done, len(rows), f"reading images: {name}")
    if not examples:
        raise ValueError(f"{folder} has no usable image; all were skipped: {_reasons(skipped)}.")
    dataset = Dataset(tuple(examples), config.crop, config.flip, config.repeats)
    notes += _mask_notes(dataset, folder, config.masks)
    return replace(dataset, report=format_report(dataset, folder.name or str(folder), sizes, skipped, notes))


def _mask_notes(dataset: Dataset, folder: Path, masks: str) -> list[str]:
    if masks == "none":
        return []
    found = sum(example.mask is not None for example in dataset.examples)
    if not found:
        log.warning("%s: masks is %r, but no image has one; all count whole.", folder, masks)
    return [f"masks: {found} of {len(dataset.examples)} images"]


def find_images(folder: Path, mask_files: bool = False) -> list[str]:
    """Relative posix paths of all image files below a folder, sorted; ValueError, saying what is there, if none.

    mask_files: pictures that are named as masks are not images.
    """
    if not folder.is_dir():
        state = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"folder {folder} {state}; expected a folder of images.")
    files = _files(folder)
    files = [name for name in files if not (mask_files and is_mask_file(name))]
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    if not images:
        kinds = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in files)
        found = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(8)) or "nothing"
        raise ValueError(f"folder {folder} holds no images; found {found}. Expected {', '.join(EXTENSIONS)} files.")
    return images


def folder_repeats(name: str) -> int:
    """The number in front of the nearest sub-folder called `10_name`; 1 if there is none.

    At most three digits, so that "2024_holiday" is a year.
    """
    matches = [FOLDER_REPEATS.match(part) for part in PurePosixPath(name).parent.parts]
    return next((int(match[1]) for match in reversed(matches) if match), 1)


def _files(folder: Path) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _captioned(folder: Path, config: FolderConfig) -> tuple[list[tuple[str, str]], list[Skipped], list[str]]:
    """(name, caption) rows, those skipped for want of a caption, and notes for the report."""
    images = find_images(folder, config.masks == "files")
    notes = []
    if config.captions == "metadata.jsonl":
        rows = read_metadata(folder)
        unlisted = sorted(set(images) - {name for name, _ in rows})
        notes = (
            [f"not in {METADATA}: {len(unlisted)} of {len(images)} images ({first_few(unlisted, LISTED)})"]
            if unlisted
            else []
        )
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


def _caption(image: Path, config: FolderConfig) -> str:
    if config.captions == "one caption":
        return config.caption.strip()
    return caption_from_name(image) if config.captions == "file name" else caption_from_text_file(image) or ""


def _expected_caption(captions: str) -> str:
    return {
        "txt": "text in a .txt or .caption file of the same name",
        METADATA: f'"text" in its line of {METADATA}',
        "file name": "words in the file name",
    }[captions]


def _inspect(path: Path, masks: str) -> tuple[str, Size, Mask | None]:
    """An image's content key, size and mask. Raises ImageError for an unreadable one or a mask that does not fit."""
    data = _bytes_of(path)
    size = check_image(data, path)
    mask = None
    if masks == "alpha" and has_alpha(data, path):
        mask = Mask(content_key(data), alpha=True, source=path)
    elif masks == "files" and (place := mask_file(path)):
        mask = Mask(content_key(_bytes_of(place)), source=place)
        _, height, width = mask.pixels().shape
        if (width, height) != size:
            raise ImageError(place, f"this mask is {width} x {height}, its image {size[0]} x {size[1]}")
    return content_key(data), size, mask


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(path, (error.strerror or str(error)).lower()) from error


def _sizes(resolution: int, buckets: bool) -> tuple[Size, ...]:
    return make_buckets(resolution) if buckets else ((resolution, resolution),)


def _reasons(skipped: list[Skipped]) -> str:
    return first_few([f"{name}: {reason}" for name, reason in skipped], LISTED)
