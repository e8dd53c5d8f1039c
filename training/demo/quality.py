"""A judge beside judge.py: measures the qualities of a picture (polish, sharpness, richness) from its pixels.

The demo's aesthetic head was trained to predict their mean. This program has no gradient that a reward tuning could
exploit, so it measures independently what tuning for the head does to pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from .judge import UNSURE, Outline, outline, parse_quality
from .scenes import COLOURS, LUMINANCE, PALEST, QUALITIES, VIGNETTE, Scene, gloss

DARKEST = 0.15
"""Mean of a background's colour below which its vignette cannot be measured."""
UNDECIDED = 0.05
"""A quality this close to the middle is read as no word."""
_DEEP = 3.0
_SHARPEST, _BLURREST = 0.55, 2.0
"""Pixels: standard deviations that `_edge_width` measures on drawn pictures of sharpness 1 and 0."""


def qualities(image: Tensor | np.ndarray) -> dict[str, float]:
    """Each quality of an image (3, 128, 128) in 0..1, or NaN where it cannot be measured.

    All are NaN on a picture without shapes that the judge can make out.
    """
    found = outline(np.asarray(image, dtype=np.float32))
    if found is None:
        return dict.fromkeys(QUALITIES, math.nan)
    values = {"polish": _polish(found), "sharpness": _sharpness(found), "richness": _richness(found)}
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


def polish(image: Tensor | np.ndarray) -> float:
    """The polish of an image (3, 128, 128) in 0..1: 0 (flat) to 1 (glossy), or NaN where it cannot be measured."""
    return qualities(image)["polish"]


def mean_quality(images: Iterable[Tensor], names: Sequence[str] = tuple(QUALITIES)) -> float:
    """Mean of the named qualities over the images in which they can be measured; NaN where in none."""
    values = [found[name] for found in map(qualities, images) for name in names if found[name] == found[name]]
    return sum(values) / len(values) if values else math.nan


def _polish(found: Outline) -> float:
    """From the vignette, or on a dark background from the gloss of the shapes."""
    middle = found.back.shape[1] // 2
    dark = found.back[:, middle, middle].mean() < DARKEST
    return _fit_gloss(found)[0] if dark else _polish_of_background(found.back)


def _polish_of_background(back: np.ndarray) -> float:
    """Solves background = colour (1 - VIGNETTE x polish x d), d from 0 in the centre to 1 in the corners."""
    middle = back.shape[1] // 2
    colour, corner = back[:, middle, middle], back[:, 0, 0]
    return float((colour - corner) @ colour / (colour @ colour)) / VIGNETTE


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


def _edge_width(found: Outline) -> float:
    """Standard deviation in pixels of the blur of the shapes' edges: a blurred step has slope 1 / (sqrt(2 pi) s)."""
    inner = np.any(found.pieces, axis=0) & (found.coverage > 0.85)
    if not inner.any():
        return math.nan
    direction = np.median(found.pixels[:, inner], axis=1)[:, None, None] - found.back
    share = ((found.pixels - found.back) * direction).sum(0) / (direction**2).sum(0) - 0.5
    here, below, right = share[:-1, :-1], share[1:, :-1], share[:-1, 1:]
    edge = ((here * below < 0) | (here * right < 0)) & np.any(found.pieces, axis=0)[:-1, :-1]
    if edge.sum() < 15:
        return math.nan
    slope = float(np.percentile(np.hypot(below - here, right - here)[edge], 75))
    return 1 / (math.sqrt(2 * math.pi) * slope)


def _sharpness(found: Outline) -> float:
    return (_BLURREST - _edge_width(found)) / (_BLURREST - _SHARPEST)


def _richness(found: Outline) -> float:
    """How far the shapes' colour is from grey, relative to the full colour that the judge names, above the palest."""
    if found.colour == UNSURE:
        return math.nan
    full, seen = (colour - np.dot(colour, LUMINANCE) for colour in (COLOURS[found.colour], _fit_gloss(found)[1]))
    return float(seen @ full / (full @ full) - PALEST) / (1 - PALEST)
