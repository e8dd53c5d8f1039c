"""A folder of captioned images as a data set."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from ..common.parallel import computed_ahead
from ..common.text import first_few
from ..config.folder import FolderConfig
from .buckets import Size, bucket_for, target_sizes
from .captions import METADATA, caption_from_name, caption_from_text_file, expect_caption, read_metadata, with_trigger
from .examples import Dataset, Example, content_key
from .images import check_image, has_alpha
from .listing import FolderFiles, left_out, list_folder
from .masks import Mask, mask_file
from .picture_files import ImageError, endings, read_file
from .report import LISTED, Skipped, format_report

log = logging.getLogger(__name__)

FOLDER_REPEATS = re.compile(r"([1-9]\d{0,2})_")

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
    found = computed_ahead(partial(_try_image, folder, config.masks), (name for name, _ in rows))
    for done, ((name, caption), read) in enumerate(zip(rows, found, strict=True), start=1):
        if isinstance(read, ImageError):
            if config.on_bad_image == "stop":
                raise read
            log.warning("%s: %s; skipped.", read.path, read.reason)
            skipped.append((name, read.reason))
        else:
            key, size, mask = read
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


def find_images(folder: Path) -> list[str]:
    """Relative posix paths of all image files below a folder, sorted; warns of files that are none.

    Args:
        folder: Searched with its sub-folders; hidden files and folders are left out.

    Raises:
        ValueError: The folder does not exist or has no images; the message lists what it has.
    """
    files = _expect_images(folder)
    _warn(folder, left_out(files, (), "txt", "none"), files.skipped)
    return list(files.images)


def _expect_images(folder: Path, mask_folders: bool = False) -> FolderFiles:
    """A folder's files; ValueError for a missing folder and one without images. mask_folders: see `list_folder`."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"folder {folder} {state}; expected a folder of images.")
    files = list_folder(folder, mask_folders)
    if not files.images:
        raise ValueError(
            f"folder {folder} holds no images; found {files.count_endings}. Expected {', '.join(endings())} files."
        )
    return files


def _warn(folder: Path, lines: Iterable[str], skipped: Iterable[Skipped]) -> None:
    """Logs what of a folder is left out."""
    for line in lines:
        log.warning("%s: %s", folder.name or folder, line)
    for name, reason in skipped:
        log.warning("%s: %s; skipped.", name, reason)


def folder_repeats(name: str) -> int:
    """Repeats of an image by its relative path: the number of its innermost folder called `10_name`, else 1.

    The number has at most three digits, so that the year in "2024_holiday" does not count.
    """
    matches = [FOLDER_REPEATS.match(part) for part in PurePosixPath(name).parent.parts]
    return next((int(match[1]) for match in reversed(matches) if match), 1)


def _find_captions(folder: Path, config: FolderConfig) -> tuple[list[tuple[str, str]], list[Skipped], list[str]]:
    """(name, caption) rows, files skipped because they have no caption or cannot be used, and notes for the report."""
    files = _expect_images(folder, config.masks == "files")
    notes = []
    if config.captions == METADATA:
        rows = read_metadata(folder)
        notes = _unlisted_images(files.images, rows)
    else:
        rows = [(name, _caption(folder / name, config)) for name in files.images]
    rows = [(name, with_trigger(caption, config.trigger_word.strip())) for name, caption in rows]
    missing = [name for name, caption in rows if not caption]
    if missing and config.on_missing_caption == "stop":
        raise ValueError(
            f"{len(missing)} of {len(rows)} images in {folder} have no caption ({first_few(missing, LISTED)}); "
            f"expected one each ({_expected_caption(config.captions)}). Add them, or choose to skip images without "
            "a caption."
        )
    lines = left_out(files, [name for name, _ in rows], config.captions, config.masks)
    _warn(folder, [*notes, *lines], files.skipped)
    skipped = [(name, "it has no caption") for name in missing]
    return [row for row in rows if row[1]], [*skipped, *files.skipped], [*notes, *lines]


def _unlisted_images(images: Sequence[str], rows: Iterable[tuple[str, str]]) -> list[str]:
    """A note about images without a line in metadata.jsonl, if there are any."""
    unlisted = sorted(set(images) - {name for name, _ in rows})
    if not unlisted:
        return []
    return [f"not in {METADATA}: {len(unlisted)} of {len(images)} images ({first_few(unlisted, LISTED)})"]


def _caption(image: Path, config: FolderConfig) -> str:
    """An image's caption by the config's source of captions, or ""."""
    if config.captions == "one caption":
        return expect_caption(config.caption.strip(), "caption")
    return caption_from_name(image) if config.captions == "file name" else caption_from_text_file(image) or ""


def _expected_caption(captions: str) -> str:
    """Where a source of captions expects the caption, for messages."""
    return {
        "txt": "text in a .txt or .caption file of the same name",
        METADATA: f'"text" in its line of {METADATA}',
        "file name": "words in the file name",
    }[captions]


def _try_image(folder: Path, masks: str, name: str) -> tuple[str, Size, Mask | None] | ImageError:
    """`_read_image`, or what is wrong with the image."""
    try:
        return _read_image(folder / name, masks)
    except ImageError as error:
        return error


def _read_image(path: Path, masks: str) -> tuple[str, Size, Mask | None]:
    """An image's content key, size and mask; ImageError if it is unreadable or its mask has another size."""
    data = read_file(path)
    size = check_image(data, path)
    mask = None
    if masks == "alpha" and has_alpha(data, path):
        mask = Mask(content_key(data), alpha=True, source=path)
    elif masks == "files" and (label := mask_file(path)):
        mask = _read_mask(label, size)
    return content_key(data), size, mask


def _read_mask(label: Path, size: Size) -> Mask:
    """The mask in a file; ImageError if it is unreadable or of another size than its image."""
    data = read_file(label)
    width, height = check_image(data, label)
    if (width, height) != size:
        raise ImageError(label, f"this mask is {width} x {height}, its image {size[0]} x {size[1]}")
    return Mask(content_key(data), source=label)


def _list_reasons(skipped: list[Skipped]) -> str:
    """The first few skipped files with their reasons."""
    return first_few([f"{name}: {reason}" for name, reason in skipped], LISTED)
