"""Random crops and resizes of what a reward sees, so that a pattern which fools it at one place and size pays less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .preprocess import resize


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Ranges of the draws; 1 leaves that one out."""

    smallest_crop: float = 0.8
    """Side of the smallest crop over the picture's, in 0..1."""
    smallest_resize: float = 0.5
    """The crop is made this much smaller at most before it gets the picture's size again, in 0..1."""

    def __post_init__(self):
        for name in ("smallest_crop", "smallest_resize"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0 and at most 1.")


def augmented(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) images, each cropped and resized as drawn for it, at their old size; differentiable.

    generator: on the CPU; four numbers an image are drawn from it.
    """
    draws = torch.rand(len(images), 4, generator=generator, dtype=torch.float64).tolist()
    return torch.cat([_one(image[None], augmentation, *row) for image, row in zip(images, draws, strict=True)])


def _one(image: Tensor, augmentation: Augmentation, crop: float, down: float, across: float, smaller: float) -> Tensor:
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
