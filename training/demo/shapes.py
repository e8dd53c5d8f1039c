"""The outlines of the demo's shapes, drawn with smooth edges."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
"""Pixels: the width and height of the demo's pictures."""
NAMED_SHAPES = ("circle", "square", "triangle", "cross", "ring")
UNNAMED_SHAPES = ("heart", "crescent", "arrow")
SHAPES = NAMED_SHAPES + UNNAMED_SHAPES
_SUPERSAMPLING = 4


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Outline in -1..1, y down."""
    if shape == "heart":
        turns = [2 * math.pi * i / 48 for i in range(48)]
        waves = [(13, 1), (-5, 2), (-2, 3), (-1, 4)]
        return [(math.sin(t) ** 3, -(sum(a * math.cos(k * t) for a, k in waves) + 2.5) / 15) for t in turns]
    a = 0.38
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
            disc(0.58 * radius, x, y, 0)
        if shape == "crescent":
            disc(0.8 * radius, x + 0.5 * radius * math.cos(turn), y + 0.5 * radius * math.sin(turn), 0)
        return
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _polygon(shape)], fill=255)
