"""Image files in and out: every common mode becomes float (3, H, W) sRGB in 0..1."""

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

from ..common.files import atomic_path
from ..config.folder import CROPS

log = logging.getLogger(__name__)

EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A file that cannot be used as an image. `path` names it, `reason` says why."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}. Replace or remove this file.")
        self.path = path
        self.reason = reason


def content_key(data: bytes) -> str:
    """32 hex digits (128 bits) of sha256: equal exactly when the content is."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_unchanged(path: Path, key: str) -> bytes:
    """The bytes of a file. Raises ImageError when it is gone or its `content_key` is no longer `key`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(path, f"it could be read before but not now ({error.strerror})") from error
    if content_key(data) != key:
        raise ImageError(path, "it changed since the data set was loaded; load the data set again")
    return data


def load_image(path: str | Path) -> Tensor:
    """Reads an image file as float32 (3, H, W) in 0..1, turned upright.

    EXIF orientation is applied; transparency is laid on white; grey becomes three equal channels, 16-bit grey is
    divided by 65535; embedded RGB and CMYK colour profiles are converted to sRGB (CMYK without one by Pillow's plain
    formula); of an animation the first frame is taken. Raises ImageError for a missing, broken or truncated file.
    """
    return decode_image(_read(path), path)


def decode_image(data: bytes, name: str | Path) -> Tensor:
    """`load_image` for the bytes of a file; `name` appears in errors."""
    with _readable(data, name) as image:
        return _to_tensor(ImageOps.exif_transpose(image), name)


def has_alpha(data: bytes, name: str | Path) -> bool:
    """Whether a file's bytes are an image with transparency; reads its header only."""
    with _readable(data, name) as image:
        return _has_alpha(image)


def decode_alpha(data: bytes, name: str | Path) -> Tensor:
    """The alpha channel (1, H, W) in 0..1 of a file's bytes, upright; ones for an image without transparency."""
    with _readable(data, name) as image:
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
        return torch.from_numpy(np.array(alpha))[None].float().div_(255)


def check_image(data: bytes, name: str | Path) -> tuple[int, int]:
    """Decodes all of an image to prove that it can be; returns its upright (width, height). Raises ImageError."""
    with _readable(data, name) as image:
        size = _upright_size(image)
        if _is_deep(image):
            _to_tensor(image, name)
        image.draft("RGB", (1, 1))  # a JPEG is then read to its end, but at an eighth of its size
        image.load()
        return size


def image_size(path: str | Path) -> tuple[int, int]:
    """Upright (width, height) of an image file; reads its header only. Raises ImageError."""
    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except UNREADABLE as error:
        raise ImageError(path, _reason(error)) from error


def to_pil(image: Tensor) -> Image.Image:
    """A float (3, H, W) image in 0..1, clipped, as an 8-bit picture."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def save_png(image: Tensor, path: str | Path) -> None:
    """Writes a float (3, H, W) image in 0..1 as an 8-bit PNG; the file appears only when it is complete."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image shape is {tuple(image.shape)}; expected (3, H, W).")
    with atomic_path(path) as temporary:
        to_pil(image).save(temporary, format="PNG")


def contact_sheet(images: Sequence[Tensor], columns: int = 4) -> Tensor:
    """Pictures (3, h, w) of one size side by side in up to `columns` columns, (3, H, W); what is left over is black."""
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
    """Covers width x height with a (3, H, W) image: antialiased bicubic resize at its own aspect ratio, then a crop.

    crop "center" cuts both sides alike, "random" draws the offset from `generator` (required then). `flip` mirrors the
    result left to right. Returns (3, height, width) in 0..1.
    """
    if crop not in CROPS:
        raise ValueError(f"crop is {crop!r}; expected one of {', '.join(CROPS)}.")
    if crop == "random" and generator is None:
        raise ValueError('generator is None; expected a torch.Generator. crop "random" draws from it.')
    image = _cover(image, width, height)
    spare_x, spare_y = image.shape[2] - width, image.shape[1] - height
    left, top = spare_x // 2, spare_y // 2
    if crop == "random":
        left, top = (int(torch.randint(spare + 1, (1,), generator=generator)) for spare in (spare_x, spare_y))
    image = image[:, top : top + height, left : left + width]
    return (image.flip(-1) if flip else image).contiguous()


def flatten_alpha(image: Tensor) -> Tensor:
    """(1, 3 or 4, H, W) channels to three: grey is repeated, transparency laid on white. Channels come first."""
    channels = image.shape[-3]
    if channels == 4:
        color, alpha = image[..., :3, :, :], image[..., 3:, :, :]
        return color * alpha + (1 - alpha)
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:]) if channels == 1 else image


def _cover(image: Tensor, width: int, height: int) -> Tensor:
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
    """Opens an image strictly: other packages set Pillow's global switch that fills truncated images with grey."""
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
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or its start is damaged"
    return f"it cannot be decoded ({getattr(error, 'strerror', None) or str(error) or type(error).__name__})"


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _to_tensor(image: Image.Image, name: str | Path) -> Tensor:
    if _is_deep(image):
        return _deep_grey(image, 1 if image.mode == "F" else 65535, name)
    pixels = torch.from_numpy(np.array(_to_rgb(image, name)))
    return pixels.permute(2, 0, 1).contiguous().float().div_(255)


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits per pixel; Pillow has such modes for grey only (deep colour arrives as 8 bits)."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep_grey(image: Image.Image, white: int, name: str | Path) -> Tensor:
    grey = torch.from_numpy(np.array(image).astype(np.float32))
    if not (grey.isfinite().all() and 0 <= grey.min() and grey.max() <= white):
        raise ImageError(name, f"its {image.mode} grey values are not all within 0..{white}")
    return (grey / white).expand(3, -1, -1).contiguous()


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")


def _to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    if _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        return _lab_to_srgb(image)
    image = image if image.mode in ("RGB", "CMYK", "L") else image.convert("RGB")
    return (_profile_to_srgb(image, profile, name) if profile else image).convert("RGB")


def _profile_to_srgb(image: Image.Image, profile: bytes, name: str | Path) -> Image.Image:
    """The colours an RGB or CMYK profile means, in sRGB. A profile of another kind (grey, say) is left aside."""
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
