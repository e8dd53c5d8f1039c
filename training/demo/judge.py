"""Reads a drawn scene's attributes back from pixels with classical image processing; no network.

The background is the median colour, corrected for a vignette; what differs from it is labelled into shapes; each shape
is compared with drawn templates. Weak evidence gives "unsure", which never counts as right.
"""

from __future__ import annotations

import colorsys
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from .scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    NAMED_SHAPES,
    POSITIONS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    shape_mask,
)

UNSURE = "unsure"
FIGURE = "figure"
ALIGNMENT = "alignment"
_GRID = 24
_MIN_AREA = 40
"""Pixels; the smallest drawn shape covers about 100."""
_PEEL, _CORE = 1.0, 0.6
_BLURS = (0.0, 1.4, 2.4)
"""Pixels: templates are drawn sharp and blurred, since an autoencoder rounds corners."""
_HUES = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items()}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an image shows; every field may be "unsure". `shape` is "figure" for the unnamed shapes."""

    shape: str = UNSURE
    colour: str = UNSURE
    size: str = UNSURE
    count: int | str = UNSURE
    position: str = UNSURE
    background: str = UNSURE


def read(image: Tensor | np.ndarray) -> Reading:
    """Reads one image (3, 128, 128) in 0..1."""
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.shape != (3, SIDE, SIDE):
        raise ValueError(f"image has shape {pixels.shape}; expected (3, {SIDE}, {SIDE}). Resize it first.")
    back, rough = fit_background(pixels)
    background = UNSURE if rough else _background_name(pixels, back)
    coverage = _coverage(pixels, back)
    pieces, shape = _shapes(coverage)
    if rough or not pieces:
        return Reading(background=background)
    return Reading(
        shape=shape if shape in (*NAMED_SHAPES, UNSURE) else FIGURE,
        colour=_agreed(_colour_name(pixels, coverage * piece) for piece in pieces),
        size=_size_name([_radius(coverage * piece, piece, shape) for piece in pieces]),
        count=len(pieces) if len(pieces) in COUNTS else UNSURE,
        position=_position_name(pieces),
        background=background,
    )


def drawn_shape(image: Tensor | np.ndarray) -> str:
    """The name of an image's shape, also of those that captions never name; "unsure" where none fits."""
    pixels = np.asarray(image, dtype=np.float32)
    back, rough = fit_background(pixels)
    return UNSURE if rough else _shapes(_coverage(pixels, back))[1]


def _shapes(coverage: np.ndarray) -> tuple[list[np.ndarray], str]:
    """The pieces and the shape they agree on: told apart by their cores or, thin shafts having none, as they are."""
    pieces = _pieces(coverage, peeled=True)
    shape = _shape_name([coverage * piece for piece in pieces])
    if shape == UNSURE:
        whole = _pieces(coverage, peeled=False)
        named = _shape_name([coverage * piece for piece in whole])
        if named != UNSURE:
            return whole, named
    return pieces, shape


def _agreed(names: Iterable[str]) -> str:
    names = set(names)
    return names.pop() if len(names) == 1 else UNSURE


def fit_background(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """The background (3, H, W) as colour * (1 + a r^2), fitted near the median; and whether it is rough."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    distance = ((columns - SIDE / 2) ** 2 + (rows - SIDE / 2) ** 2) / (2 * (SIDE / 2) ** 2)
    basis = np.stack([np.ones_like(distance), distance], -1).reshape(-1, 2)
    flat = pixels.reshape(3, -1)
    fit = np.median(flat, axis=1, keepdims=True) + np.zeros_like(flat)
    for tolerance in (0.25, 0.12, 0.1):
        near = np.abs(flat - fit).max(0) < tolerance
        if near.mean() < 0.5:
            return fit.reshape(pixels.shape), True
        fit = (basis @ np.linalg.lstsq(basis[near], flat[:, near].T, rcond=None)[0]).T
    near = np.abs(flat - fit).max(0) < 0.12
    return fit.reshape(pixels.shape), bool(near.mean() < 0.6 or np.abs(flat - fit)[:, near].mean() > 0.045)


def _background_name(pixels: np.ndarray, back: np.ndarray) -> str:
    colour = back[:, SIDE // 2, SIDE // 2].clip(0, 1)
    distances = {name: float(np.abs(colour - rgb).max()) for name, rgb in BACKGROUNDS.items()}
    best, second = sorted(distances, key=distances.get)[:2]
    clear = distances[best] < 0.2 and distances[second] - distances[best] > 0.1
    return best if clear else UNSURE


def _coverage(pixels: np.ndarray, back: np.ndarray) -> np.ndarray:
    """How much of a pixel is not background, 0..1, from its difference relative to the typical shape pixel's."""
    from scipy import ndimage

    difference = np.abs(pixels - back).max(0)
    strong = difference[difference > 0.16]
    if strong.size < _MIN_AREA:
        return np.zeros_like(difference)
    coverage = np.clip(difference / np.median(strong), 0, 1)
    holes = ndimage.binary_fill_holes(coverage > 0.5) & (coverage <= 0.5)
    labels, count = ndimage.label(holes)
    for label in range(1, count + 1):
        if (labels == label).sum() < 10:
            coverage[labels == label] = 1.0
    return coverage


def _pieces(coverage: np.ndarray, peeled: bool) -> list[np.ndarray]:
    """One mask (H, W) per shape, slightly grown; nothing where there are too many specks.

    peeled: shapes are told apart by their cores (coverage above `_CORE`, peeled), so a blurred bridge joins nothing.
    """
    from scipy import ndimage

    solid = coverage > 0.5
    cores = ndimage.distance_transform_edt(coverage > _CORE) > _PEEL if peeled else solid
    labels, count = ndimage.label(cores, np.ones((3, 3)) if peeled else None)
    _, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    labels = np.where(solid, labels[tuple(nearest)], 0)
    areas = ndimage.sum_labels(np.ones_like(coverage), labels, range(1, count + 1)) if count else []
    kept = [label + 1 for label, area in enumerate(areas) if area >= _MIN_AREA]
    if not kept or count - len(kept) > 6:
        return []
    cores = np.where(np.isin(labels, kept), labels, 0)
    apart, nearest = ndimage.distance_transform_edt(cores == 0, return_indices=True)
    owner = np.where(apart < 2.5, cores[tuple(nearest)], 0)
    return [owner == label for label in kept]


def _patch(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box resampled to a 24 x 24 grid."""
    from scipy import ndimage

    rows, columns = np.nonzero(mask > 0.4)
    places = [np.linspace(axis.min() - 0.5, axis.max() + 0.5, _GRID) for axis in (rows, columns)]
    return ndimage.map_coordinates(mask, np.meshgrid(*places, indexing="ij"), order=1, mode="constant")


@cache
def _templates() -> tuple[np.ndarray, list[str]]:
    from scipy import ndimage

    patches, names = [], []
    for shape in SHAPES:
        for radius in SIZES.values():
            for turn, blur in itertools.product(np.linspace(-0.14, 0.14, 5), _BLURS):
                mask = ndimage.gaussian_filter(shape_mask(shape, radius, 64.0, 64.0, float(turn)), blur)
                patches.append(_patch(mask))
                names.append(shape)
    return np.stack(patches), names


def _likeness(mask: np.ndarray) -> np.ndarray:
    """(len(SHAPES),) best overlap (intersection over union, 0..1) with the templates of each shape."""
    if (mask > 0.4).sum() < _MIN_AREA:
        return np.zeros(len(SHAPES))
    patch = _patch(mask)
    templates, names = _templates()
    overlap = np.minimum(templates, patch).sum((1, 2)) / np.maximum(templates, patch).sum((1, 2))
    return np.array([max(o for o, name in zip(overlap, names, strict=True) if name == shape) for shape in SHAPES])


def _shape_name(masks: list[np.ndarray]) -> str:
    """The shape that all pieces look like on average; unsure when it is not clear, or clearly not one of them."""
    if not masks:
        return UNSURE
    scores = np.stack([_likeness(mask) for mask in masks])
    mean = scores.mean(0)
    second, best = np.argsort(mean)[-2:]
    clear = mean[best] >= 0.72 and mean[best] - mean[second] >= 0.015
    another = (scores.max(1) - scores[:, best]).max() > 0.06
    return SHAPES[best] if clear and not another else UNSURE


def _colour_name(pixels: np.ndarray, mask: np.ndarray) -> str:
    inner = mask > 0.85
    if inner.sum() < 15:
        inner = mask > 0.6
    if inner.sum() < 15:
        return UNSURE
    hue, saturation, value = colorsys.rgb_to_hsv(*np.median(pixels[:, inner], axis=1).clip(0, 1).tolist())
    apart = {name: abs((hue - other + 0.5) % 1 - 0.5) for name, other in _HUES.items()}
    best, second = sorted(apart, key=apart.get)[:2]
    clear = saturation > 0.3 and value > 0.25 and apart[best] < 0.09 and apart[second] - apart[best] > 0.008
    return best if clear else UNSURE


@cache
def _unit_area(shape: str) -> float:
    return float(shape_mask(shape, 16.0, 64.0, 64.0).sum()) / 16.0**2


def _radius(mask: np.ndarray, piece: np.ndarray, shape: str) -> float:
    """Half extent in pixels, by the larger side of the bounding box and, for a known shape, as much by the area.

    Blur wears off the tips of a cross or fills the hole of a ring, which changes one measure or the other. `piece` is
    grown by two pixels all around.
    """
    rows, columns = np.nonzero(piece)
    radius = (max(np.ptp(rows), np.ptp(columns)) + 1 - 4) / 2
    return radius if shape == UNSURE else (radius + float(np.sqrt(mask.sum() / _unit_area(shape)))) / 2


def _size_name(radii: list[float]) -> str:
    """By the mean radius; unsure between the sizes, and of pieces unlike each other."""
    mean, middle = float(np.mean(radii)), sum(SIZES.values()) / 2
    if np.ptp(radii) > 4 or abs(mean - middle) < 0.3 or mean > 23:
        return UNSURE
    return min(SIZES, key=SIZES.get) if mean < middle else max(SIZES, key=SIZES.get)


def _position_name(pieces: list[np.ndarray]) -> str:
    boxes = [np.nonzero(piece) for piece in pieces]
    down, across = (np.mean([(b[axis].min() + b[axis].max()) / 2 for b in boxes]) + 0.5 - SIDE / 2 for axis in (0, 1))
    offset = max(abs(down), abs(across))
    if offset < 15:
        return "centre"
    if offset < 22 or abs(abs(down) - abs(across)) < 5:
        return UNSURE
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def parse_caption(text: str) -> dict[str, str | int]:
    """The attributes that a caption names; the rest are absent. Words the judge does not know are ignored."""
    words = re.findall(r"[a-z]+", text.lower())
    named: dict[str, str | int] = {}
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if following == "background" and word in BACKGROUNDS:
            named["background"] = word
        elif word in COLOURS:
            named.setdefault("colour", word)
        elif word in SIZES:
            named["size"] = word
        elif word in POSITIONS:
            named["position"] = word
        elif word == "center":
            named["position"] = "centre"
        elif word in COUNTS.values():
            named["count"] = next(number for number, name in COUNTS.items() if name == word)
        else:
            singular = "cross" if word in ("cross", "crosses") else word.removesuffix("s")
            if singular in NAMED_SHAPES or singular == FIGURE:
                named["shape"] = singular
    return named


def _wanted(scene: Scene | dict | str) -> dict[str, str | int]:
    if isinstance(scene, str):
        return parse_caption(scene)
    if isinstance(scene, dict):
        return scene
    named = {name: getattr(scene, name) for name in ATTRIBUTES}
    return named | {"shape": scene.shape if scene.shape in NAMED_SHAPES else FIGURE}


def correct(reading: Reading, wanted: Scene | dict | str) -> dict[str, bool]:
    """For each attribute of a scene, a parsed caption or a caption: whether the reading agrees ("unsure" does not)."""
    return {name: getattr(reading, name) == value for name, value in _wanted(wanted).items()}


def alignment(images: Iterable[Tensor], captions: Iterable[Scene | dict | str]) -> dict[str, float]:
    """The share of images with every named attribute right ("alignment"), and the share per attribute.

    An image whose caption names no attribute counts as right; per attribute, only captions that name it count.
    """
    checks = [correct(read(image), caption) for image, caption in zip(images, captions, strict=True)]
    if not checks:
        raise ValueError("images is empty; expected at least one image and caption.")
    figures = {ALIGNMENT: float(np.mean([all(check.values()) for check in checks]))}
    for name in ATTRIBUTES:
        named = [check[name] for check in checks if name in check]
        if named:
            figures[name] = float(np.mean(named))
    return figures


def judge_samples(images: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """Alignment of sample pictures, of those alone that can be read: of the demo's size, their prompt naming something.

    Empty without any.
    """
    readable = [
        (i, p) for i, p in zip(images, prompts, strict=True) if i.shape[1:] == (SIDE, SIDE) and parse_caption(p)
    ]
    return {ALIGNMENT: alignment(*zip(*readable, strict=True))[ALIGNMENT]} if readable else {}
