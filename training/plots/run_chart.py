"""A run's curves as a picture, drawn with Pillow: raw and smoothed loss, validation loss.

Where a validation has further figures (see `evaluate`), small panels below show them: how much the text is used, and
the held-out loss per range of noise levels. So does one the alignment of samples, where something judged them. A reward
tuning shows its reward, which rises, in place of the loss, and a panel for every term of it; two more show what its
guard saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WIDTH, HEIGHT, MARGIN = 960, 540, (76, 48, 24, 44)
"""Margins: left, top, right, bottom."""
PANEL, GAP = 210, 90
"""Height of the lower panels, and the space between the two."""
COLOURS = {
    "loss": "#c9d6ea",
    "smoothed": "#2457a6",
    "validation": "#d1622b",
    "grid": "#e4e4e4",
    "text gap": "#2b8a5a",
    "alignment": "#7a4fb0",
    "diversity": "#0f7f8c",
    "floor": "#b5282e",
}
BANDS = ("#fbb862", "#ef7f4d", "#cf4a5f", "#93307a", "#3f1d71")
"""Noise levels from nearly clean to nearly pure noise."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
MAIN: Box = (MARGIN[0], MARGIN[1], WIDTH - MARGIN[2], HEIGHT - MARGIN[3])
"""Left, top, right and bottom edge of the loss plot."""


@dataclass(frozen=True)
class Axes:
    """Data limits of a plot and their place in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    box: Box = MAIN

    def place(self, point: Point) -> Point:
        left, top, right, bottom = self.box
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without start-up bias (Kingma & Ba 2015, arXiv 1412.6980, section 3)."""
    average, result = 0.0, []
    for number, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**number))
    return result


def run_chart(name: str, rows: list[dict[str, Any]], rates: bool = False) -> Tensor:
    """The chart (HEIGHT, WIDTH, 3) in 0..1 of a run's metrics rows; a run without steps gives empty axes.

    PANEL higher for every two panels below. rates: with a panel for the learning rate.
    """
    from PIL import Image, ImageDraw

    taken = [row for row in rows if "event" not in row]
    what = "reward" if taken and "reward" in taken[-1] else "loss"
    sign = -1.0 if what == "reward" else 1.0  # the loss of a reward tuning is minus its reward
    steps = [(row["step"], row[what]) for row in taken]
    curve = list(zip([s for s, _ in steps], smoothed([v for _, v in steps]), strict=True))
    validation = [(row["step"], sign * row["loss"]) for row in rows if row.get("event") == "validation"]
    figures = [row for row in rows if row.get("event") == "validation" and "bands" in row]
    panels = _panels(figures, [row for row in rows if row.get("event") == "sample" and "alignment" in row])
    panels += _term_panels(taken) if what == "reward" else []
    panels += _rate_panel(taken) if rates else []
    panels += _guard_panels([row for row in rows if row.get("event") == "guard"])
    height = HEIGHT + PANEL * math.ceil(len(panels) / 2)
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    axes = limits(steps, curve + validation, from_zero=what == "loss")
    _grid(draw, axes)
    for points, key, width in ((steps, "loss", 1), (curve, "smoothed", 3), (validation, "validation", 3)):
        _line(draw, axes, points, COLOURS[key], width)
    _legend(draw, name, what, curve, validation)
    for number, panel in enumerate(panels):
        _draw_panel(draw, axes.x, panel, number)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, WIDTH, 3).float() / 255


@dataclass(frozen=True)
class _Panel:
    """A small plot: coloured lines, a title, and words in the lines' colours after it; from_zero: as in `limits`."""

    title: str
    lines: list[tuple[list[Point], str]]
    legend: tuple[str, ...] = ()
    highest: float | None = None
    from_zero: bool = True


def _panels(validations: list[dict[str, Any]], samples: list[dict[str, Any]]) -> list[_Panel]:
    found = []
    gap = [(row["step"], row["text_gap"]) for row in validations if "text_gap" in row]
    if gap:
        title = f"text gap {gap[-1][1]:.4f} (loss with shuffled captions minus loss)"
        found.append(_Panel(title, [(gap, COLOURS["text gap"])]))
    if validations:
        count = min(len(row["bands"]) for row in validations)
        lines = [[(row["step"], row["bands"][band]) for row in validations] for band in range(count)]
        colours = [BANDS[round(band * (len(BANDS) - 1) / max(1, count - 1))] for band in range(count)]
        legend = tuple(f"{100 * (band + 1) // count} %" for band in range(count))
        found.append(_Panel("held-out loss, noise level:", list(zip(lines, colours, strict=True)), legend))
    aligned = [(row["step"], row["alignment"]) for row in samples]
    if aligned:
        title = f"alignment {aligned[-1][1]:.2f} (share of the samples read back right)"
        found.append(_Panel(title, [(aligned, COLOURS["alignment"])], highest=1.0))
    return found


def _term_panels(steps: list[dict[str, Any]]) -> list[_Panel]:
    """One for each term of a reward: its own scores, smoothed."""
    found = []
    for name in [key for key in steps[-1] if f"{key} normalised" in steps[-1]]:
        values = [(row["step"], row[name]) for row in steps if name in row]
        curve = list(zip([step for step, _ in values], smoothed([v for _, v in values], 0.9), strict=True))
        title = f"{name} {curve[-1][1]:.4g} (raw scores, smoothed)"
        found.append(_Panel(title, [(curve, COLOURS["smoothed"])], from_zero=False))
    return found


def _rate_panel(steps: list[dict[str, Any]]) -> list[_Panel]:
    rates = [(row["step"], row["learning_rate"]) for row in steps if "learning_rate" in row]
    return [_Panel(f"learning rate {rates[-1][1]:.3g}", [(rates, COLOURS["smoothed"])])] if rates else []


def _guard_panels(checks: list[dict[str, Any]]) -> list[_Panel]:
    """How the reward and the held-out terms of the guard's pictures rose, with a dot where they were best, and what was
    left of the pictures' diversity, with the share at which the guard steps in."""
    if not checks:
        return []
    last, held_out = checks[-1], checks[-1]["held_out"][: len(BANDS)]
    gains = {name: [(row["step"], row["gains"][name]) for row in checks] for name in ("reward", *held_out)}
    best = [point for point in gains["reward"] if point[0] == last["best_step"]]
    colours = [COLOURS["smoothed"], *(BANDS[number] for number in range(len(held_out)))]
    lines = [*zip(gains.values(), colours, strict=True), (best, COLOURS["smoothed"])]
    shares = [(row["step"], row["shares"]["diversity"]) for row in checks]
    floor = [(shares[0][0], last["floor"]), (shares[-1][0], last["floor"])]
    title = f"guard: diversity {100 * shares[-1][1]:.0f} % of the start's,"
    return [
        _Panel("guard: gain in std,", lines, tuple(gains)),
        _Panel(
            title,
            [(floor, COLOURS["floor"]), (shares, COLOURS["diversity"])],
            (f"at least {100 * last['floor']:.0f} %",),
        ),
    ]


def _draw_panel(draw, steps: tuple[float, float], panel: _Panel, number: int) -> None:
    """The panel of this number (from 0), two in a row below the plot, over the same steps."""
    left, _, right, _ = MAIN
    width, row = (right - left - GAP) / 2, HEIGHT + PANEL * (number // 2)
    left += (width + GAP) * (number % 2)
    box = (left, row + 24, left + width, row + PANEL - MARGIN[3])
    values = [value for points, _ in panel.lines for _, value in points]
    axes = Axes(steps, _range(values, panel.highest, panel.from_zero), box)
    _grid(draw, axes, 3)
    for points, colour in panel.lines:
        _line(draw, axes, points, colour, 2)
    draw.text((left, box[1] - 8), panel.title, fill="#333333", anchor="ls", font_size=14)
    x = left + draw.textlength(panel.title + " ", font_size=14)
    for text, (_, colour) in zip(panel.legend, panel.lines, strict=False):
        draw.text((x, box[1] - 8), text, fill=colour, anchor="ls", font_size=14)
        x += draw.textlength(text + " ", font_size=14)


def limits(steps: Sequence[Point], smooth: Sequence[Point], from_zero: bool = True) -> Axes:
    """Axes from step 0 to the last; y holds the smooth curves and nearly all raw values.

    from_zero: y begins at 0, or a little below what is negative; without it, also where all values are far from 0 and
    near each other, such as scores of 20 to 22.
    """
    raw = sorted(value for _, value in steps)
    shown = [value for _, value in smooth] + raw[: max(1, int(0.98 * len(raw)))]
    return Axes((0.0, max([step for step, _ in steps], default=1) or 1), _range(shown, None, from_zero))


def _range(values: Sequence[float], highest: float | None, from_zero: bool) -> tuple[float, float]:
    """Limits of an axis with a little room around the values; highest: instead of the largest of them."""
    low, high = min(values, default=0.0), max(values, default=1.0) if highest is None else highest
    near = low > 0.6 * high if low > 0 else high < 0.6 * low
    if from_zero or not near or high - low < 1e-6 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.08 * (high - low) or 1.0
    return low - room if low else 0.0, high + room if high or not low else 0.0


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between two limits."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(draw, axes: Axes, count: int = 6) -> None:
    for value in ticks(*axes.y, count):
        start, end = axes.place((axes.x[0], value)), axes.place((axes.x[1], value))
        draw.line([start, end], fill=COLOURS["grid"])
        draw.text((start[0] - 8, start[1]), f"{value:.4g}", fill="#555555", anchor="rm", font_size=15)
    for value in ticks(*axes.x, count):
        x, y = axes.place((value, axes.y[0]))
        draw.text((x, y + 10), f"{value:.0f}", fill="#555555", anchor="mt", font_size=15)


def _line(draw, axes: Axes, points: Sequence[Point], colour: str, width: int) -> None:
    placed = [axes.place((x, min(y, axes.y[1]))) for x, y in points]
    if len(placed) > 1:
        draw.line(placed, fill=colour, width=width, joint="curve")
    elif placed:
        (x, y), r = placed[0], width + 1
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _legend(draw, name: str, what: str, curve: list[Point], validation: list[Point]) -> None:
    draw.text((MARGIN[0], 12), name, fill="black", font_size=20)
    entries = [(f"{what}, smoothed", curve, "smoothed"), ("validation", validation, "validation")]
    right = WIDTH - MARGIN[2]
    for title, points, key in reversed([entry for entry in entries if entry[1]]):
        text = f"{title} {points[-1][1]:.4f}"
        draw.text((right, 14), text, fill=COLOURS[key], anchor="rt", font_size=16)
        right -= draw.textlength(text, font_size=16) + 24
