"""The guard of a reward tuning: a loss of diversity ends the run, and the guard chooses which weights are the result.

A reward can rise without end while the pictures of a prompt become all the same, which no reward shows. So the guard
measures the same pictures at every check: fixed prompts from fixed noise (see `guard_pictures`), scored by every
reward, also by those that are not trained on. Nothing here draws random numbers or computes on tensors: a decision
depends on the measurements alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config.guard import GuardRule
from ..rewards.scale import RunningScale

FILE_NAMES = {"first_step_below": "fell_at"}
"""Fields that saved runs hold under another name."""
MIN_DIVERSITY = 1e-6
"""Below it pictures count as equal: what fp32 rounding leaves of the spread of equal pictures."""


@dataclass(frozen=True)
class GuardMeasurement:
    """The measurement of one check.

    Attributes:
        raw: term of the reward -> score of every picture.
        shaped: term -> the part of each score that is maximised, before weight and scale (see `Term`).
        variety: "diversity", which the rule is about, and further figures of how different the pictures are.
    """

    raw: Mapping[str, Sequence[float]]
    shaped: Mapping[str, Sequence[float]]
    variety: Mapping[str, float]

    def means(self) -> dict[str, float]:
        """Mean raw score of each term."""
        return {name: _mean(scores) for name, scores in self.raw.items()}


@dataclass
class GuardState:
    """State that a guard passes from check to check; plain numbers, which JSON holds exactly.

    Attributes:
        start: figures of the first check.
        scales: scale of each term, fixed at the first check.
        share: diversity at the last check, as a share of the start's.
        best: highest reward of a check that the rule allows.
        best_step: the step of that check.
        first_step_below: the first step whose check was below the floor.
    """

    start: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    share: float = 1.0
    best: float | None = None
    best_step: int | None = None
    first_step_below: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The state under the names that files have."""
        return {FILE_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GuardState:
        """The state that `to_json` returned."""
        fields = {in_file: name for name, in_file in FILE_NAMES.items()}
        return cls(**{fields.get(name, name): value for name, value in values.items()})


class Guard:
    """Checks diversity during a run and remembers the best step.

    Its reward is the weighted sum of the terms' means, as in training, but with the scales of the first check
    (`RunningScale` over its pictures): those of training move, so checks could not be compared.

    Args:
        rule: the floor, and the action below it.
        measure: draws pictures and measures them.
        weights: term -> its weight, 0 for one that is held out.
        priors: term -> its typical scale.
    """

    def __init__(
        self,
        rule: GuardRule,
        measure: Callable[[], GuardMeasurement],
        weights: Mapping[str, float],
        priors: Mapping[str, float],
    ):
        self.rule, self.measure, self._weights, self._priors = rule, measure, weights, priors
        self.state = GuardState()

    @property
    def should_stop(self) -> bool:
        """Whether the last check ends the run."""
        return self.rule.should_stop(self.state.share)

    def update(self, step: int, measurement: GuardMeasurement) -> dict[str, Any]:
        """Records a check; `state.best_step` is then `step` if it is the best so far.

        Returns:
            The check's row for metrics.jsonl. "shares": the figures of variety as shares of the start's. "gains": how
            much each score is above the start's, in the term's scale.

        Raises:
            ValueError: the pictures are equal at the start, so there is no diversity to compare with.
        """
        if not self.state.start:
            self._begin(measurement)
        state, means, start = self.state, measurement.means(), self.state.start
        reward = self._reward(measurement)
        shares = {name: value / start[name] for name, value in measurement.variety.items()}
        gains = {name: (means[name] - start[name]) / state.scales[name] for name in means}
        self._decide(step, reward, shares["diversity"])
        return {
            "event": "guard",
            "step": step,
            "reward": reward,
            **means,
            **measurement.variety,
            "shares": shares,
            "gains": {"reward": reward - start["reward"], **gains},
            "held_out": [name for name, weight in self._weights.items() if not weight],
            "floor": self.rule.floor,
            "best_step": state.best_step,
        }

    def _decide(self, step: int, reward: float, share: float) -> None:
        """Updates share, best step and the first step below the floor."""
        state = self.state
        state.share = share
        if not self.rule.allows(share):
            state.first_step_below = step if state.first_step_below is None else state.first_step_below
        elif state.best is None or reward > state.best:
            state.best, state.best_step = reward, step

    def warning(self, step: int) -> str:
        """A message for a last check below the floor; "" for one that the rule allows."""
        if self.rule.allows(self.state.share):
            return ""
        measured = f"diversity at step {step} is {100 * self.state.share:.0f} % of the start's"
        return f"{measured}, below {100 * self.rule.floor:g} %; {'stopping' if self.should_stop else 'going on'}"

    def ending(self) -> dict[str, Any]:
        """The guard's part of status.json; `outcome.describe_guard` is its text."""
        state = self.state
        return {
            "floor": self.rule.floor,
            "share": state.share,
            "fell_at": state.first_step_below,
            "stopped": self.should_stop,
        }

    def _begin(self, measurement: GuardMeasurement) -> None:
        """Records the first check, which all others are compared with."""
        if not measurement.variety["diversity"] > MIN_DIVERSITY:
            raise ValueError(
                f"diversity of the guard's pictures is {measurement.variety['diversity']:.2g} at the start; expected "
                f"more than {MIN_DIVERSITY:g}. The model draws one picture whatever the noise: raise sampling_steps, "
                "or set guard_diversity to 0."
            )
        for name, scores in measurement.raw.items():
            scale = RunningScale(self._priors[name])
            scale.update(scores)
            self.state.scales[name] = scale.scale
        self.state.start = {"reward": self._reward(measurement), **measurement.means(), **measurement.variety}

    def _reward(self, measurement: GuardMeasurement) -> float:
        shaped, scales = measurement.shaped, self.state.scales
        return math.fsum(weight * _mean(shaped[name]) / scales[name] for name, weight in self._weights.items())


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)
