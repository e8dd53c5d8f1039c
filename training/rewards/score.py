"""Scores of a set of images as numbers and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from ..chart import ticks
from .combined import CombinedReward

BATCH = 8
WIDTH, HEIGHT = 720, 480
PLOT = (64, 92, WIDTH - 24, HEIGHT - 84)
"""Left, top, right and bottom of the plot."""
FONT = 24
"""Pixels; the picture is read at half its size in a node."""
BAR, MEAN, AXIS, GRID = "#7f9fce", "#d1622b", "#333333", "#e4e4e4"


@dataclass(frozen=True)
class ScoreTable:
    """Scores of images in their order. terms: raw scores by reward, where there are several."""

    name: str
    scores: tuple[float, ...]
    terms: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return math.fsum(self.scores) / len(self.scores)

    @property
    def std(self) -> float:
        """Over the images, without Bessel's correction: 0 for one image."""
        return _std(self.scores)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: scores, mean, std, reward; for several rewards `terms` with the same of each."""
        result: dict[str, Any] = {"scores": list(self.scores), "mean": self.mean, "std": self.std, "reward": self.name}
        if self.terms:
            tables = {name: ScoreTable(name, scores) for name, scores in self.terms.items()}
            result["terms"] = {n: {"scores": list(t.scores), "mean": t.mean, "std": t.std} for n, t in tables.items()}
        return result


@torch.no_grad()
def score_images(
    reward: CombinedReward,
    images: Iterable[Tensor],
    prompts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreTable:
    """Scores (3, H, W) images in 0..1, of any sizes, image i by prompt i; they may be read as they are asked for.

    A reward alone gives its raw scores; several their weighted sum, each divided by its running scale, and the raw
    ones beside. progress: called with images done and in all. Errors: ValueError as the rewards', for no images, and
    for another number of prompts.
    """
    raw: dict[str, list[float]] = {name: [] for name in reward.terms}
    total: list[float] = []
    for batch in _batches(images):
        done = len(total) + len(batch)
        scores = reward.evaluate(torch.stack(batch), prompts[len(total) : done])
        total += scores.total.tolist()
        for name, values in scores.raw.items():
            raw[name] += values.tolist()
        progress(done, len(prompts))
    if not total or len(total) != len(prompts):
        raise ValueError(f"images are {len(total)} and prompts {len(prompts)}; expected one or more, and as many.")
    terms = {name: tuple(values) for name, values in raw.items()}
    if len(terms) == 1:
        return ScoreTable(reward.name, next(iter(terms.values())))
    return ScoreTable(reward.name, tuple(total), terms)


def _batches(images: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """At most BATCH neighbours of one size."""
    for _, run in groupby(images, key=lambda image: image.shape):
        while batch := list(islice(run, BATCH)):
            yield batch


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


def _std(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
