"""The running scale of a reward's scores, which makes rewards of different ranges comparable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

PRIOR_COUNT = 16
"""Weight of the prior in scores, so that the first batches, or equal scores, have a scale above 0."""


@dataclass
class RunningScale:
    """Standard deviation over all scores so far, starting at `prior`:

        s = sqrt((PRIOR_COUNT prior^2 + sum (r_i - mean)^2) / (PRIOR_COUNT + count))

    mean and sum of squares are updated score by score (Welford 1962), in float64. All scores
    count: the scale of a moving window would shrink as the images of a tuned model become similar, and so raise the
    step just when they collapse.
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
            delta = score - self.mean
            self.mean += delta / self.count
            self.squares += delta * (score - self.mean)

    def state(self) -> dict[str, float]:
        """The fields for a run's state, exact in JSON."""
        return asdict(self)
