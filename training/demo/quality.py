"""A judge beside judge.py: measures the qualities of a picture (polish, light, richness) from its pixels.

The demo's aesthetic head was trained to predict their mean. This program has no gradient that a reward tuning could
exploit, so it measures independently what tuning for the head does to pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from .judge import UNSURE, Background, Outline, outline, parse_quality, pixels_of
from .scenes import COLOURS, LIGHT, LUMINANCE, PALEST, QUALITIES, VIGNETTE, Scene, gloss

DARKEST = 0.15
"""Mean of a background's colour below which its vignette cannot be measured."""
UNDECIDED = 0.05
"""A quality this close to the middle is read as no word."""
_DEEP = 3.0
"""Pixels from the edge, from which on a shape has its colour even where an autoencoder blurs it."""


def qualities(image: Tensor | np.ndarray) -> dict[str, float]:
    """Each quality of an image (3, 128, 128) in 0..1, or NaN where it cannot be measured.

    All are NaN on a picture without shapes that the judge can make out.
    """
    found = outline(pixels_of(image))
    if found is None:
        return dict.fromkeys(QUALITIES, math.nan)
    values = {"polish": _polish(found), "light": _light(found.back), "richness": _richness(found)}
    return {name: min(max(value, 0.0), 1.0) if value == value else value for name, value in values.items()}


def quality_words(image: Tensor | np.ndarray) -> dict[str, str]:
    """For each quality the word for the end that an image is nearer to; "unsure" in the middle and if not measured."""
    words = {}
    for name, value in qualities(image).items():
        low, high = QUALITIES[name]
        clear = abs(value - 0.5) >= UNDECIDED
        words[name] = (high if value > 0.5 else low) if clear else UNSURE
    return words


def quality_shares(images: Iterable[Tensor], captions: Iterable[Scene | str]) -> dict[str, float]:
    """For each quality word the share of images whose caption has it on which it is read; words of no caption lack."""
    read: dict[str, list[bool]] = {}
    for image, caption in zip(images, captions, strict=True):
        named = parse_quality(caption) if isinstance(caption, str) else caption.words
        if named:
            found = quality_words(image).values()
            for word in named:
                read.setdefault(word, []).append(word in found)
    return {word: float(np.mean(values)) for word, values in read.items()}


def mean_quality(images: Iterable[Tensor]) -> float:
    """Mean of all qualities over the images in which they can be measured; NaN where in none."""
    values = [value for found in map(qualities, images) for value in found.values() if value == value]
    return sum(values) / len(values) if values else math.nan


def _polish(found: Outline) -> float:
    """From the vignette, or on a dark background from the gloss of the shapes."""
    if found.back.centre.mean() < DARKEST:
        return _fit_gloss(found)[0]
    return -float(found.back.vignette @ found.back.centre / (found.back.centre @ found.back.centre)) / VIGNETTE


def _light(back: Background) -> float:
    """Solves top = LIGHT x light x (1 - centre) and bottom = -LIGHT x light x centre by least squares."""
    expected = np.concatenate([1 - back.centre, -back.centre])
    return float(np.concatenate([back.top, back.bottom]) @ expected / (expected @ expected)) / LIGHT


def _fit_gloss(found: Outline) -> tuple[float, np.ndarray]:
    """Solves pixels = colour + polish x gloss over the pixels of all shapes that are farthest from their edges.

    Returns:
        The polish by least squares, and the colour (3,) without gloss; NaN where too few pixels are inside.
    """
    inner = [_inside(found, piece) for piece in found.pieces]
    if sum(len(rows) for rows, _ in inner) < 15:
        return math.nan, np.full(3, math.nan)
    pixels = np.concatenate([found.pixels[:, rows, columns] for rows, columns in inner], 1)
    shades = [gloss(*_places(found, *pair), found.shape) for pair in zip(found.pieces, inner, strict=True)]
    shade, light = (np.concatenate(parts) for parts in zip(*shades, strict=True))
    colour, value = np.median(pixels, axis=1), 0.0
    for _ in range(3):
        change = light * (1 - colour[:, None]) - shade * colour[:, None]
        value = float(((pixels - colour[:, None]) * change).sum() / (change**2).sum())
        value = min(max(value, 0.0), 1.0)
        colour = (pixels - value * change).mean(1).clip(0, 1)
    return value, colour


def _inside(found: Outline, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the half of a piece's pixels that is farther from its edge, at most `_DEEP` pixels."""
    from scipy import ndimage

    solid = piece & (found.coverage > 0.5)
    depth = ndimage.distance_transform_edt(solid)
    return np.nonzero(solid & (depth >= min(np.median(depth[solid]), _DEEP))) if solid.any() else np.nonzero(solid)


def _places(found: Outline, piece: np.ndarray, inner: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How far right of and below a piece's centre its inner pixels lie, in units of its half extent."""
    box = np.nonzero(piece & (found.coverage > 0.5))
    radius = (max(map(np.ptp, box)) + 1) / 2
    down, right = ((place - (axis.min() + axis.max()) / 2) / radius for place, axis in zip(inner, box, strict=True))
    return right, down


def _richness(found: Outline) -> float:
    """How far the shapes' colour is from grey, relative to the full colour that the judge names, above the palest."""
    if found.colour == UNSURE:
        return math.nan
    full, seen = (colour - np.dot(colour, LUMINANCE) for colour in (COLOURS[found.colour], _fit_gloss(found)[1]))
    return float(seen @ full / (full @ full) - PALEST) / (1 - PALEST)
