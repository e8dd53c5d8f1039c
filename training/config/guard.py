"""When a loss of diversity ends a reward tuning, and which weights are then its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ACTIONS = ("stop", "keep best")


@dataclass(frozen=True)
class GuardRule:
    """The diversity that a reward tuning must not lose, and what happens below it.

    Attributes:
        floor: the lowest diversity allowed, as a share of the start's, above 0 to 1.
        action: "stop" ends a run at the first check below the floor, with the best weights until then; "keep best"
            continues it, and the best weights of all checks at or above the floor are the result, also where no check
            was below.
    """

    floor: float
    action: Literal[ACTIONS] = "stop"  # type: ignore[valid-type]

    def allows(self, share: float) -> bool:
        return share >= self.floor

    def should_stop(self, share: float) -> bool:
        """Whether a check with this diversity ends the run."""
        return self.action == "stop" and not self.allows(share)

    def chooses(self, stopped: bool) -> bool:
        """Whether the result is the guard's choice, where the guard ended the run (`stopped`) or did not."""
        return stopped or self.action == "keep best"
