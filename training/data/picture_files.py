"""Opens picture files of others: which kinds are read, how large they may be, and what is wrong with one."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from ..common import foreign
from ..common.foreign import FileError, explain, label
from ..common.signatures import LFS_POINTER, WEB_PAGE

log = logging.getLogger(__name__)

FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "PCX", "PNG", "PPM", "QOI", "SGI")
FORMATS += ("SUN", "TGA", "TIFF", "WEBP")
"""Pillow's names of the kinds that are read: all of one picture each. Left out are icons, work files with layers and
what Pillow hands to another program, such as EPS. HEIF and JXL need a package more."""
BY_ENDING = "TGA"
"""Has no signature, so that any file may pass for one; it is read by its ending only."""
PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}
"""Module that teaches Pillow another kind -> its function to call, or None where importing it is enough."""
NEEDED = {"HEIC": "the package pillow-heif", "JPEG XL": "the package pillow-jxl-plugin"}
SIGNATURES = (
    (4, (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1"), "HEIC"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n"), "JPEG XL"),
    (0, (b"%PDF",), "a PDF"),
    (0, (b"8BPS",), "a Photoshop file"),
    (0, (b"<svg", b"<?xml"), "an SVG or XML file"),
    (0, WEB_PAGE, "a web page"),
    (0, LFS_POINTER, "a pointer of Git LFS; pull the file itself"),
)
"""(offset, beginnings there, what the file is) of what is often found under a picture's ending."""
MAX_BYTES = 2 << 30
MAX_PIXELS = 200_000_000
"""Pixels of the largest picture that is read, that of a phone's 200 megapixels; it takes 0.8 GB."""
MAX_SIDE = 1 << 20


class ImageError(FileError):
    """Raised for a file that cannot be used as an image, with its `path` and the `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{foreign.printable(str(path))}: {reason}. Replace or remove this file.")
        self.path = path
        self.reason = reason


@cache
def _register_plugins() -> None:
    """Registers Pillow's own formats, and those of the `PLUGINS` that are installed."""
    Image.init()
    for module, function in PLUGINS.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            plugin = importlib.import_module(module)
        except (ImportError, OSError) as error:
            log.warning("the package of %s is installed but cannot be used (%s)", module, error)
            continue
        if function:
            getattr(plugin, function)()


def formats() -> tuple[str, ...]:
    """The `FORMATS` that this Pillow opens."""
    _register_plugins()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def endings() -> tuple[str, ...]:
    """The file name endings of these formats in lower case, such as ".jfif", sorted."""
    known = {*formats(), "MPO"}  # a JPEG of several pictures, opened as JPEG
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in known))


def read_file(path: str | Path) -> bytes:
    """A file's content. Raises ImageError for one that is missing, no regular file, or beyond `MAX_BYTES`."""
    try:
        return foreign.read_bytes(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError(path, "no such file or directory") from error
    except FileError as error:
        said = str(error).removeprefix(label(path)).lstrip(": ").partition(". ")[0]
        raise ImageError(path, said if said.startswith("its ") else f"it {said}") from error


@contextmanager
def open_picture(data: bytes, name: str | Path) -> Iterator[Image.Image]:
    """A file's content as Pillow's image; any failure on it inside is an ImageError. name: for messages.

    A truncated file fails too: other packages set Pillow's LOAD_TRUNCATED_IMAGES, which fills what is missing with
    grey. Texts and colour profiles of a PNG may be long: their pixels are sound.
    """
    try:
        if not data:
            raise ImageError(name, "the file is empty")
        with _LIMITS, Image.open(io.BytesIO(data), formats=_formats_for(name)) as image:
            _expect_size(image, name)
            yield image
    except FileError:
        raise
    except Exception as error:  # each of Pillow's readers fails in its own words
        raise ImageError(name, _reason(error, data)) from error


def _formats_for(name: str | Path) -> tuple[str, ...]:
    """The formats that a file of this name may have."""
    known = formats()
    if Image.registered_extensions().get(PurePath(name).suffix.lower()) == BY_ENDING:
        return known
    return tuple(kind for kind in known if kind != BY_ENDING)


def _expect_size(image: Image.Image, name: str | Path) -> None:
    """Raises ImageError for a picture of more pixels than are read, before it is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            name,
            f"it is {width} x {height}, {width * height / 1e6:.0f} megapixels; expected at most "
            f"{MAX_PIXELS / 1e6:.0f} megapixels and {MAX_SIDE} pixels a side. Make it smaller",
        )


def _reason(error: Exception, data: bytes) -> str:
    """The `reason` of an ImageError for an error of Pillow's."""
    if not isinstance(error, UnidentifiedImageError):
        return f"it cannot be decoded ({explain(error)})"
    kind = kind_of(data)
    if kind is None:
        return "it is not an image, or its start is damaged"
    need = f", which needs {NEEDED[kind]}. Install that, or convert the picture" if kind in NEEDED else ""
    return f"it is not an image of a kind that is read: it is {kind}{need}"


def kind_of(data: bytes) -> str | None:
    """What a file is that Pillow does not know, by its first bytes."""
    for offset, beginnings, kind in SIGNATURES:
        if data[offset : offset + 32].startswith(beginnings):
            return kind
    return None


class _Limits:
    """While entered, Pillow's global limits are ours; threads may enter it at the same time.

    `_expect_size` replaces Pillow's limit on pixels, which warns of a camera's pictures.
    """

    VALUES = (
        (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
        (Image, "MAX_IMAGE_PIXELS", None),
        (PngImagePlugin, "MAX_TEXT_CHUNK", 64 << 20),
        (PngImagePlugin, "MAX_TEXT_MEMORY", 256 << 20),
    )

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, ()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = tuple(getattr(module, name) for module, name, _ in self.VALUES)
                for module, name, value in self.VALUES:
                    setattr(module, name, value)
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (module, name, _), value in zip(self.VALUES, self._before, strict=True):
                    setattr(module, name, value)


_LIMITS = _Limits()
