"""A histogram of scores, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rewards.score import ScoreTable
from .run_chart import ticks

WIDTH, HEIGHT = 720, 480
PLOT = (64, 92, WIDTH - 24, HEIGHT - 84)
"""Left, top, right and bottom of the plot."""
FONT = 24
"""Pixels; the picture is read at half its size in a node."""
BAR, MEAN, AXIS, GRID = "#7f9fce", "#d1622b", "#333333", "#e4e4e4"


def score_chart(table: ScoreTable) -> Tensor:
    """A histogram (HEIGHT, WIDTH, 3) in 0..1 of the scores, a dashed line at their mean."""
    from PIL import Image, ImageDraw

    low, high = limits(table.scores)
    counts = torch.histc(torch.tensor(table.scores, dtype=torch.float64), bins(len(table.scores)), low, high).tolist()
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = PLOT
    most = max(counts)
    for value in (value for value in ticks(0, most, 4) if value == int(value)):
        y = bottom - value / most * (bottom - top)
        draw.line([(left, y), (right, y)], fill=GRID, width=2)
        draw.text((left - 8, y), f"{value:.0f}", fill=AXIS, anchor="rm", font_size=FONT)
    width = (right - left) / len(counts)
    for i, count in enumerate(counts):
        if count:
            box = [left + i * width + 1, bottom - count / most * (bottom - top), left + (i + 1) * width - 1, bottom]
            draw.rectangle(box, fill=BAR)
    _score_axis(draw, low, high)
    x = left + (table.mean - low) / (high - low) * (right - left)
    for y in range(top - 12, bottom, 16):
        draw.line([(x, y), (x, min(y + 10, bottom))], fill=MEAN, width=3)
    draw.text((left, 14), table.name, fill=AXIS, font_size=FONT)
    text = f"mean {table.mean:.4g}   std {table.std:.3g}   of {len(table.scores)}"
    draw.text((left, 46), text, fill=MEAN, font_size=FONT)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3).float() / 255


def limits(scores: Sequence[float]) -> tuple[float, float]:
    """Ends of the axis: the extreme scores with a twentieth beside them, never equal."""
    low, high = min(scores), max(scores)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def bins(count: int) -> int:
    """About twice the square root of the number of scores, odd, 9 to 49."""
    return min(49, max(9, round(2 * math.sqrt(count)) | 1))


def _score_axis(draw, low: float, high: float) -> None:
    left, _, right, bottom = PLOT
    for value in ticks(low, high, 5):
        x = left + (value - low) / (high - low) * (right - left)
        draw.line([(x, bottom), (x, bottom + 6)], fill=AXIS, width=2)
        draw.text((x, bottom + 12), f"{value:.4g}", fill=AXIS, anchor="mt", font_size=FONT)
    draw.line([(left, bottom), (right, bottom)], fill=AXIS, width=3)
    draw.text(((left + right) / 2, HEIGHT - 10), "score", fill=AXIS, anchor="mb", font_size=FONT)
