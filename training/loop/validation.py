"""What validation decides: which weights are the best so far, and whether the run stops early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.training_settings import TrainingSettings


@dataclass
class ValidationRecord:
    """best: lowest validation loss so far. stale: number of validations in a row that brought no lower one."""

    best: float = math.inf
    stale: int = 0

    def improves(self, loss: float) -> bool:
        return loss < self.best

    def update(self, loss: float) -> None:
        """Counts a validation."""
        self.stale = 0 if self.improves(loss) else self.stale + 1
        self.best = min(self.best, loss) if not math.isnan(loss) else self.best

    def state_dict(self) -> dict[str, Any]:
        """The record as JSON."""
        return {"best": self.best if math.isfinite(self.best) else None, "stale": self.stale}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ValidationRecord:
        """The record that `state_dict` returned; states of early versions have no `stale`."""
        return cls(math.inf if state["best"] is None else state["best"], state.get("stale", 0))


def check_held_out(held_out: list, settings: TrainingSettings) -> None:
    """Raises ValueError when settings need a validation loss and no held-out image gives one."""
    if not held_out and (settings.early_stop_after or settings.result == "best"):
        raise ValueError(
            "number of held-out images is 0; expected some with early_stop_after or result 'best'. Raise "
            "validation_fraction."
        )
