"""The chart that a benchmark leaves: bars of several figures, a line for each variant or stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..training.data.images import save_png
from ..training.plots.bar_chart import bar_chart

BENCH_FOLDER = Path("output") / "bench"
"""Where charts and random weights lie unless a flag says otherwise."""


def save_bars(title: str, names: Sequence[str], panels: Mapping[str, Sequence[float]], path: Path) -> str:
    """Writes `bar_chart(title, names, panels)`; returns where it is, or nothing for a chart without lines."""
    if not names:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(bar_chart(title, names, panels).movedim(-1, 0), path)
    return str(path.resolve())
