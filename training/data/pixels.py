"""Pixels of Pillow's images of every mode as floats, upright and in sRGB.

An image is converted band by band, so that a large one takes no more memory than its pixels before and after.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .picture_files import ImageError

log = logging.getLogger(__name__)

ORIENTATION = 0x0112
MEMORY = 1_000_000_000
"""Bytes that a picture may take while it is converted: 4 a pixel in Pillow and 12 as floats, so 62 megapixels, more
than any camera of full frame has. Of a larger one, which no training shows whole, the mean of n x n pixels is taken."""
BAND = 4_000_000
"""Pixels of a band."""
Convert = Callable[[Image.Image], np.ndarray]
"""An image, or a band of one -> (h, w, 1 or channels) numbers."""


def orientation(image: Image.Image) -> int:
    """How the stored image is turned or mirrored, 1 to 8 as in EXIF; 1 for a TIFF, which Pillow sets upright itself."""
    return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the upright image."""
    width, height = image.size
    return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)


def rgb_pixels(image: Image.Image, name: str | Path) -> Tensor:
    """An image of any mode as float (3, H, W) in 0..1, transparency laid on white; name: for messages."""
    if is_deep(image):
        white = 1 if image.mode == "F" else 65535
        return _upright(image, 3, lambda band: _deep_grey(band, white, name), white)
    return _upright(image, 3, _rgb_converter(image, name), 255)


def alpha_pixels(image: Image.Image) -> Tensor:
    """The alpha channel (1, H, W) in 0..1; ones without transparency."""
    return _upright(image, 1, lambda band: np.asarray(band.convert("RGBA").getchannel("A"))[..., None], 255)


def is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per channel; in Pillow only grey modes do (it reads deep colour as 8 bits)."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")


def _upright(image: Image.Image, channels: int, convert: Convert, white: float) -> Tensor:
    """The upright image as float (channels, H, W), what `convert` gives divided by `white`."""
    image.load()
    factor = _factor(image.width * image.height)
    width, height = image.width // factor, image.height // factor
    turned = orientation(image)
    canvas = np.empty((channels, width, height) if turned in (5, 6, 7, 8) else (channels, height, width), np.float32)
    stored = _as_stored(canvas, turned)
    rows = max(1, BAND // image.width // factor)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        whole = factor == 1 and bottom - top == height
        band = image if whole else image.crop((0, top * factor, width * factor, bottom * factor))
        stored[:, top:bottom] = _shrunk(convert(band), factor).transpose(2, 0, 1)
    return torch.from_numpy(canvas).div_(white)


def _factor(pixels: int) -> int:
    """The n of the n x n pixels that become one, so that a picture's conversion fits into `MEMORY`."""
    return math.ceil(math.sqrt(12 * pixels / (MEMORY - 4 * pixels)))


def _shrunk(values: np.ndarray, factor: int) -> np.ndarray:
    """(h, w, c) values with the mean of each factor x factor of them."""
    if factor == 1:
        return values
    rows = sum(values[start::factor].astype(np.float32) for start in range(factor))
    cells = sum(rows[:, start::factor] for start in range(factor))  # numpy's mean over two axes is slower
    return cells / factor**2


def _as_stored(canvas: np.ndarray, turned: int) -> np.ndarray:
    """A view of an upright (c, H, W) array in which the image lies as its file stores it (EXIF's orientations)."""
    views = {
        2: lambda a: a[:, :, ::-1],
        3: lambda a: a[:, ::-1, ::-1],
        4: lambda a: a[:, ::-1],
        5: lambda a: a.transpose(0, 2, 1),
        6: lambda a: np.rot90(a, 1, (1, 2)),
        7: lambda a: a.transpose(0, 2, 1)[:, ::-1, ::-1],
        8: lambda a: np.rot90(a, -1, (1, 2)),
    }
    return views[turned](canvas) if turned in views else canvas


def _deep_grey(band: Image.Image, white: int, name: str | Path) -> np.ndarray:
    """A 16-bit or float grey image's values, which must lie within 0..white."""
    grey = np.asarray(band).astype(np.float32)
    if not (np.isfinite(grey).all() and 0 <= grey.min() and grey.max() <= white):
        raise ImageError(name, f"its {band.mode} grey values are not all within 0..{white}")
    return grey[..., None]


def _rgb_converter(image: Image.Image, name: str | Path) -> Convert:
    """Converts bands of an 8-bit image to RGB in sRGB, transparency composited on white."""
    transparent, profile = has_alpha(image), image.info.get("icc_profile")
    mode = image.mode if image.mode in ("CMYK", "L") and not transparent else "RGB"
    to_srgb = _lab_to_srgb() if image.mode == "LAB" else _profile_to_srgb(profile, mode, name) if profile else None

    def convert(band: Image.Image) -> np.ndarray:
        if transparent:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        if band.mode not in ("LAB", mode):
            band = band.convert(mode)
        return np.asarray((to_srgb(band) if to_srgb else band).convert("RGB"))

    return convert


def _profile_to_srgb(profile: bytes, mode: str, name: str | Path) -> Callable[[Image.Image], Image.Image] | None:
    """From an RGB or CMYK colour profile to sRGB; None for sRGB itself and for profiles of other kinds."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != mode or "sRGB" in (source.profile.profile_description or ""):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("%s: its colour profile cannot be used (%s); the plain conversion is taken.", name, error)
        return None
    return lambda band: ImageCms.applyTransform(band, transform)


def _lab_to_srgb() -> Callable[[Image.Image], Image.Image]:
    from PIL import ImageCms

    spaces = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    transform = ImageCms.buildTransform(*spaces, "LAB", "RGB")
    return lambda band: ImageCms.applyTransform(band, transform)
