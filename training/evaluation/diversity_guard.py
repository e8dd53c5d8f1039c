"""The guard of a tuning: when a loss of diversity ends it, and which of its weights are the result.

A reward can rise for ever while the pictures of a prompt grow alike, and never shows it. So the guard looks at the same
pictures again and again: fixed prompts from fixed noise (see `guard_pictures`), scored by every reward, those that are
never trained on included. Nothing here draws or counts on tensors: a guard's word is a function of what was seen.
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
"""Diversity that is none: what fp32 leaves of the spread of equal pictures."""


@dataclass(frozen=True)
class GuardMeasurement:
    """One look at the pictures. raw, shaped: by term of the reward, every picture's score, and its share in what is
    maximised before weight and scale (see `Term`). variety: "diversity", which the rule is about, and further figures
    of how different the pictures are."""

    raw: Mapping[str, Sequence[float]]
    shaped: Mapping[str, Sequence[float]]
    variety: Mapping[str, float]


@dataclass
class GuardState:
    """What a guard remembers from check to check; plain numbers, which JSON keeps exactly.

    start: figures of the first check. scales: each term's scale, fixed there. share: diversity at the last check, as a
    share of the start's. best: highest reward of a check that the rule allows, found at best_step. fell_at: the first
    step of a check below the floor.
    """

    start: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    share: float = 1.0
    best: float | None = None
    best_step: int | None = None
    first_step_below: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What a saved state keeps of it."""
        return {FILE_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GuardState:
        """The state that `to_json` gave."""
        fields = {name: name for name in values} | {kept: name for name, kept in FILE_NAMES.items()}
        return cls(**{fields[name]: value for name, value in values.items()})


class Guard:
    """look: draws and measures. weights, priors: each term's weight, 0 for one that is held out, and typical scale.

    The guard's reward is the weighted sum of the terms' means, as in training, but with scales that stay what the first
    check gave (`RunningScale` over its pictures): those of training move, and would make checks incomparable.
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

    def update(self, step: int, seen: GuardMeasurement) -> dict[str, Any]:
        """Takes a check in and returns its row for metrics.jsonl; `state.best_step` is then `step` if it is the best.

        shares: the figures of variety as shares of the start's. gains: how much each score is above the start's, in the
        term's scale. Errors: ValueError for pictures that are alike at the start, of which no share can be taken.
        """
        if not self.state.start:
            self._begin(seen)
        state, means = self.state, {name: _mean(scores) for name, scores in seen.raw.items()}
        reward, start = self._reward(seen), state.start
        shares = {name: value / start[name] for name, value in seen.variety.items()}
        gains = {name: (means[name] - start[name]) / state.scales[name] for name in means}
        state.share = shares["diversity"]
        if not self.rule.allows(state.share):
            state.first_step_below = step if state.first_step_below is None else state.first_step_below
        elif state.best is None or reward > state.best:
            state.best, state.best_step = reward, step
        return {
            "event": "guard",
            "step": step,
            "reward": reward,
            **means,
            **seen.variety,
            "shares": shares,
            "gains": {"reward": reward - start["reward"], **gains},
            "held_out": [name for name, weight in self._weights.items() if not weight],
            "floor": self.rule.floor,
            "best_step": state.best_step,
        }

    def warning(self, step: int) -> str:
        """What to say of the check just taken, where it found too little; else ""."""
        if self.rule.allows(self.state.share):
            return ""
        found = f"diversity at step {step} is {100 * self.state.share:.0f} % of the start's"
        return f"{found}, below {100 * self.rule.floor:g} %; {'stopping' if self.should_stop else 'going on'}"

    def ending(self) -> dict[str, Any]:
        """What status.json says of the guard: `ending.guard_words` puts it into words."""
        state = self.state
        return {
            "floor": self.rule.floor,
            "share": state.share,
            "fell_at": state.first_step_below,
            "stopped": self.should_stop,
        }

    def _begin(self, seen: GuardMeasurement) -> None:
        if not seen.variety["diversity"] > MIN_DIVERSITY:
            raise ValueError(
                f"diversity of the guard's pictures is {seen.variety['diversity']:.2g} at the start; expected more "
                f"than {MIN_DIVERSITY:g}. The model draws one picture whatever the noise: raise sampling_steps, or set "
                "guard_diversity to 0."
            )
        for name, scores in seen.raw.items():
            scale = RunningScale(self._priors[name])
            scale.update(scores)
            self.state.scales[name] = scale.scale
        means = {name: _mean(scores) for name, scores in seen.raw.items()}
        self.state.start = {"reward": self._reward(seen), **means, **seen.variety}

    def _reward(self, seen: GuardMeasurement) -> float:
        parts = (weight * _mean(seen.shaped[name]) / self.state.scales[name] for name, weight in self._weights.items())
        return math.fsum(parts)


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)
