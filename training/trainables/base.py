"""What every trainable shares: named masters, fp32 unless bf16 is asked for, and how they take effect for a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.parameters import frozen
from ..models.recast import recastable, recasting

if TYPE_CHECKING:
    from .sharded import Shard


class Trainable(ABC):
    """Named masters that `attach` puts in effect on networks.

    Args:
        parameters: masters by name.
        networks: roots whose own parameters are frozen while mounted.

    Attributes:
        shards: masters that are divided among processes; `parameters` has this process's rows of them.
        gathered_bytes: of whole weights and gradients of these that are in memory at a time.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], networks: Sequence[nn.Module]):
        self.parameters = dict(parameters)
        self.networks = list(networks)
        self.shards: Mapping[str, Shard] = {}
        self.gathered_bytes = 0
        self._mounted = False

    def __len__(self) -> int:
        """Number of values that train."""
        return sum(self.shape(name).numel() for name in self.parameters)

    def shape(self, name: str) -> torch.Size:
        """A master's, whole where it is divided among processes."""
        return (self.shards.get(name) or self.parameters[name]).shape

    def values(self) -> dict[str, Tensor]:
        """The masters as plain tensors, without copying."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the masters. Raises ValueError unless names and shapes are exactly theirs."""
        if values.keys() != self.parameters.keys():
            different = sorted(values.keys() ^ self.parameters.keys())
            raise ValueError(f"saved weights differ from the selection in {different[:3]}; expected the same names.")
        for name in self.parameters:
            if values[name].shape != self.shape(name):
                raise ValueError(
                    f"saved {name} is {tuple(values[name].shape)}; expected {tuple(self.shape(name))}. "
                    "It belongs to another model."
                )
        for name, parameter in self.parameters.items():
            parameter.copy_(self.part(name, values[name]))

    def part(self, name: str, value: Tensor) -> Tensor:
        """What this process keeps of a whole tensor that belongs to a master: its rows where that is divided."""
        return self.shards[name].part(value) if name in self.shards else value

    def divided(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the masters' names as tensors of whole shape, those that are divided as DTensors."""
        return {name: self.shards[name].divided(v) if name in self.shards else v for name, v in values.items()}

    def rate(self, name: str) -> float:
        """A parameter's learning rate as a multiple of the run's."""
        return 1.0

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Freezes the networks, and puts on them what `attach` then only switches on; entered once around a run.

        The networks compute as before until `attach`, except that no cast copy of a frozen weight is kept for backward
        (`models.recast`). All of it is taken off on the way out, also after an exception.
        """
        if self._mounted:
            yield
            return
        layers = [layer for network in self.networks for layer in recastable(network)]
        with frozen(self.networks), recasting(layers), self._mount():
            self._mounted = True
            try:
                yield
            finally:
                self._mounted = False

    @contextmanager
    def attach(self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()) -> Iterator[None]:
        """Puts the masters in effect on the networks while entered; everything else there is frozen.

        All of it is restored on the way out, also after an exception. Outside of `mounted` it mounts for itself.

        Args:
            values: tensors of the masters' names in place of them, such as their average; this is then no training,
                and dropout is off.
            rng_key: names the moment of a run, for what is drawn while attached (dropout).
        """
        with self.mounted(), self._in_effect(values, rng_key):
            yield

    def _mount(self) -> AbstractContextManager[None]:
        """Puts on the networks what `_in_effect` switches on; nothing where there is no such thing."""
        return nullcontext()

    @abstractmethod
    def _in_effect(self, values: Mapping[str, Tensor] | None, rng_key: tuple[int, ...]) -> AbstractContextManager[None]:
        """`attach` on networks that are mounted."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """While entered, inside `attach`, the network is as it was before `attach`."""


class SwappedTrainable(Trainable):
    """A trainable whose tensors take the place of others while attached.

    Args:
        parameters: masters by name.
        networks: roots whose own parameters are frozen while mounted.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], networks: Sequence[nn.Module]):
        super().__init__(parameters, networks)
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
    def _in_effect(self, values: Mapping[str, Tensor] | None, rng_key: tuple[int, ...]) -> Iterator[None]:
        originals = self._current()
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
