"""Reads a drawn scene's attributes back from pixels with classical image processing; no network.

The background is the median colour, corrected for a vignette and light from above; what differs from it is labelled
into shapes; each shape is compared with drawn templates. Weak evidence reads "unsure", which never counts as correct.
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
    POSITIONS,
    QUALITIES,
    SIZES,
    Scene,
    centre_distance,
    edge_shares,
)
from .shapes import NAMED_SHAPES, SHAPES, SIDE, shape_mask

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
    """The attributes read from an image; each may be "unsure". `shape` is "figure" for the unnamed shapes."""

    shape: str = UNSURE
    colour: str = UNSURE
    size: str = UNSURE
    count: int | str = UNSURE
    position: str = UNSURE
    background: str = UNSURE


@dataclass(frozen=True)
class Background:
    """A fitted background.

    Attributes:
        pixels: (3, H, W).
        rough: Whether the picture has no such background; the colours mean nothing then.
        centre: (3,) its colour in the centre.
        vignette: (3,) by how much the corners differ from it.
        top, bottom: (3,) by how much the upper and the lower edge do.
    """

    pixels: np.ndarray
    rough: bool
    centre: np.ndarray
    vignette: np.ndarray
    top: np.ndarray
    bottom: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The shapes that the judge makes out in an image, and what lies behind them."""

    pixels: np.ndarray
    """(3, H, W)."""
    back: Background
    coverage: np.ndarray
    """(H, W): the share of each pixel that is not background."""
    pieces: list[np.ndarray]
    """One mask (H, W) per shape."""
    shape: str
    """The name that all pieces agree on, also of unnamed shapes; or "unsure"."""
    colour: str


def pixels_of(image: Tensor | np.ndarray) -> np.ndarray:
    """An image as an array (3, 128, 128); ValueError for another size."""
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.shape != (3, SIDE, SIDE):
        raise ValueError(f"image has shape {pixels.shape}; expected (3, {SIDE}, {SIDE}). Resize it first.")
    return pixels


def outline(pixels: np.ndarray, back: Background | None = None) -> Outline | None:
    """The shapes of an image (3, 128, 128) in 0..1; None on a rough background and where there are none.

    back: Its background, where `fit_background` was called already.
    """
    back = fit_background(pixels) if back is None else back
    if back.rough:
        return None
    coverage = _coverage(pixels, back.pixels)
    pieces, shape = _shapes(coverage)
    if not pieces:
        return None
    colour = _agreed(_colour_name(pixels, coverage * piece) for piece in pieces)
    return Outline(pixels=pixels, back=back, coverage=coverage, pieces=pieces, shape=shape, colour=colour)


def read(image: Tensor | np.ndarray) -> Reading:
    """Reads one image (3, 128, 128) in 0..1."""
    pixels = pixels_of(image)
    back = fit_background(pixels)
    background = UNSURE if back.rough else _background_name(back)
    found = outline(pixels, back)
    if found is None:
        return Reading(background=background)
    masks = [(found.coverage * piece, piece) for piece in found.pieces]
    return Reading(
        shape=found.shape if found.shape in (*NAMED_SHAPES, UNSURE) else FIGURE,
        colour=found.colour,
        size=_size_name([_radius(mask, piece, found.shape) for mask, piece in masks]),
        count=len(masks) if len(masks) in COUNTS else UNSURE,
        position=_position_name(found.pieces),
        background=background,
    )


def drawn_shape(image: Tensor | np.ndarray) -> str:
    """The name of an image's shape, also of those that captions never name; "unsure" where none fits."""
    found = outline(pixels_of(image))
    return UNSURE if found is None else found.shape


def _shapes(coverage: np.ndarray) -> tuple[list[np.ndarray], str]:
    """The pieces and the shape they agree on.

    Pieces are separated by their cores; shapes with shafts too thin to have a core, as they are.
    """
    pieces = _pieces(coverage, peeled=True)
    shape = _shape_name([coverage * piece for piece in pieces])
    if shape == UNSURE:
        whole = _pieces(coverage, peeled=False)
        whole_shape = _shape_name([coverage * piece for piece in whole])
        if whole_shape != UNSURE:
            return whole, whole_shape
    return pieces, shape


def _agreed(names: Iterable[str]) -> str:
    names = set(names)
    return names.pop() if len(names) == 1 else UNSURE


def fit_background(pixels: np.ndarray) -> Background:
    """Fits centre + vignette r^2 + top a + bottom b near the median, by least squares; a and b as in `edge_shares`."""
    terms = (np.ones((SIDE, SIDE)), centre_distance(), *edge_shares())
    basis = np.stack(terms, -1).reshape(-1, len(terms))
    flat = pixels.reshape(3, -1)
    fit = np.median(flat, axis=1, keepdims=True) + np.zeros_like(flat)
    rates = np.stack([fit[:, 0], *np.zeros((3, 3))])
    for tolerance in (0.25, 0.12, 0.1):
        near = np.abs(flat - fit).max(0) < tolerance
        if near.mean() < 0.5:
            return Background(fit.reshape(pixels.shape), True, *rates)
        rates = np.linalg.lstsq(basis[near], flat[:, near].T, rcond=None)[0]
        fit = (basis @ rates).T
    near = np.abs(flat - fit).max(0) < 0.12
    rough = bool(near.mean() < 0.6 or np.abs(flat - fit)[:, near].mean() > 0.045)
    return Background(fit.reshape(pixels.shape), rough, *rates)


def _background_name(back: Background) -> str:
    colour = back.centre.clip(0, 1)
    distances = {name: float(np.abs(colour - rgb).max()) for name, rgb in BACKGROUNDS.items()}
    best, second = sorted(distances, key=distances.get)[:2]
    clear = distances[best] < 0.2 and distances[second] - distances[best] > 0.1
    return best if clear else UNSURE


def _coverage(pixels: np.ndarray, back: np.ndarray) -> np.ndarray:
    """The share of each pixel that is not background, 0..1: its difference over that of a typical shape pixel."""
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
    """One mask (H, W) per shape, slightly grown; none where there are too many specks.

    peeled: separate shapes by their cores (coverage above `_CORE`, `_PEEL` pixels from its edge), so that a blurred
    bridge between two does not join them.
    """
    from scipy import ndimage

    solid = coverage > 0.5
    cores = ndimage.distance_transform_edt(coverage > _CORE) > _PEEL if peeled else solid
    labels, count = ndimage.label(cores, np.ones((3, 3)) if peeled else None)
    _, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    labels = np.where(solid, labels[tuple(nearest)], 0)
    areas = ndimage.sum_labels(np.ones_like(coverage), labels, range(1, count + 1)) if count else []
    large = [label + 1 for label, area in enumerate(areas) if area >= _MIN_AREA]
    if not large or count - len(large) > 6:
        return []
    cores = np.where(np.isin(labels, large), labels, 0)
    apart, nearest = ndimage.distance_transform_edt(cores == 0, return_indices=True)
    owner = np.where(apart < 2.5, cores[tuple(nearest)], 0)
    return [owner == label for label in large]


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


def _shape_scores(mask: np.ndarray) -> np.ndarray:
    """(len(SHAPES),) best overlap (intersection over union, 0..1) with the templates of each shape."""
    if (mask > 0.4).sum() < _MIN_AREA:
        return np.zeros(len(SHAPES))
    patch = _patch(mask)
    templates, names = _templates()
    overlap = np.minimum(templates, patch).sum((1, 2)) / np.maximum(templates, patch).sum((1, 2))
    return np.array([max(o for o, name in zip(overlap, names, strict=True) if name == shape) for shape in SHAPES])


def _shape_name(masks: list[np.ndarray]) -> str:
    """The shape with the best mean score over all pieces; unsure when it is close or when a piece has another one."""
    if not masks:
        return UNSURE
    scores = np.stack([_shape_scores(mask) for mask in masks])
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
    """Half extent in pixels: of the bounding box's larger side, averaged for a known shape with that of the area.

    Blur rounds off the tips of a cross or fills the hole of a ring, which changes one of the two. `piece` is grown by
    two pixels on every side.
    """
    rows, columns = np.nonzero(piece)
    radius = (max(np.ptp(rows), np.ptp(columns)) + 1 - 4) / 2
    return radius if shape == UNSURE else (radius + float(np.sqrt(mask.sum() / _unit_area(shape)))) / 2


def _size_name(radii: list[float]) -> str:
    """The size by the mean radius; unsure halfway between the sizes and for pieces of different radii."""
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
    """The attributes that a caption names; the others are absent. Unknown words are ignored."""
    words = re.findall(r"[a-z]+", text.lower())
    attributes: dict[str, str | int] = {}
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if following == "background" and word in BACKGROUNDS:
            attributes["background"] = word
        elif word in COLOURS:
            attributes.setdefault("colour", word)
        elif word in SIZES:
            attributes["size"] = word
        elif word in POSITIONS:
            attributes["position"] = word
        elif word == "center":
            attributes["position"] = "centre"
        elif word in COUNTS.values():
            attributes["count"] = next(number for number, name in COUNTS.items() if name == word)
        else:
            singular = "cross" if word in ("cross", "crosses") else word.removesuffix("s")
            if singular in NAMED_SHAPES or singular == FIGURE:
                attributes["shape"] = singular
    return attributes


def parse_quality(text: str) -> tuple[str, ...]:
    """The quality words that a caption has; of two for the same quality, none counts."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return tuple(word for low, high in QUALITIES.values() for word in {low, high} & words if not {low, high} <= words)


def _attributes_of(scene: Scene | dict | str) -> dict[str, str | int]:
    if isinstance(scene, str):
        return parse_caption(scene)
    if isinstance(scene, dict):
        return scene
    attributes = {name: getattr(scene, name) for name in ATTRIBUTES}
    return attributes | {"shape": scene.shape if scene.shape in NAMED_SHAPES else FIGURE}


def correct(reading: Reading, scene: Scene | dict | str) -> dict[str, bool]:
    """For each attribute of a scene, a parsed caption or a caption: whether the reading agrees ("unsure" does not)."""
    return {name: getattr(reading, name) == value for name, value in _attributes_of(scene).items()}


def alignment(images: Iterable[Tensor], captions: Iterable[Scene | dict | str]) -> dict[str, float]:
    """The share of images on which the judge reads every attribute of their caption ("alignment").

    Returns:
        "alignment", where an image whose caption names no attribute counts as correct; and for each attribute the share
        among captions that name it.
    """
    checks = [correct(read(image), caption) for image, caption in zip(images, captions, strict=True)]
    if not checks:
        raise ValueError("images is empty; expected at least one image and caption.")
    figures = {ALIGNMENT: float(np.mean([all(check.values()) for check in checks]))}
    for name in ATTRIBUTES:
        values = [check[name] for check in checks if name in check]
        if values:
            figures[name] = float(np.mean(values))
    return figures


def judge_samples(images: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """{"alignment"} over the sample pictures of the demo's size whose prompt names an attribute; empty without any."""
    readable = [
        (i, p) for i, p in zip(images, prompts, strict=True) if i.shape[1:] == (SIDE, SIDE) and parse_caption(p)
    ]
    return {ALIGNMENT: alignment(*zip(*readable, strict=True))[ALIGNMENT]} if readable else {}
