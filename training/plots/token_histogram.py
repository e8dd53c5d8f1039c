"""How loud a text encoder's tokens are, as a picture drawn with Pillow: before scaling, after, and the reference's.

The axis is logarithmic: a scale moves a distribution and leaves its shape. Encoders that end in a normalisation have
tokens of about one loudness, a narrow peak; a fitted projection makes some tokens louder than others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..text_encoder.scale import TokenStatistics

WIDTH, HEIGHT = 720, 480
PLOT = (24, 178, WIDTH - 24, HEIGHT - 78)
"""Left, top, right and bottom of the plot."""
COLOURS = {"before": "#6f7782", "after": "#2457a6", "measured": "#2f7d5b", "reference": "#d1622b"}
"""By the name of what is shown."""
AXIS, GRID = "#333333", "#e4e4e4"
BINS = 96
FONT = 24
"""Pixels; the picture is read at half its size in a node."""


def histogram(statistics: Mapping[str, TokenStatistics]) -> Tensor:
    """A picture (HEIGHT, WIDTH, 3) in 0..1 of each one's per-token RMS, every curve as high as its fullest bin.

    statistics: by name, those that there are of "before", "after", "measured" and "reference". A dashed line stands at
    each std. Tokens of zeros have no place on the axis and are left out. Errors: ValueError for other names or none.
    """
    from PIL import Image, ImageDraw

    if not statistics or not statistics.keys() <= COLOURS.keys():
        names = ", ".join(statistics) or "empty"
        raise ValueError(f"statistics is {names}; expected one or more of {', '.join(COLOURS)}.")
    low, high = limits(statistics.values())
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    _axis(draw, low, high)
    for row, (name, one) in enumerate(statistics.items()):
        _curve(draw, shares(one.token_rms, low, high), COLOURS[name])
        _std(draw, _across(one.std, low, high), COLOURS[name])
        _legend(draw, row, name, one)
    draw.line([(PLOT[0], PLOT[3]), (PLOT[2], PLOT[3])], fill=AXIS, width=3)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3).float() / 255


def limits(statistics: Sequence[TokenStatistics]) -> tuple[float, float]:
    """Ends of the axis: a fifth beyond the extreme values, and never less than fourfold apart."""
    values = [value for one in statistics for value in (one.std, *one.token_rms) if value > 0] or [1.0]
    low, high = min(values) / 1.2, max(values) * 1.2
    room = max(1.0, math.sqrt(4 * low / high))
    return low / room, high * room


def shares(values: Sequence[float], low: float, high: float) -> list[float]:
    """How many of `values` are in each of BINS bins, equally wide in the logarithm, as shares of the fullest bin."""
    logs = torch.tensor([math.log(value) for value in values if value > 0], dtype=torch.float64)
    counts = torch.histc(logs, BINS, math.log(low), math.log(high))
    return (counts / counts.max().clamp(min=1)).tolist()


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two limits; powers of ten alone where that is over 8."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [value for power in powers for step in steps if low <= (value := step * 10.0**power) <= high]
        if len(found) <= 8:
            break
    return found


def _across(value: float, low: float, high: float) -> float:
    """Pixels from the left of a value on the axis."""
    left, _, right, _ = PLOT
    return left + math.log(value / low) / math.log(high / low) * (right - left) if value > 0 else left


def _axis(draw, low: float, high: float) -> None:
    left, top, right, bottom = PLOT
    for value in ticks(low, high):
        x = _across(value, low, high)
        draw.line([(x, top), (x, bottom)], fill=GRID, width=2)
        draw.text((x, bottom + 10), f"{value:g}", fill=AXIS, anchor="mt", font_size=FONT)
    title = "RMS per token (dashed: std of all elements)"
    draw.text(((left + right) / 2, HEIGHT - 10), title, fill=AXIS, anchor="mb", font_size=FONT)


def _curve(draw, heights: Sequence[float], colour: str) -> None:
    left, top, right, bottom = PLOT
    width = (right - left) / BINS
    steps = [(left + (i + side) * width, bottom - h * (bottom - top)) for i, h in enumerate(heights) for side in (0, 1)]
    draw.polygon([(left, bottom), *steps, (right, bottom)], fill=colour + "90")
    draw.line(steps, fill=colour, width=3)


def _std(draw, x: float, colour: str) -> None:
    """Begins above the plot, so that it is seen where a peak hides the rest."""
    _, top, _, bottom = PLOT
    for y in range(top - 20, bottom, 16):
        draw.line([(x, y), (x, min(y + 10, bottom))], fill=colour, width=3)


def _legend(draw, row: int, name: str, one: TokenStatistics) -> None:
    low, middle, high = one.rms_quantiles()
    y = 14 + row * 44
    draw.rectangle([PLOT[0], y + 2, PLOT[0] + 22, y + 24], fill=COLOURS[name])
    for x, text in (
        (PLOT[0] + 34, name),
        (190, f"std {one.std:.3g}"),
        (330, f"RMS {middle:.3g}  (5-95 %: {low:.3g}-{high:.3g})"),
    ):
        draw.text((x, y), text, fill=COLOURS[name], font_size=FONT)
