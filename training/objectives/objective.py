"""The protocol of an objective, and the loss that it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes:
        per_sample: (B,) differentiable, already weighted.
        parts: further figures to log, tensors of one number each: the host reads them together with the loss.
        observed: (K, B) numbers that the objective wants on the host; read with the loss and given to its `observe`.
    """

    per_sample: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    observed: Tensor | None = None


class Objective(Protocol):
    """A loss to minimise."""

    def load(self, slots: list) -> list:
        """Reads and encodes the data of slots. The trained weights are not attached, so models may move here."""
        ...

    def __call__(self, batch: list[tuple[int, Any]], step: int) -> Loss:
        """The loss of (index, loaded slot) pairs, where index numbers the sample within optimizer step `step`."""
        ...

    def rehearsal(self, sample: Any, count: int, parameters: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
        """The parts of a step that hold the most memory, to be run on tensors without values (`loop.estimate`).

        Called while the trained weights are attached.

        Args:
            sample: the loaded slot that takes the most memory.
            count: samples of a batch.
            parameters: what trains.

        Returns:
            Part -> a function that does its work and returns what stays; "activations" computes the gradient.
        """
        ...

    def observe(self, values: list[list[list[float]]]) -> None:
        """Gets the (K, B) `observed` numbers of a step's batches, before the weights change.

        Called only where the losses have some. Raises ValueError for numbers that must end the run.
        """
        ...

    def validation(self, loaded: list) -> float:
        """The loss of loaded held-out slots; draws from no global random state."""
        ...

    def state(self) -> dict[str, Any]:
        """State that one step passes to the next, as JSON; empty where there is none."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        ...
