"""What every trainable shares: named fp32 masters, and how they are swapped into a network for a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..models.parameters import frozen


class Trainable(ABC):
    """Named fp32 masters that `attach` puts in effect on a network."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)

    def __len__(self) -> int:
        """Number of values that train."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def values(self) -> dict[str, Tensor]:
        """The masters as plain tensors, without copying."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the masters. Raises ValueError unless names and shapes are exactly theirs."""
        if values.keys() != self.parameters.keys():
            different = sorted(values.keys() ^ self.parameters.keys())
            raise ValueError(f"saved weights differ from the selection in {different[:3]}; expected the same names.")
        for name, parameter in self.parameters.items():
            if values[name].shape != parameter.shape:
                raise ValueError(
                    f"saved {name} is {tuple(values[name].shape)}; expected {tuple(parameter.shape)}. "
                    "It belongs to another model."
                )
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def rate(self, name: str) -> float:
        """A parameter's learning rate as a multiple of the run's."""
        return 1.0

    @abstractmethod
    def attach(
        self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()
    ) -> AbstractContextManager[None]:
        """Puts the masters in effect on the network while entered; everything else there is frozen.

        All of it is restored on the way out, also after an exception.

        Args:
            values: tensors of the masters' names in place of them, such as their average; this is then no training,
                and dropout is off.
            rng_key: names the moment of a run, for what is drawn while attached (dropout).
        """

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """While entered, inside `attach`, the network is as it was before `attach`."""


class SwappedTrainable(Trainable):
    """A trainable whose tensors take the place of others while attached.

    Args:
        parameters: masters by name.
        networks: roots whose parameters are frozen while attached.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], networks: Sequence[nn.Module]):
        super().__init__(parameters)
        self._networks = list(networks)
        self._originals: dict[str, Tensor] = {}

    @abstractmethod
    def _current(self) -> dict[str, Tensor]:
        """The tensors that are in effect now, by the masters' names."""

    @abstractmethod
    def _replacements(self, values: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to put in effect for these values of the masters."""

    @abstractmethod
    def _swap(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors in effect."""

    @contextmanager
    def attach(self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()) -> Iterator[None]:
        originals = self._current()
        with frozen(self._networks):
            try:
                self._originals = originals
                self._swap(self._replacements(self.parameters if values is None else values, originals))
                yield
            finally:
                self._originals = {}
                self._swap(originals)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        attached = self._current()
        try:
            self._swap(self._originals)
            yield
        finally:
            self._swap(attached)
