"""Bars of several figures side by side, a line for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .canvas import AXIS, PAGE, Canvas

WIDTH, LINE, TOP, NAMES = 1100, 30, 78, 400
"""Pixels of the picture's width, of a line's height, of the titles, and of the names."""
BAR, LABEL = "#7f9fce", 90
"""Colour of the bars; pixels that are kept free for the number behind one."""


def bar_chart(title: str, names: Sequence[str], panels: Mapping[str, Sequence[float]]) -> Tensor:
    """A chart (height, WIDTH, 3) in 0..1.

    Args:
        title: of the whole chart.
        names: one of each line.
        panels: title -> a value of each line, none negative; the longest bar of a panel is its largest value.
    """
    canvas = Canvas(WIDTH, TOP + LINE * len(names) + 16, PAGE)
    canvas.text((16, 12), title, size=20)
    for row, name in enumerate(names):
        canvas.text((16, _middle(row)), name, anchor="lm")
    width = (WIDTH - NAMES) / len(panels)
    for column, (heading, values) in enumerate(panels.items()):
        _panel(canvas, NAMES + column * width, width, heading, values)
    return canvas.tensor()


def _panel(canvas: Canvas, left: float, width: float, heading: str, values: Sequence[float]) -> None:
    canvas.text((left, TOP - 26), heading, AXIS)
    lengths = bar_lengths(values, width - LABEL)
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        middle = _middle(row)
        canvas.rectangle((left, middle - 9, left + length, middle + 9), BAR)
        canvas.text((left + length + 6, middle), f"{value:.3g}", anchor="lm")


def bar_lengths(values: Sequence[float], longest: float) -> list[float]:
    """Lengths in proportion to the values; the largest has `longest`."""
    most = max(values, default=0.0)
    return [value / most * longest if most else 0.0 for value in values]


def _middle(row: int) -> float:
    return TOP + LINE * (row + 0.5)
