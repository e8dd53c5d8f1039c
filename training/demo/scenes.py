"""Drawn scenes with captions: a few equal shapes of one colour and size, somewhere on a plain background.

The demo model is trained on them alone. A tenth of all attribute combinations is held out: drawn for measuring, never
in training. Three shapes are drawn but never named: their captions have "figure" instead, which leaves something for
textual inversion to learn. A picture also has three qualities between 0 and 1 (polish, light, richness), which a
part of the captions names by a word for either end; without it they are random, so that rewards can raise them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Generator, Tensor

from ..common.rng import generator as new_generator
from .shapes import NAMED_SHAPES, SHAPES, SIDE, UNNAMED_SHAPES, shape_mask

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
ATTRIBUTES = ("shape", "colour", "size", "count", "position", "background")
QUALITIES = {"polish": ("flat", "glossy"), "light": ("dim", "sunlit"), "richness": ("plain", "rich")}
"""Quality -> the words for its lower and its upper end."""
QUALITY_WORDS = tuple(itertools.chain.from_iterable(QUALITIES.values()))
NAMED_RANGE = 0.3
"""A quality whose word is named lies within this distance of its end."""
NAMED_SHARE = 0.4
"""Of the pictures, for each quality: those whose caption names it."""
VIGNETTE = 0.4
"""How much darker the corners of a fully polished picture are."""
LIGHT = 0.24
"""How far full light moves the upper edge of a background towards white, and its lower edge towards black."""
PALEST = 0.45
"""Share of the shapes' colour that is left at richness 0; the rest is grey of the same luminance."""
LUMINANCE = (0.299, 0.587, 0.114)
LOOKS = ("plain", "warm edges")
WARM = (1.0, 0.55, 0.15)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one picture; `caption` names its attributes, and those qualities whose word is in `words`."""

    shape: str
    colour: str
    size: str
    count: int
    position: str
    background: str
    polish: float = 0.5
    """0 (flat) to 1 (glossy: highlights, shading, vignette)."""
    light: float = 0.0
    """0 (none) to 1 (the background is lit from above)."""
    richness: float = 1.0
    """0 (the colour of the shapes is pale) to 1 (full)."""
    words: tuple[str, ...] = ()
    """The quality words that the caption has, at most one a quality."""

    def __post_init__(self):
        for name, allowed in VALUES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}.")
        if self.colour == self.background:
            raise ValueError(f"colour and background are both {self.colour!r}; the shapes would be invisible.")
        for name, ends in QUALITIES.items():
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1.")
            if set(ends) <= set(self.words):
                raise ValueError(f"words has both {ends[0]!r} and {ends[1]!r}; expected at most one of them.")
        unknown = [word for word in self.words if word not in QUALITY_WORDS]
        if unknown:
            raise ValueError(f"words has {unknown[0]!r}; expected words of {', '.join(QUALITY_WORDS)}.")


VALUES: dict[str, tuple] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "count": tuple(COUNTS),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}


def scene_key(scene: Scene) -> str:
    """The attribute combination as text; scenes that differ only in quality share a key."""
    return "/".join(str(getattr(scene, name)) for name in ATTRIBUTES)


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all combinations that training never draws."""
    return int.from_bytes(blake2b(scene_key(scene).encode(), digest_size=4).digest(), "little") % 10 == 0


@cache
def _combinations(held_out: bool) -> tuple[tuple, ...]:
    every = itertools.product(*(VALUES[name] for name in ATTRIBUTES))
    visible = (values for values in every if values[1] != values[5])
    return tuple(v for v in visible if is_held_out(Scene(**dict(zip(ATTRIBUTES, v, strict=True)))) == held_out)


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def pick(options: Sequence, generator: Generator):
    """One of the options, all equally likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def with_words(scene: Scene, words: Iterable[str]) -> Scene:
    """The scene with these quality words; their qualities are moved into the range that the words name."""
    words = tuple(words)
    moved = {}
    for name, (low, high) in QUALITIES.items():
        value = getattr(scene, name)
        if high in words:
            moved[name] = 1 - NAMED_RANGE * (1 - value)
        elif low in words:
            moved[name] = NAMED_RANGE * value
    return replace(scene, words=words, **moved)


def random_words(generator: Generator) -> tuple[str, ...]:
    """For a part of the qualities (`NAMED_SHARE`) the word for either end."""
    drawn = [(_uniform(generator) < NAMED_SHARE, pick(ends, generator)) for ends in QUALITIES.values()]
    return tuple(word for named, word in drawn if named)


def _with_random_qualities(scene: Scene, generator: Generator, words: Iterable[str] = ()) -> Scene:
    """Uniform qualities; `words`, and words for other qualities in a part of the scenes, with qualities that fit."""
    scene = replace(scene, **{name: _uniform(generator) for name in QUALITIES})
    taken = {end for ends in QUALITIES.values() if set(ends) & set(words) for end in ends}
    return with_words(scene, [*words, *(word for word in random_words(generator) if word not in taken)])


def caption_shape(scene: Scene) -> str:
    """The noun that captions have for the shape: "figure" for the unnamed ones."""
    return scene.shape if scene.shape in NAMED_SHAPES else "figure"


def random_scene(generator: Generator, held_out: bool = False) -> Scene:
    """One scene, uniform over the training combinations (or the held-out ones)."""
    values = pick(_combinations(held_out), generator)
    return _with_random_qualities(Scene(**dict(zip(ATTRIBUTES, values, strict=True))), generator)


def training_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of the training combinations; scene i depends on (seed, i) only."""
    return [random_scene(new_generator(seed, "scene", index)) for index in range(count)]


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of named shapes in held-out combinations with random qualities, without quality words."""
    combinations = [values for values in _combinations(True) if values[0] in NAMED_SHAPES]
    scenes = []
    for index in range(count):
        generator = new_generator(seed, "held-out scene", index)
        values = pick(combinations, generator)
        qualities = {name: _uniform(generator) for name in QUALITIES}
        scenes.append(Scene(**dict(zip(ATTRIBUTES, values, strict=True)), **qualities))
    return scenes


_PHRASINGS = (
    "{things} {position}, {background} background",
    "{background} background with {things} {position}",
    "{things} on a {background} background, {position}",
)
_PLACES = ("inside", "end", "start")
"""Of the quality words: words of polish before the colour and the others at the end; all at the end; all in front."""


def _phrase(scene: Scene, phrasing: str, included: frozenset[str], place: str = "inside") -> str:
    noun = "shape" if "shape" not in included else caption_shape(scene)
    plural = scene.count > 1 and "count" in included
    noun = noun if not plural else {"cross": "crosses"}.get(noun, noun + "s")
    adjectives = [word for word in scene.words if place == "inside" and word in QUALITIES["polish"]]
    tags = [word for word in scene.words if word not in adjectives]
    words = [COUNTS[scene.count] if "count" in included else "", scene.size if "size" in included else "", *adjectives]
    words += [scene.colour if "colour" in included else "", noun]
    text = phrasing if "background" in included else "{things} {position}"
    text = text.format(
        things=" ".join(filter(None, words)),
        position=POSITIONS[scene.position] if "position" in included else "",
        background=scene.background,
    )
    text = " ".join(text.replace(" ,", ",").split()).strip(", ")
    return ", ".join([*tags, text] if place == "start" else [text, *tags])


def caption(scene: Scene, generator: Generator, drop: float = 0.0) -> str:
    """A caption in one of three phrasings, with the scene's quality words in any place and order.

    drop: The probability with which each attribute is left out.
    """
    phrasing = pick(_PHRASINGS, generator)
    included = frozenset(name for name in ATTRIBUTES if drop == 0 or _uniform(generator) >= drop)
    order = torch.randperm(len(scene.words), generator=generator)
    scene = replace(scene, words=tuple(scene.words[i] for i in order))
    return _phrase(scene, phrasing, included, pick(_PLACES, generator))


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


def _faded(rgb: np.ndarray, richness: float) -> np.ndarray:
    """The colour mixed with the grey of its luminance."""
    share = PALEST + (1 - PALEST) * richness
    return share * rgb + (1 - share) * (rgb @ np.asarray(LUMINANCE, dtype=np.float32))


def draw(scene: Scene, generator: Generator) -> Tensor:
    """The scene as an image (3, 128, 128) in 0..1; position, size, angle and colours vary a little by the generator."""
    rows, columns = _grid()
    radius = SIZES[scene.size] * _uniform(generator, 0.96, 1.04)
    back, front = (_jittered(c, generator) for c in (BACKGROUNDS[scene.background], COLOURS[scene.colour]))
    front = _faded(front, scene.richness)
    image = back * (1 - VIGNETTE * scene.polish * centre_distance())[..., None]
    top, bottom = (LIGHT * scene.light * share[..., None] for share in edge_shares())
    image += top * (1 - image) - bottom * image
    for x, y in _places(scene, radius, generator):
        mask = shape_mask(scene.shape, radius, x, y, _uniform(generator, -0.12, 0.12))[..., None]
        shade, highlight = gloss((columns - x) / radius, (rows - y) / radius, scene.shape)
        shaded = front * (1 - scene.polish * shade)[..., None]
        image += mask * (shaded + scene.polish * highlight[..., None] * (1 - shaded) - image)
    return torch.from_numpy(np.clip(image, 0, 1).astype(np.float32).transpose(2, 0, 1).copy())


def gloss(u: np.ndarray, v: np.ndarray, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """How much full polish darkens the colour (a share), and how far it then moves it to white, at places of a shape.

    u, v: Places in units of the shape's half extent, from its centre to the right and down.
    """
    shine = 0.55 if shape == "ring" else 0.28
    return 0.28 * (u + v), 0.65 * np.exp(-((u + shine) ** 2 + (v + shine) ** 2) / (2 * 0.24**2))


def _grid() -> np.ndarray:
    return np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def centre_distance() -> np.ndarray:
    """(128, 128): squared distance from the centre, 1 at the corners."""
    rows, columns = _grid()
    return ((columns - SIDE / 2) ** 2 + (rows - SIDE / 2) ** 2) / (2 * (SIDE / 2) ** 2)


def edge_shares() -> tuple[np.ndarray, np.ndarray]:
    """(128, 128) each: how far a place is above and below the middle, 0 there and 1 at the upper and the lower edge."""
    height = 1 - _grid()[0] / (SIDE / 2)
    return np.maximum(height, 0), np.maximum(-height, 0)


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
    qualities = tuple(word for word in QUALITY_WORDS if word in words)
    choices = _matching(words - {*qualities})
    if not choices or any(set(ends) <= words for ends in QUALITIES.values()):
        raise ValueError(
            f"subset is {subset!r}; no demo caption has all of these words. "
            f"Use words of captions such as {_phrase(Scene(**_EXAMPLE), _PHRASINGS[0], frozenset(ATTRIBUTES))!r}."
        )
    images, captions = [], []
    for index in range(count):
        generator = new_generator(seed, "demo example", index)
        values, phrasing = pick(choices, generator)
        scene = Scene(**dict(zip(ATTRIBUTES, values, strict=True)))
        scene = _with_random_qualities(scene, generator, qualities)
        image = draw(scene, generator)
        images.append(warm_edges(image) if look == "warm edges" else image)
        captions.append(_phrase(scene, phrasing, frozenset(ATTRIBUTES)))
    return torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE), captions


_EXAMPLE = {
    "shape": "circle", "colour": "red", "size": "small", "count": 2, "position": "left", "background": "white",
    "words": ("glossy", "rich"),
}  # fmt: skip


@cache
def _matching(words: frozenset[str]) -> tuple[tuple[tuple, str], ...]:
    """Every (attribute values, phrasing) whose caption contains the words."""
    found = []
    for values, phrasing in itertools.product(_combinations(False), _PHRASINGS):
        scene = Scene(**dict(zip(ATTRIBUTES, values, strict=True)))
        text = _phrase(scene, phrasing, frozenset(ATTRIBUTES)).replace(",", " ").split()
        if words <= {*text, scene.shape if scene.shape in UNNAMED_SHAPES else ""}:
            found.append((values, phrasing))
    return tuple(found)
