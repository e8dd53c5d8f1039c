"""Whether shapes are lit from below: the style that a LoRA can teach the demo model, told from pixels alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .judge import shapes_of

LIT_FROM_BELOW = 0.01
"""Least slope that counts. Every picture that the demo model was trained on has one below 0, drawn or decoded."""
_SMALLEST = 30
"""Pixels of a shape's inside that a slope is measured on."""


def light_slope(image: Tensor | np.ndarray) -> float:
    """How much brighter (0..1) shapes grow over one radius to the lower right, mean over an image's shapes; 0 for none.

    image: (3, 128, 128) in 0..1. Below 0 the light comes from the upper left.
    """
    pixels = np.asarray(image, dtype=np.float32)
    slopes = [_slope(pixels.mean(0), inside) for inside in shapes_of(pixels) if inside.sum() >= _SMALLEST]
    return float(np.mean(slopes)) if slopes else 0.0


def lit_from_below(images: Sequence[Tensor]) -> float:
    """Share of images whose shapes are lit from below."""
    return sum(light_slope(image) > LIT_FROM_BELOW for image in images) / len(images)


def _slope(brightness: np.ndarray, inside: np.ndarray) -> float:
    rows, columns = np.nonzero(inside)
    radius = np.sqrt(inside.sum() / np.pi)
    along = (rows - rows.mean() + columns - columns.mean()) / radius
    return float(np.polyfit(along, brightness[inside], 1)[0])
