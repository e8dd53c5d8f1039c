"""Reads image files of all common modes as float (3, H, W) sRGB in 0..1; resizes, crops and writes images."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from ..common.files import write_bytes
from ..config.folder import CROPS

log = logging.getLogger(__name__)

EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """Raised for a file that cannot be used as an image, with its `path` and the `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}. Replace or remove this file.")
        self.path = path
        self.reason = reason


def content_key(data: bytes) -> str:
    """First 32 hex digits (128 bits) of the SHA-256 of a file's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_unchanged(path: Path, key: str) -> bytes:
    """The content of a data set's file; ImageError if the file is missing or its `content_key` is no longer `key`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(path, f"it could be read before but not now ({error.strerror})") from error
    if content_key(data) != key:
        raise ImageError(path, "it changed since the data set was loaded; load the data set again")
    return data


def load_image(path: str | Path) -> Tensor:
    """Reads an image file as float32 (3, H, W) in 0..1.

    EXIF orientation is applied. Transparent pixels are composited on white. Grey becomes three equal channels; 16-bit
    grey is divided by 65535. Embedded RGB and CMYK colour profiles are converted to sRGB; CMYK without a profile is
    converted by Pillow's formula. Of an animation the first frame is read.

    Raises:
        ImageError: The file is missing, damaged or truncated.
    """
    return decode_image(_read(path), path)


def decode_image(data: bytes, name: str | Path) -> Tensor:
    """`load_image` for a file's content; `name` is for messages."""
    with _readable(data, name) as image:
        return _to_tensor(ImageOps.exif_transpose(image), name)


def has_alpha(data: bytes, name: str | Path) -> bool:
    """Whether a file's content is an image with transparency; decodes only its header."""
    with _readable(data, name) as image:
        return _has_alpha(image)


def decode_alpha(data: bytes, name: str | Path) -> Tensor:
    """The alpha channel (1, H, W) in 0..1 of an image's file content, upright; ones without transparency."""
    with _readable(data, name) as image:
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
        return torch.from_numpy(np.array(alpha))[None].float().div_(255)


def check_image(data: bytes, name: str | Path) -> tuple[int, int]:
    """Decodes an image completely to check it; returns its upright (width, height). Raises ImageError."""
    with _readable(data, name) as image:
        size = _upright_size(image)
        if _is_deep(image):
            _to_tensor(image, name)
        image.draft("RGB", (1, 1))  # makes a JPEG decode at an eighth of its size, still to its end
        image.load()
        return size


def image_size(path: str | Path) -> tuple[int, int]:
    """Upright (width, height) of an image file; decodes only its header. Raises ImageError."""
    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except UNREADABLE as error:
        raise ImageError(path, _reason(error)) from error


def to_pil(image: Tensor) -> Image.Image:
    """Converts a float (3, H, W) image to an 8-bit Pillow image; values are clipped to 0..1."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def save_png(image: Tensor, path: str | Path) -> None:
    """Writes a float (3, H, W) image in 0..1 as an 8-bit PNG, atomically."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image shape is {tuple(image.shape)}; expected (3, H, W).")
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def contact_sheet(images: Sequence[Tensor], columns: int = 4) -> Tensor:
    """Arranges (3, h, w) images of one size in a (3, H, W) grid of up to `columns` columns; empty cells are black."""
    columns = min(columns, len(images))
    height, width = images[0].shape[-2:]
    sheet = torch.zeros(3, -(-len(images) // columns) * height, columns * width)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return sheet


def resize_and_crop(
    image: Tensor,
    width: int,
    height: int,
    crop: str = "center",
    generator: torch.Generator | None = None,
    flip: bool = False,
) -> Tensor:
    """Resizes an image, at its aspect ratio, to cover a size, and crops the rest.

    The resize is bicubic with antialiasing.

    Args:
        image: (C, H, W) in 0..1.
        width: Target width in pixels.
        height: Target height in pixels.
        crop: "center" crops both sides equally, "random" draws the offset from `generator`.
        generator: Required for "random".
        flip: Mirror the result left to right.

    Returns:
        (C, height, width) in 0..1.

    Raises:
        ValueError: `crop` is unknown, or the generator is missing.
    """
    if crop not in CROPS:
        raise ValueError(f"crop is {crop!r}; expected one of {', '.join(CROPS)}.")
    if crop == "random" and generator is None:
        raise ValueError('generator is None; expected a torch.Generator. crop "random" draws from it.')
    image = _resize_to_cover(image, width, height)
    spare_x, spare_y = image.shape[2] - width, image.shape[1] - height
    left, top = spare_x // 2, spare_y // 2
    if crop == "random":
        left, top = (int(torch.randint(spare + 1, (1,), generator=generator)) for spare in (spare_x, spare_y))
    image = image[:, top : top + height, left : left + width]
    return (image.flip(-1) if flip else image).contiguous()


def flatten_alpha(image: Tensor) -> Tensor:
    """Converts (..., C, H, W) with 1, 3 or 4 channels to 3: grey is repeated, transparency composited on white."""
    channels = image.shape[-3]
    if channels == 4:
        color, alpha = image[..., :3, :, :], image[..., 3:, :, :]
        return color * alpha + (1 - alpha)
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:]) if channels == 1 else image


def _resize_to_cover(image: Tensor, width: int, height: int) -> Tensor:
    """Resizes at the image's aspect ratio to the smallest size that covers width x height."""
    _, h, w = image.shape
    scale = max(width / w, height / h)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size == (h, w):
        return image
    resized = functional.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp_(0, 1)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error


@contextmanager
def _readable(data: bytes, name: str | Path) -> Iterator[Image.Image]:
    """Opens an image, with ImageError for a truncated one.

    Other packages set Pillow's global LOAD_TRUNCATED_IMAGES, which fills the missing part with grey instead.
    """
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except ImageError:
        raise
    except UNREADABLE as error:
        raise ImageError(name, "the file is empty" if not data else _reason(error)) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _reason(error: Exception) -> str:
    """The `reason` of an ImageError for an error of Pillow's."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or its start is damaged"
    return f"it cannot be decoded ({getattr(error, 'strerror', None) or str(error) or type(error).__name__})"


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    rotated = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if rotated else (width, height)


def _to_tensor(image: Image.Image, name: str | Path) -> Tensor:
    """A Pillow image of any mode as float (3, H, W) in 0..1."""
    if _is_deep(image):
        return _deep_grey(image, 1 if image.mode == "F" else 65535, name)
    pixels = torch.from_numpy(np.array(_to_rgb(image, name)))
    return pixels.permute(2, 0, 1).contiguous().float().div_(255)


def _is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per channel; in Pillow only grey modes do (it reads deep colour as 8 bits)."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep_grey(image: Image.Image, white: int, name: str | Path) -> Tensor:
    """A 16-bit or float grey image as (3, H, W) in 0..1; `white` is the value of white."""
    grey = torch.from_numpy(np.array(image).astype(np.float32))
    if not (grey.isfinite().all() and 0 <= grey.min() and grey.max() <= white):
        raise ImageError(name, f"its {image.mode} grey values are not all within 0..{white}")
    return (grey / white).expand(3, -1, -1).contiguous()


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")


def _to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Converts any 8-bit mode to RGB in sRGB, transparency composited on white."""
    profile = image.info.get("icc_profile")
    if _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        return _lab_to_srgb(image)
    image = image if image.mode in ("RGB", "CMYK", "L") else image.convert("RGB")
    return (_profile_to_srgb(image, profile, name) if profile else image).convert("RGB")


def _profile_to_srgb(image: Image.Image, profile: bytes, name: str | Path) -> Image.Image:
    """Converts an RGB or CMYK image from its colour profile to sRGB; profiles of other kinds are ignored."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != image.mode or "sRGB" in (source.profile.profile_description or ""):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("%s: its colour profile cannot be used (%s); the plain conversion is taken.", name, error)
        return image


def _lab_to_srgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    return ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
