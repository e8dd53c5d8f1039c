"""CLIP's preprocessing of images, differentiable everywhere.

The steps of offline scorers with Pillow, on floats and without rounding: bicubic resize with antialiasing of the
shorter side, centre crop, normalisation. Values outside 0..1, in the picture or as overshoot of the resize, are
clamped, since a saved file holds no others; the gradient passes the clamp unchanged (straight-through, Bengio et al.
2013, arXiv 1308.3432), so that saturated pixels have one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..common.transfer import upload


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalisation of images for an image tower."""

    side: int
    """Of the square that the tower reads, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per channel, subtracted."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per channel, divided by after that."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in 0..1 to (B, 3, side, side), normalised; ValueError for another shape."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W). Drop an alpha channel.")
        images = centre_crop(resize_shorter(clamp_straight_through(images), self.side), self.side)
        mean, std = upload(torch.tensor((self.mean, self.std), dtype=images.dtype), images.device)[..., None, None]
        return (images - mean) / std


def half_range(side: int) -> Preprocess:
    """Preprocessing with mean and standard deviation 0.5, so that 0..1 becomes -1..1."""
    return Preprocess(side, (0.5,) * 3, (0.5,) * 3)


def clamp_straight_through(images: Tensor) -> Tensor:
    """Values limited to 0..1, with the gradient of the identity."""
    return images + (images.detach().clamp(0, 1) - images.detach())


def resize_shorter(images: Tensor, side: int) -> Tensor:
    """Resizes so that the shorter side has `side` pixels; the longer one is rounded down, as torchvision does."""
    height, width = images.shape[-2:]
    if min(height, width) == side:
        return images
    longer = int(side * max(height, width) / min(height, width))
    return resize(images, (side, longer) if height < width else (longer, side))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing to (height, width), as Pillow resizes."""
    return clamp_straight_through(
        functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    )


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The middle square; odd margins are rounded to even, as torchvision rounds them."""
    top, left = (int(round((length - side) / 2)) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


_CHECKS_LATER = ContextVar("checks_later", default=False)


@contextmanager
def checked_later() -> Iterator[None]:
    """While entered, `expect_finite` reads nothing from the scores' device: the caller checks them on the host."""
    token = _CHECKS_LATER.set(True)
    try:
        yield
    finally:
        _CHECKS_LATER.reset(token)


def expect_finite(name: str, scores: Tensor) -> Tensor:
    """Returns the scores; raises ValueError where one is NaN or infinite, unless they are `checked_later`."""
    if _CHECKS_LATER.get():
        return scores
    wrong = (~torch.isfinite(scores.detach())).sum().item()
    if wrong:
        raise ValueError(
            f"{name} gives NaN or infinity for {wrong} of {len(scores)} images; expected numbers. Look at the images: "
            "a decoder in fp16 may overflow, or training has diverged (lower the learning rate)."
        )
    return scores
