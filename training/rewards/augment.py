"""Random crops and resizes of images before they are scored, so that a pattern which fools a reward at one place and
size scores less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .preprocess import resize


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Ranges of the random crop and resize; 1 turns one of them off."""

    smallest_crop: float = 0.8
    """Side of the smallest crop as a share of the picture's, in 0..1."""
    smallest_resize: float = 0.5
    """Lowest factor by which the crop is resized before it is resized to the picture's size, in 0..1."""

    def __post_init__(self):
        for name in ("smallest_crop", "smallest_resize"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0 and at most 1.")


def draw_augmentation(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) numbers in 0..1 for `augmented`, a row for each image; generator: on the CPU."""
    return torch.rand(count, 4, generator=generator, dtype=torch.float64)


def augmented(images: Tensor, augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Crops and resizes each image at random and returns it at its former size; differentiable.

    Args:
        images: (B, 3, H, W).
        augmentation: ranges of the draws.
        draws: (B, 4) of `draw_augmentation`.
    """
    rows = zip(images, draws.tolist(), strict=True)
    return torch.cat([_crop_resize(image[None], augmentation, *row) for image, row in rows])


def _crop_resize(
    image: Tensor, augmentation: Augmentation, crop: float, down: float, across: float, smaller: float
) -> Tensor:
    """Augments (1, 3, H, W) by four numbers in 0..1: size of the crop, its place down and across, and the resize."""
    height, width = image.shape[-2:]
    share = 1 - crop * (1 - augmentation.smallest_crop)
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
    image = image[..., top : top + rows, left : left + columns]
    factor = 1 - smaller * (1 - augmentation.smallest_resize)
    small = (max(1, round(rows * factor)), max(1, round(columns * factor)))
    for size in (small, (height, width)):
        image = image if image.shape[-2:] == size else resize(image, size)
    return image
