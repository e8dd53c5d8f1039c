"""Drawn scenes with captions: a few equal shapes of one colour and size, somewhere on a plain background.

The demo model is trained on them alone. A tenth of all attribute combinations is held out: drawn for measuring, never
in training. Three shapes are drawn but never named: their captions have "figure" instead, which leaves something for
textual inversion to learn. Most captions do not name the `polish` (gloss, shading, vignette): rewards can raise it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from ..common.rng import generator as new_generator

SIDE = 128
NAMED_SHAPES = ("circle", "square", "triangle", "cross", "ring")
UNNAMED_SHAPES = ("heart", "crescent", "arrow")
SHAPES = NAMED_SHAPES + UNNAMED_SHAPES
COLOURS = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.13, 0.66, 0.22),
    "blue": (0.15, 0.33, 0.88),
    "yellow": (0.96, 0.84, 0.13),
    "purple": (0.58, 0.18, 0.76),
    "orange": (0.97, 0.50, 0.08),
}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "black": (0.06, 0.06, 0.07),
    "grey": (0.52, 0.52, 0.53),
    "blue": COLOURS["blue"],
    "green": COLOURS["green"],
}
SIZES = {"small": 13.5, "large": 17.5}
"""Half extent of one shape in pixels."""
GAP = 8
"""Pixels between neighbours, a latent cell: the autoencoder would join closer ones."""
COUNTS = {1: "one", 2: "two", 3: "three"}
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
STYLES = ("glossy", "flat")
ATTRIBUTES = ("shape", "colour", "size", "count", "position", "background")
VIGNETTE = 0.4
"""How much darker the corners of a fully polished picture are."""
STYLED_SHARE = 0.22
LOOKS = ("plain", "warm edges")
WARM = (1.0, 0.55, 0.15)
_SUPERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one picture; `caption` names all of it but the polish."""

    shape: str
    colour: str
    size: str
    count: int
    position: str
    background: str
    polish: float = 0.5
    """0 (flat) to 1 (glossy: highlights, shading, vignette)."""
    style: str = ""
    """"", or the word for the polish: "glossy" (polish >= 0.7) or "flat" (polish <= 0.3)."""

    def __post_init__(self):
        for name, allowed in _VALUES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}.")
        if self.colour == self.background:
            raise ValueError(f"colour and background are both {self.colour!r}; the shapes would be invisible.")
        if not 0 <= self.polish <= 1:
            raise ValueError(f"polish is {self.polish}; expected 0 to 1.")


_VALUES: dict[str, tuple] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "count": tuple(COUNTS),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
    "style": ("", *STYLES),
}


def scene_key(scene: Scene) -> str:
    """The attribute combination as text; scenes that differ only in polish or style share a key."""
    return "/".join(str(getattr(scene, name)) for name in ATTRIBUTES)


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all combinations that training never draws."""
    return int.from_bytes(blake2b(scene_key(scene).encode(), digest_size=4).digest(), "little") % 10 == 0


@cache
def _combinations(held_out: bool) -> tuple[tuple, ...]:
    every = itertools.product(*(_VALUES[name] for name in ATTRIBUTES))
    visible = (values for values in every if values[1] != values[5])
    return tuple(v for v in visible if is_held_out(Scene(**dict(zip(ATTRIBUTES, v, strict=True)))) == held_out)


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _pick(options: Sequence, generator: Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def _random_polish(generator: Generator) -> tuple[float, str]:
    """Uniform polish, and in a part of the scenes a style word with a polish that fits it."""
    polish = _uniform(generator)
    if _uniform(generator) >= STYLED_SHARE:
        return polish, ""
    style = _pick(STYLES, generator)
    return (0.7 + 0.3 * polish if style == "glossy" else 0.3 * polish), style


def random_scene(generator: Generator, held_out: bool = False) -> Scene:
    """One scene, uniform over the training combinations (or the held-out ones)."""
    values = _pick(_combinations(held_out), generator)
    polish, style = _random_polish(generator)
    return Scene(**dict(zip(ATTRIBUTES, values, strict=True)), polish=polish, style=style)


def training_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of the training combinations; scene i depends on (seed, i) only."""
    return [random_scene(new_generator(seed, "scene", index)) for index in range(count)]


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of named shapes in held-out combinations, without a style word."""
    combinations = [values for values in _combinations(True) if values[0] in NAMED_SHAPES]
    scenes = []
    for index in range(count):
        generator = new_generator(seed, "held-out scene", index)
        values = _pick(combinations, generator)
        scenes.append(Scene(**dict(zip(ATTRIBUTES, values, strict=True)), polish=_uniform(generator)))
    return scenes


_PHRASINGS = (
    "{things} {position}, {background} background",
    "{background} background with {things} {position}",
    "{things} on a {background} background, {position}",
)


def _phrase(scene: Scene, phrasing: str, included: frozenset[str]) -> str:
    noun = "shape" if "shape" not in included else scene.shape if scene.shape in NAMED_SHAPES else "figure"
    plural = scene.count > 1 and "count" in included
    noun = noun if not plural else {"cross": "crosses"}.get(noun, noun + "s")
    words = [COUNTS[scene.count] if "count" in included else "", scene.size if "size" in included else "", scene.style]
    words += [scene.colour if "colour" in included else "", noun]
    text = phrasing if "background" in included else "{things} {position}"
    text = text.format(
        things=" ".join(filter(None, words)),
        position=POSITIONS[scene.position] if "position" in included else "",
        background=scene.background,
    )
    return " ".join(text.replace(" ,", ",").split()).strip(", ")


def caption(scene: Scene, generator: Generator, drop: float = 0.0) -> str:
    """A caption in one of three phrasings; each attribute is left out with probability `drop`."""
    phrasing = _pick(_PHRASINGS, generator)
    included = frozenset(name for name in ATTRIBUTES if drop == 0 or _uniform(generator) >= drop)
    return _phrase(scene, phrasing, included)


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Outline in -1..1, y down."""
    if shape == "heart":
        turns = [2 * math.pi * i / 48 for i in range(48)]
        waves = [(13, 1), (-5, 2), (-2, 3), (-1, 4)]
        return [(math.sin(t) ** 3, -(sum(a * math.cos(k * t) for a, k in waves) + 2.5) / 15) for t in turns]
    a = 0.34
    cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    return {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
        "cross": cross,
        "arrow": [(0, -1), (0.85, -0.1), (0.35, -0.1), (0.35, 1), (-0.35, 1), (-0.35, -0.1), (-0.85, -0.1)],
    }[shape]


def shape_mask(shape: str, radius: float, x: float, y: float, turn: float = 0.0, side: int = SIDE) -> np.ndarray:
    """Anti-aliased coverage of one shape.

    Args:
        shape: One of `SHAPES`.
        radius: Half extent in pixels.
        x, y: Centre in pixels.
        turn: Rotation in radians.

    Returns:
        (side, side) in 0..1.
    """
    scale = _SUPERSAMPLING
    left, top = math.floor(x - radius * 1.3) - 1, math.floor(y - radius * 1.3) - 1
    width = math.ceil(radius * 2.6) + 3
    patch = Image.new("L", (width * scale, width * scale))
    _draw_shape(ImageDraw.Draw(patch), shape, radius * scale, (x - left) * scale, (y - top) * scale, turn)
    patch = np.asarray(patch.reduce(scale), dtype=np.float32) / 255
    mask = np.zeros((side + 2 * width, side + 2 * width), dtype=np.float32)
    row, column = np.clip([top + width, left + width], 0, side + width)
    mask[row : row + width, column : column + width] = patch
    return mask[width : width + side, width : width + side]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, radius: float, x: float, y: float, turn: float):
    def disc(radius: float, x: float, y: float, fill: int):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    if shape in ("circle", "ring", "crescent"):
        disc(radius, x, y, 255)
        if shape == "ring":
            disc(0.55 * radius, x, y, 0)
        if shape == "crescent":
            disc(0.8 * radius, x + 0.5 * radius * math.cos(turn), y + 0.5 * radius * math.sin(turn), 0)
        return
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _polygon(shape)], fill=255)


def _places(scene: Scene, radius: float, generator: Generator) -> list[tuple[float, float]]:
    """Centres of the shapes: a row (at the left and right a column), shifted a little as a whole."""
    step = 2 * radius + GAP
    half = (scene.count - 1) / 2 * step + radius
    middle = SIDE / 2
    slack = min(10.0, middle - 0.5 - half)
    along = middle + _uniform(generator, -slack, slack)
    across = middle + _uniform(generator, -6, 6)
    if scene.position != "centre":
        inset = _uniform(generator, 24, 32)
        across = inset if scene.position in ("left", "top") else SIDE - inset
    line = [along + (index - (scene.count - 1) / 2) * step for index in range(scene.count)]
    vertical = scene.position in ("left", "right")
    return [(across, place) if vertical else (place, across) for place in line]


def _jittered(rgb: tuple[float, float, float], generator: Generator) -> np.ndarray:
    offset = (torch.rand(3, generator=generator) - 0.5).numpy() * 0.06
    return np.clip(np.asarray(rgb, dtype=np.float32) + offset, 0.02, 0.98)


def draw(scene: Scene, generator: Generator) -> Tensor:
    """The scene as an image (3, 128, 128) in 0..1; position, size, angle and colours vary a little by the generator."""
    rows, columns = _grid()
    radius = SIZES[scene.size] * _uniform(generator, 0.96, 1.04)
    back, front = (_jittered(c, generator) for c in (BACKGROUNDS[scene.background], COLOURS[scene.colour]))
    distance = centre_distance()
    image = back * (1 - VIGNETTE * scene.polish * distance)[..., None]
    shine = 0.55 if scene.shape == "ring" else 0.28
    for x, y in _places(scene, radius, generator):
        mask = shape_mask(scene.shape, radius, x, y, _uniform(generator, -0.12, 0.12))[..., None]
        u, v = (columns - x) / radius, (rows - y) / radius
        shaded = front * (1 - 0.28 * scene.polish * (u + v))[..., None]
        highlight = np.exp(-((u + shine) ** 2 + (v + shine) ** 2) / (2 * 0.24**2))[..., None] * 0.65 * scene.polish
        image += mask * (shaded + highlight * (1 - shaded) - image)
    return torch.from_numpy(np.clip(image, 0, 1).astype(np.float32).transpose(2, 0, 1).copy())


def _grid() -> np.ndarray:
    return np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def centre_distance() -> np.ndarray:
    """(128, 128): squared distance from the centre, 1 at the corners."""
    rows, columns = _grid()
    return ((columns - SIDE / 2) ** 2 + (rows - SIDE / 2) ** 2) / (2 * (SIDE / 2) ** 2)


def warm_edges(image: Tensor) -> Tensor:
    """The image (3, 128, 128), faded into a warm colour towards its corners."""
    share = torch.from_numpy(0.4 * centre_distance())
    return image * (1 - share) + torch.tensor(WARM)[:, None, None] * share


def demo_examples(count: int, seed: int, subset: str = "", look: str = "plain") -> tuple[Tensor, list[str]]:
    """Training images and their captions; example i depends on (seed, i) and the options only.

    Args:
        subset: Words that every caption must contain; "" for all. The names of the unnamed shapes (heart, crescent,
            arrow) select those shapes too, though their captions still have "figure".
        look: One of `LOOKS`; "warm edges" is a style that no caption names (`warm_edges`).

    Returns:
        Images (count, 3, 128, 128) in 0..1, and `count` captions.

    Raises:
        ValueError: For another look, or when no caption has all the words.
    """
    if look not in LOOKS:
        raise ValueError(f"look is {look!r}; expected one of {', '.join(LOOKS)}.")
    words = frozenset(subset.lower().replace(",", " ").split())
    choices = _matching(words)
    if not choices:
        raise ValueError(
            f"subset is {subset!r}; no demo caption has all of these words. "
            f"Use words of captions such as {_phrase(Scene(**_EXAMPLE), _PHRASINGS[0], frozenset(ATTRIBUTES))!r}."
        )
    images, captions = [], []
    for index in range(count):
        generator = new_generator(seed, "demo example", index)
        values, style, phrasing = _pick(choices, generator)
        polish, drawn_style = _random_polish(generator)
        if style:
            polish = _uniform(generator, 0.7, 1.0) if style == "glossy" else _uniform(generator, 0.0, 0.3)
        scene = Scene(**dict(zip(ATTRIBUTES, values, strict=True)), polish=polish, style=style or drawn_style)
        image = draw(scene, generator)
        images.append(warm_edges(image) if look == "warm edges" else image)
        captions.append(_phrase(scene, phrasing, frozenset(ATTRIBUTES)))
    return torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE), captions


_EXAMPLE = {
    "shape": "circle", "colour": "red", "size": "small", "count": 2, "position": "left", "background": "white"
}  # fmt: skip


@cache
def _matching(words: frozenset[str]) -> tuple[tuple[tuple, str, str], ...]:
    """Every (attribute values, style word, phrasing) whose caption contains the words."""
    style = next((word for word in STYLES if word in words), "")
    found = []
    for values, phrasing in itertools.product(_combinations(False), _PHRASINGS):
        scene = Scene(**dict(zip(ATTRIBUTES, values, strict=True)), style=style)
        text = _phrase(scene, phrasing, frozenset(ATTRIBUTES)).replace(",", " ").split()
        if words <= {*text, scene.shape if scene.shape in UNNAMED_SHAPES else ""}:
            found.append((values, style, phrasing))
    return tuple(found)
