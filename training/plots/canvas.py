"""Axes, ticks, grids, curves and labels on a picture: what every chart of this folder is drawn with.

Drawn with Pillow, which every ComfyUI has. matplotlib would be one more dependency for every user, and these charts
need only lines, bars and labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Point = tuple[float, float]
Range = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""

AXIS, GRID = "#333333", "#e4e4e4"


@dataclass(frozen=True)
class Style:
    """Size and colour of tick labels, width of grid lines; sizes in pixels."""

    font_size: int
    label: str = AXIS
    grid_width: int = 2


PAGE = Style(15, "#555555", 1)
"""For a chart shown at its full size."""
NODE = Style(24)
"""For a chart that a node shows at half its size."""


@dataclass(frozen=True)
class Axes:
    """Data limits of a plot and its place in the picture; log_x: the x axis is logarithmic."""

    x: Range
    y: Range
    box: Box
    log_x: bool = False

    def place(self, point: Point) -> Point:
        """Data to pixels. Values that a logarithmic axis cannot hold are placed at its left end."""
        left, top, right, bottom = self.box
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + self._across(point[0]) * (right - left), bottom - up * (bottom - top)

    def _across(self, value: float) -> float:
        low, high = self.x
        if self.log_x:
            return math.log(value / low) / math.log(high / low) if value > 0 else 0.0
        return (value - low) / (high - low)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten apart) between two limits."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """1, 2 and 5 times powers of ten between two limits; powers of ten alone where those are more than `most`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [value for power in powers for step in steps if low <= (value := step * 10.0**power) <= high]
        if len(found) <= most:
            break
    return found


def text_width(text: str, size: int) -> float:
    """Width in pixels of a line of text of a size."""
    from PIL import ImageFont

    return ImageFont.load_default(size).getlength(text)


class Canvas:
    """A white picture of width x height pixels to draw on; later drawings cover earlier ones."""

    def __init__(self, width: int, height: int, style: Style):
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._style = style

    def tensor(self) -> Tensor:
        """The picture (height, width, 3) in 0..1."""
        width, height = self._image.size
        pixels = torch.frombuffer(bytearray(self._image.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, 3).float() / 255

    def text(self, at: Point, text: str, colour: str = AXIS, *, anchor: str = "la", size: int | None = None) -> float:
        """Writes one line and returns its width; anchor as Pillow's, size in pixels, by default the style's."""
        size = size or self._style.font_size
        self._draw.text(at, text, fill=colour, anchor=anchor, font_size=size)
        return self._draw.textlength(text, font_size=size)

    def picture(self, at: tuple[int, int], pixels: Tensor) -> None:
        """Places a picture (height, width, 3) in 0..1 with its upper left corner at a point."""
        from PIL import Image

        bytes_ = (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        self._image.paste(Image.fromarray(bytes_.numpy()), at)

    def line(self, points: Sequence[Point], colour: str, width: int) -> None:
        self._draw.line(points, fill=colour, width=width)

    def rectangle(self, box: Box, colour: str) -> None:
        self._draw.rectangle(box, fill=colour)

    def polygon(self, points: Sequence[Point], colour: str) -> None:
        """Filled; a colour of eight hex digits is translucent."""
        from PIL import ImageDraw

        ImageDraw.Draw(self._image, "RGBA").polygon(points, fill=colour)

    def dashed_vertical(self, x: float, top: float, bottom: float, colour: str) -> None:
        for y in range(int(top), int(bottom), 16):
            self.line([(x, y), (x, min(y + 10, bottom))], colour, 3)

    def curve(self, axes: Axes, points: Iterable[Point], colour: str, width: int) -> None:
        """Points joined by lines, a single one as a dot; values above the plot are drawn at its upper edge."""
        placed = [axes.place((x, min(y, axes.y[1]))) for x, y in points]
        if len(placed) > 1:
            self._draw.line(placed, fill=colour, width=width, joint="curve")
        elif placed:
            (x, y), r = placed[0], width + 1
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def y_grid(self, axes: Axes, values: Iterable[float], spec: str = ".4g") -> None:
        """A line across the plot at each value, with its label left of the plot."""
        left, _, right, _ = axes.box
        for value in values:
            _, y = axes.place((axes.x[0], value))
            self.line([(left, y), (right, y)], GRID, self._style.grid_width)
            self.text((left - 8, y), format(value, spec), self._style.label, anchor="rm")

    def x_grid(self, axes: Axes, values: Sequence[float]) -> None:
        """A line from the top of the plot to its bottom at each value."""
        _, top, _, bottom = axes.box
        for value in values:
            x, _ = axes.place((value, axes.y[0]))
            self.line([(x, top), (x, bottom)], GRID, self._style.grid_width)

    def x_labels(self, axes: Axes, values: Iterable[float], spec: str, *, below: int = 10) -> None:
        """A label at each value, `below` pixels under the plot."""
        for value in values:
            x, y = axes.place((value, axes.y[0]))
            self.text((x, y + below), format(value, spec), self._style.label, anchor="mt")

    def x_marks(self, axes: Axes, values: Iterable[float]) -> None:
        """A short line under the plot at each value."""
        for value in values:
            x, y = axes.place((value, axes.y[0]))
            self.line([(x, y), (x, y + 6)], AXIS, 2)

    def x_axis(self, axes: Axes) -> None:
        """The line at the bottom of the plot."""
        left, _, right, bottom = axes.box
        self.line([(left, bottom), (right, bottom)], AXIS, 3)

    def x_title(self, axes: Axes, text: str) -> None:
        """What the x axis measures, at the lower edge of the picture."""
        left, _, right, _ = axes.box
        self.text(((left + right) / 2, self._image.size[1] - 10), text, anchor="mb")
