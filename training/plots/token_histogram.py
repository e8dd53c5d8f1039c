"""A histogram of the RMS of a text encoder's tokens: before scaling, after it, and of a reference.

The axis is logarithmic: a scale moves a distribution and leaves its shape. Encoders that end in a normalisation have
tokens of about the same RMS, a narrow peak; after a fitted projection the RMS varies from token to token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .canvas import NODE, Axes, Canvas, Range, log_ticks

WIDTH, HEIGHT = 720, 480
PLOT = (24, 178, WIDTH - 24, HEIGHT - 78)
COLOURS = {"before": "#6f7782", "after": "#2457a6", "measured": "#2f7d5b", "reference": "#d1622b"}
"""By the name of a distribution."""
BINS = 96


@dataclass(frozen=True)
class Distribution:
    """The RMS of each token, the std over all elements of all tokens, and the RMS's 5 %, 50 % and 95 % quantiles."""

    token_rms: Sequence[float]
    std: float
    quantiles: tuple[float, float, float]


def token_histogram(distributions: Mapping[str, Distribution]) -> Tensor:
    """A picture (HEIGHT, WIDTH, 3) in 0..1 of per-token RMS, every curve as high as its fullest bin.

    distributions: by name, one or more of "before", "after", "measured" and "reference". A dashed line marks the std of
    each. Tokens of zeros have no place on the axis and are left out. Raises ValueError for other names or none.
    """
    if not distributions or not distributions.keys() <= COLOURS.keys():
        names = ", ".join(distributions) or "empty"
        raise ValueError(f"statistics is {names}; expected one or more of {', '.join(COLOURS)}.")
    canvas = Canvas(WIDTH, HEIGHT, NODE)
    axes = Axes(limits(distributions.values()), (0, 1), PLOT, log_x=True)
    _label(canvas, axes)
    for row, (name, distribution) in enumerate(distributions.items()):
        _draw(canvas, axes, distribution, COLOURS[name])
        _legend(canvas, row, name, distribution)
    canvas.x_axis(axes)
    return canvas.tensor()


def limits(distributions: Iterable[Distribution]) -> Range:
    """Ends of the axis: a fifth beyond the extreme values, and never less than fourfold apart."""
    values = [value for one in distributions for value in (one.std, *one.token_rms) if value > 0] or [1.0]
    low, high = min(values) / 1.2, max(values) * 1.2
    margin = max(1.0, math.sqrt(4 * low / high))
    return low / margin, high * margin


def shares(values: Sequence[float], low: float, high: float) -> list[float]:
    """Counts of `values` in BINS bins, equally wide in the logarithm, as shares of the fullest bin."""
    logs = torch.tensor([math.log(value) for value in values if value > 0], dtype=torch.float64)
    counts = torch.histc(logs, BINS, math.log(low), math.log(high))
    return (counts / counts.max().clamp(min=1)).tolist()


def _label(canvas: Canvas, axes: Axes) -> None:
    canvas.x_grid(axes, log_ticks(*axes.x))
    canvas.x_labels(axes, log_ticks(*axes.x), "g")
    canvas.x_title(axes, "RMS per token (dashed: std of all elements)")


def _draw(canvas: Canvas, axes: Axes, distribution: Distribution, colour: str) -> None:
    left, top, right, bottom = axes.box
    bins = Axes((0, BINS), axes.y, axes.box)
    heights = shares(distribution.token_rms, *axes.x)
    steps = [bins.place((i + side, height)) for i, height in enumerate(heights) for side in (0, 1)]
    canvas.polygon([(left, bottom), *steps, (right, bottom)], colour + "90")
    canvas.line(steps, colour, 3)
    # Longer than the plot is high: a peak may cover the rest of it.
    canvas.dashed_vertical(axes.place((distribution.std, 0))[0], top - 20, bottom, colour)


def _legend(canvas: Canvas, row: int, name: str, distribution: Distribution) -> None:
    low, middle, high = distribution.quantiles
    left, y = PLOT[0], 14 + row * 44
    canvas.rectangle((left, y + 2, left + 22, y + 24), COLOURS[name])
    canvas.text((left + 34, y), name, COLOURS[name])
    canvas.text((190, y), f"std {distribution.std:.3g}", COLOURS[name])
    canvas.text((330, y), f"RMS {middle:.3g}  (5-95 %: {low:.3g}-{high:.3g})", COLOURS[name])
