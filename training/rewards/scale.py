"""The running scale of one reward's scores, by which rewards of different size become comparable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

PRIOR_COUNT = 16
"""Scores that the typical scale counts as, so that the first batches, or a batch of equal scores, divide by no zero."""


@dataclass
class RunningScale:
    """Standard deviation over all scores so far, beginning at `prior`:

        s = sqrt((PRIOR_COUNT prior^2 + sum (r_i - mean)^2) / (PRIOR_COUNT + count))

    mean and sum of squares are updated score by score (Welford 1962), in float64. Nothing is forgotten: a moving window
    would shrink as the images of a tuned model grow alike, and so raise the step just when they collapse.
    """

    prior: float
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.prior) and self.prior > 0):
            raise ValueError(f"the typical scale of a reward is {self.prior}; expected a positive number.")

    @property
    def scale(self) -> float:
        return math.sqrt((PRIOR_COUNT * self.prior**2 + self.squares) / (PRIOR_COUNT + self.count))

    def update(self, scores: Iterable[float]) -> None:
        for score in scores:
            self.count += 1
            before = score - self.mean
            self.mean += before / self.count
            self.squares += before * (score - self.mean)

    def state(self) -> dict[str, float]:
        """Numbers that JSON keeps exactly."""
        return asdict(self)
