"""A histogram of the scores that a reward gave to images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .canvas import NODE, Axes, Canvas, Range, ticks

WIDTH, HEIGHT = 720, 480
PLOT = (64, 92, WIDTH - 24, HEIGHT - 84)
BAR, MEAN = "#7f9fce", "#d1622b"


def score_histogram(name: str, scores: Sequence[float], mean: float, std: float) -> Tensor:
    """A histogram (HEIGHT, WIDTH, 3) in 0..1 of the scores, with a dashed line at their mean.

    Args:
        name: the reward, as a title.
        scores: one or more.
        mean: of the scores.
        std: of the scores, written beside the mean.
    """
    low, high = limits(scores)
    counts = torch.histc(torch.tensor(scores, dtype=torch.float64), bins(len(scores)), low, high).tolist()
    canvas, axes = Canvas(WIDTH, HEIGHT, NODE), Axes((low, high), (0, max(counts)), PLOT)
    canvas.y_grid(axes, [value for value in ticks(*axes.y, 4) if value == int(value)], ".0f")
    _bars(canvas, axes, counts)
    _score_axis(canvas, axes)
    left, top, _, bottom = PLOT
    canvas.dashed_vertical(axes.place((mean, 0))[0], top - 12, bottom, MEAN)
    canvas.text((left, 14), name)
    canvas.text((left, 46), f"mean {mean:.4g}   std {std:.3g}   of {len(scores)}", MEAN)
    return canvas.tensor()


def _score_axis(canvas: Canvas, axes: Axes) -> None:
    canvas.x_marks(axes, ticks(*axes.x, 5))
    canvas.x_labels(axes, ticks(*axes.x, 5), ".4g", below=12)
    canvas.x_axis(axes)
    canvas.x_title(axes, "score")


def limits(scores: Sequence[float]) -> Range:
    """Ends of the axis: the extreme scores with a margin of a twentieth, never equal."""
    low, high = min(scores), max(scores)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def bins(count: int) -> int:
    """About twice the square root of the number of scores, odd, 9 to 49."""
    return min(49, max(9, round(2 * math.sqrt(count)) | 1))


def _bars(canvas: Canvas, axes: Axes, counts: Sequence[float]) -> None:
    left, _, right, bottom = axes.box
    width = (right - left) / len(counts)
    for i, count in enumerate(counts):
        if count:
            _, y = axes.place((axes.x[0], count))
            canvas.rectangle((left + i * width + 1, y, left + (i + 1) * width - 1, bottom), BAR)
