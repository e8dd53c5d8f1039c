"""Reads image files of all common modes as float (3, H, W) sRGB in 0..1; resizes, crops and writes images."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..common.files import write_bytes
from ..config.folder import CROPS
from .picture_files import ImageError, open_picture, read_file
from .pixels import alpha_pixels, is_deep, rgb_pixels, upright_size
from .pixels import has_alpha as image_has_alpha

LARGEST = 16_000_000
"""Pixels of the largest result of a resize that is made whole before it is cropped, if it is much larger than that."""
SPARE = 2
"""A result of at most this many times the target size is made whole, however large."""


def content_key(data: bytes) -> str:
    """First 32 hex digits (128 bits) of the SHA-256 of a file's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_unchanged(path: Path, key: str) -> bytes:
    """The content of a data set's file; ImageError if the file is missing or its `content_key` is no longer `key`."""
    try:
        data = read_file(path)
    except ImageError as error:
        raise ImageError(path, f"it could be read before but not now ({error.reason})") from error
    if content_key(data) != key:
        raise ImageError(path, "it changed since the data set was loaded; load the data set again")
    return data


def load_image(path: str | Path) -> Tensor:
    """Reads an image file as float32 (3, H, W) in 0..1.

    EXIF orientation is applied. Transparent pixels are composited on white. Grey becomes three equal channels; 16-bit
    grey is divided by 65535. Embedded RGB and CMYK colour profiles are converted to sRGB; CMYK without a profile is
    converted by Pillow's formula. Of an animation the first frame is read. Pictures of more than 62 megapixels
    come smaller, see `pixels.MEMORY`.

    Raises:
        ImageError: The file is missing, damaged, truncated or too large.
    """
    return decode_image(read_file(path), path)


def decode_image(data: bytes, name: str | Path) -> Tensor:
    """`load_image` for a file's content; `name` is for messages."""
    with open_picture(data, name) as image:
        return rgb_pixels(image, name)


def has_alpha(data: bytes, name: str | Path) -> bool:
    """Whether a file's content is an image with transparency; decodes only its header."""
    with open_picture(data, name) as image:
        return image_has_alpha(image)


def decode_alpha(data: bytes, name: str | Path) -> Tensor:
    """The alpha channel (1, H, W) in 0..1 of an image's file content, upright; ones without transparency."""
    with open_picture(data, name) as image:
        return alpha_pixels(image)


def check_image(data: bytes, name: str | Path) -> tuple[int, int]:
    """Decodes an image completely to check it; returns its upright (width, height). Raises ImageError."""
    with open_picture(data, name) as image:
        size = upright_size(image)
        if is_deep(image):
            rgb_pixels(image, name)
        image.draft("RGB", (1, 1))  # makes a JPEG decode at an eighth of its size, still to its end
        image.load()
        return size


def image_size(path: str | Path) -> tuple[int, int]:
    """Upright (width, height) of an image file; decodes only its header. Raises ImageError."""
    with open_picture(read_file(path), path) as image:
        return upright_size(image)


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
    size = _size_to_cover(image, width, height)
    spare_x, spare_y = size[1] - width, size[0] - height
    left, top = spare_x // 2, spare_y // 2
    if crop == "random":
        left, top = (int(torch.randint(spare + 1, (1,), generator=generator)) for spare in (spare_x, spare_y))
    if math.prod(size) > max(LARGEST, SPARE * width * height):
        image = _part_around(image, size, (top, left), (height, width))
    else:
        image = _resize(image, size)[:, top : top + height, left : left + width]
    return (image.flip(-1) if flip else image).contiguous()


def flatten_alpha(image: Tensor) -> Tensor:
    """Converts (..., C, H, W) with 1, 3 or 4 channels to 3: grey is repeated, transparency composited on white."""
    channels = image.shape[-3]
    if channels == 4:
        color, alpha = image[..., :3, :, :], image[..., 3:, :, :]
        return color * alpha + (1 - alpha)
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:]) if channels == 1 else image


def _size_to_cover(image: Tensor, width: int, height: int) -> tuple[int, int]:
    """The smallest (height, width) of the image's aspect ratio that covers width x height."""
    _, h, w = image.shape
    scale = max(width / w, height / h)
    return max(height, round(h * scale)), max(width, round(w * scale))


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes to (height, width), bicubic with antialiasing."""
    if size == tuple(image.shape[1:]):
        return image
    resized = functional.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp_(0, 1)


def _part_around(image: Tensor, size: tuple[int, int], start: tuple[int, int], cut: tuple[int, int]) -> Tensor:
    """What `cut` (height, width) at `start` of the image resized to `size` would be, resizing only what it shows.

    An image of 1 x 30000 pixels would take 23 GB before it is cropped to 256 x 1024.
    """
    for axis in (0, 1):
        length, scale = image.shape[axis + 1], size[axis] / image.shape[axis + 1]
        margin = math.ceil(2 * max(1, 1 / scale)) + 1  # the reach of the bicubic kernel
        low = max(0, math.floor(start[axis] / scale) - margin)
        high = min(length, math.ceil((start[axis] + cut[axis]) / scale) + margin)
        part = image.narrow(axis + 1, low, high - low)
        resized = max(cut[axis], round((high - low) * scale))
        part = _resize(part, (resized, part.shape[2]) if axis == 0 else (part.shape[1], resized))
        offset = min(max(0, start[axis] - round(low * scale)), resized - cut[axis])
        image = part.narrow(axis + 1, offset, cut[axis])
    return image
