"""A run's curves as a picture: raw and smoothed loss, validation loss, and small panels with further figures.

Panels appear for what was measured: how much the text is used and the held-out loss per range of noise levels (see
`evaluation`), the alignment of sample pictures with their prompts, the learning rate. A reward tuning shows its reward,
which rises, in place of the loss, a panel for every term of it, and two for what its guard measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .canvas import AXIS, GRID, PAGE, Axes, Box, Canvas, Point, Range, ticks

WIDTH, HEIGHT, MARGIN = 960, 540, (76, 48, 24, 44)
"""Margins: left, top, right, bottom."""
PANEL, GAP = 210, 90
"""Height of the lower panels, and the space between the two of a row."""
COLOURS = {
    "loss": "#c9d6ea",
    "smoothed": "#2457a6",
    "validation": "#d1622b",
    "grid": GRID,
    "text gap": "#2b8a5a",
    "alignment": "#7a4fb0",
    "diversity": "#0f7f8c",
    "floor": "#b5282e",
}
BANDS = ("#fbb862", "#ef7f4d", "#cf4a5f", "#93307a", "#3f1d71")
"""Noise levels from nearly clean to nearly pure noise."""
MAIN: Box = (MARGIN[0], MARGIN[1], WIDTH - MARGIN[2], HEIGHT - MARGIN[3])

Row = dict[str, Any]
"""One row of a run's metrics: a training step, or an event such as a validation."""


def smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without start-up bias (Kingma & Ba 2015, arXiv 1412.6980, section 3)."""
    average, result = 0.0, []
    for number, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**number))
    return result


def run_chart(name: str, rows: list[Row], rates: bool = False) -> Tensor:
    """The chart (HEIGHT, WIDTH, 3) in 0..1 of a run's metrics; a run without steps has empty axes.

    Args:
        name: the run's, as a title.
        rows: its metrics so far.
        rates: whether a panel shows the learning rate.

    Returns:
        The picture, PANEL higher for every two panels.
    """
    steps = [row for row in rows if "event" not in row]
    quantity = "reward" if steps and "reward" in steps[-1] else "loss"
    sign = -1.0 if quantity == "reward" else 1.0  # the loss of a reward tuning is minus its reward
    raw, curve = points(steps, quantity), smooth_points(steps, quantity)
    validation = [(step, sign * loss) for step, loss in points(events(rows, "validation"), "loss")]
    panels = _panels(rows, steps, rates)
    canvas = Canvas(WIDTH, HEIGHT + PANEL * math.ceil(len(panels) / 2), PAGE)
    axes = limits(raw, curve + validation, from_zero=quantity == "loss")
    _grid(canvas, axes)
    canvas.curve(axes, raw, COLOURS["loss"], 1)
    canvas.curve(axes, curve, COLOURS["smoothed"], 3)
    canvas.curve(axes, validation, COLOURS["validation"], 3)
    _legend(canvas, name, {(f"{quantity}, smoothed", "smoothed"): curve, ("validation", "validation"): validation})
    for number, panel in enumerate(panels):
        _draw_panel(canvas, axes.x, panel, number)
    return canvas.tensor()


def events(rows: list[Row], event: str) -> list[Row]:
    """The rows of one kind of event."""
    return [row for row in rows if row.get("event") == event]


def points(rows: list[Row], key: str) -> list[Point]:
    """(step, value) of the rows that have the value."""
    return [(row["step"], row[key]) for row in rows if key in row]


def smooth_points(rows: list[Row], key: str, weight: float = 0.95) -> list[Point]:
    """As `points`, the values smoothed."""
    raw = points(rows, key)
    return list(zip([step for step, _ in raw], smoothed([value for _, value in raw], weight), strict=True))


def limits(raw: Sequence[Point], smooth: Sequence[Point], from_zero: bool = True) -> Axes:
    """Axes from step 0 to the last; y holds the smooth curves and nearly all raw values; from_zero: see `_range`."""
    values = sorted(value for _, value in raw)
    held = [value for _, value in smooth] + values[: max(1, int(0.98 * len(values)))]
    return Axes((0.0, max([step for step, _ in raw], default=1) or 1), _range(held, None, from_zero), MAIN)


def _range(values: Sequence[float], highest: float | None, from_zero: bool) -> Range:
    """Limits of an axis with a margin of 8 %; highest: used instead of the largest value.

    The axis begins at 0, or a margin below the lowest negative value. Without from_zero, not where all values are far
    from 0 and near each other, such as scores of 20 to 22.
    """
    low, high = min(values, default=0.0), max(values, default=1.0) if highest is None else highest
    near = low > 0.6 * high if low > 0 else high < 0.6 * low
    if from_zero or not near or high - low < 1e-6 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.08 * (high - low) or 1.0
    return low - margin if low else 0.0, high + margin if high or not low else 0.0


@dataclass(frozen=True)
class _Panel:
    """A small plot: coloured lines, a title, and labels in the lines' colours after it; from_zero: as in `limits`."""

    title: str
    lines: list[tuple[list[Point], str]]
    legend: tuple[str, ...] = ()
    highest: float | None = None
    from_zero: bool = True


def _panels(rows: list[Row], steps: list[Row], rates: bool) -> list[_Panel]:
    validations = [row for row in events(rows, "validation") if "bands" in row]
    panels = [*_text_gap_panel(validations), *_band_panel(validations), *_alignment_panel(events(rows, "sample"))]
    if steps and "reward" in steps[-1]:
        panels += _term_panels(steps)
    return panels + (_rate_panel(steps) if rates else []) + _guard_panels(events(rows, "guard"))


def _text_gap_panel(validations: list[Row]) -> list[_Panel]:
    gap = points(validations, "text_gap")
    if not gap:
        return []
    title = f"text gap {gap[-1][1]:.4f} (loss with shuffled captions minus loss)"
    return [_Panel(title, [(gap, COLOURS["text gap"])])]


def _band_panel(validations: list[Row]) -> list[_Panel]:
    """Held-out loss in each range of noise levels."""
    if not validations:
        return []
    count = min(len(row["bands"]) for row in validations)
    lines = [[(row["step"], row["bands"][band]) for row in validations] for band in range(count)]
    colours = [BANDS[round(band * (len(BANDS) - 1) / max(1, count - 1))] for band in range(count)]
    legend = tuple(f"{100 * (band + 1) // count} %" for band in range(count))
    return [_Panel("held-out loss, noise level:", list(zip(lines, colours, strict=True)), legend)]


def _alignment_panel(samples: list[Row]) -> list[_Panel]:
    aligned = points(samples, "alignment")
    if not aligned:
        return []
    title = f"alignment {aligned[-1][1]:.2f} (share of the samples read back right)"
    return [_Panel(title, [(aligned, COLOURS["alignment"])], highest=1.0)]


def _term_panels(steps: list[Row]) -> list[_Panel]:
    """The raw scores of each term of a reward, smoothed."""
    panels = []
    for name in [key for key in steps[-1] if f"{key} normalised" in steps[-1]]:
        curve = smooth_points(steps, name, 0.9)
        title = f"{name} {curve[-1][1]:.4g} (raw scores, smoothed)"
        panels.append(_Panel(title, [(curve, COLOURS["smoothed"])], from_zero=False))
    return panels


def _rate_panel(steps: list[Row]) -> list[_Panel]:
    rates = points(steps, "learning_rate")
    return [_Panel(f"learning rate {rates[-1][1]:.3g}", [(rates, COLOURS["smoothed"])])] if rates else []


def _guard_panels(checks: list[Row]) -> list[_Panel]:
    """Gains of the reward and of held-out terms on the guard's pictures, with a dot at the best step; and the remaining
    diversity of the pictures, with the share at which the guard intervenes."""
    if not checks:
        return []
    last, held_out = checks[-1], checks[-1]["held_out"][: len(BANDS)]
    gains = {name: [(row["step"], row["gains"][name]) for row in checks] for name in ("reward", *held_out)}
    best = [point for point in gains["reward"] if point[0] == last["best_step"]]
    colours = [COLOURS["smoothed"], *BANDS[: len(held_out)]]
    lines = [*zip(gains.values(), colours, strict=True), (best, COLOURS["smoothed"])]
    shares = [(row["step"], row["shares"]["diversity"]) for row in checks]
    floor = [(shares[0][0], last["floor"]), (shares[-1][0], last["floor"])]
    title = f"guard: diversity {100 * shares[-1][1]:.0f} % of the start's,"
    label = f"at least {100 * last['floor']:.0f} %"
    return [
        _Panel("guard: gain in std,", lines, tuple(gains)),
        _Panel(title, [(floor, COLOURS["floor"]), (shares, COLOURS["diversity"])], (label,)),
    ]


def _draw_panel(canvas: Canvas, steps: Range, panel: _Panel, number: int) -> None:
    """Draws the panel of this number (from 0), two in a row below the main plot, over the same steps."""
    left, _, right, _ = MAIN
    width, row = (right - left - GAP) / 2, HEIGHT + PANEL * (number // 2)
    left += (width + GAP) * (number % 2)
    box = (left, row + 24, left + width, row + PANEL - MARGIN[3])
    values = [value for line, _ in panel.lines for _, value in line]
    axes = Axes(steps, _range(values, panel.highest, panel.from_zero), box)
    _grid(canvas, axes, 3)
    for line, colour in panel.lines:
        canvas.curve(axes, line, colour, 2)
    labels = [(panel.title, AXIS), *zip(panel.legend, [colour for _, colour in panel.lines], strict=False)]
    for text, colour in labels:
        left += canvas.text((left, box[1] - 8), f"{text} ", colour, anchor="ls", size=14)


def _grid(canvas: Canvas, axes: Axes, count: int = 6) -> None:
    canvas.y_grid(axes, ticks(*axes.y, count))
    canvas.x_labels(axes, ticks(*axes.x, count), ".0f")


def _legend(canvas: Canvas, name: str, curves: dict[tuple[str, str], list[Point]]) -> None:
    """The run's name on the left, and on the right the title of each curve that has points, with its last value."""
    canvas.text((MARGIN[0], 12), name, "black", size=20)
    right = WIDTH - MARGIN[2]
    for (title, key), curve in reversed(curves.items()):
        if curve:
            right -= canvas.text((right, 14), f"{title} {curve[-1][1]:.4f}", COLOURS[key], anchor="rt", size=16) + 24
