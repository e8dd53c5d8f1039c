"""Scores of a set of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from .combined import CombinedReward

BATCH = 8


@dataclass(frozen=True)
class ScoreTable:
    """Scores of images, in the images' order."""

    name: str
    """Of the reward, or of all joined."""
    scores: tuple[float, ...]
    terms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Raw scores by reward, where there are several."""

    @property
    def mean(self) -> float:
        return math.fsum(self.scores) / len(self.scores)

    @property
    def std(self) -> float:
        """Over the images, without Bessel's correction: 0 for one image."""
        return _std(self.scores)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: scores, mean, std and reward; for several rewards also `terms`, with the first three of each."""
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
    """Scores a set of images.

    Args:
        reward: of one term, for its raw scores, or of several, for their totals and, as `terms`, their raw scores.
        images: (3, H, W) in 0..1, of any sizes; may be an iterator that loads them.
        prompts: one for each image.
        progress: called with the number of images done and of all.

    Raises:
        ValueError: there are no images or another number of prompts; also as `Reward.scores`.
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
    """Batches of at most BATCH consecutive images of one size."""
    for _, run in groupby(images, key=lambda image: image.shape):
        while batch := list(islice(run, BATCH)):
            yield batch


def _std(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
