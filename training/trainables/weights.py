"""What trains: fp32 master weights that are put in effect on a network for a step and taken off again.

The network's own parameters are never written, so a base model is bit-identical after any run. Masters are swapped
into `module._parameters` (as torch.func.functional_call does), which keeps the module tree and works with backward and
with activation checkpointing as long as both happen inside `attach()`. They stay fp32 beside frozen weights of another
dtype; the network casts per operation (autocast, or ComfyUI's own casting).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.parameters import ParameterRef, frozen


class Trainable(Protocol):
    """Named fp32 masters that `attach` puts in effect on a network."""

    parameters: dict[str, nn.Parameter]

    def __len__(self) -> int:
        """How many numbers train."""
        ...

    def values(self) -> dict[str, Tensor]: ...

    def load(self, values: Mapping[str, Tensor]) -> None: ...

    def rate(self, name: str) -> float:
        """A parameter's learning rate as a multiple of the run's."""
        ...

    def attach(
        self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()
    ) -> AbstractContextManager[None]: ...

    def disabled(self) -> AbstractContextManager[None]:
        """While entered, inside `attach`, the network is what it was before."""
        ...


class SelectedWeights:
    """Trainable: chosen parameters of one or more networks, as fp32 masters under canonical names."""

    def __init__(self, selected: Mapping[str, ParameterRef], networks: list[nn.Module]):
        """selected: canonical name -> Target. networks: roots that are frozen while attached."""
        if not selected:
            raise ValueError("selection of weights to train is empty; expected at least one. Choose other layers.")
        self._targets = dict(selected)
        self._networks = networks
        self._originals: dict[str, Tensor] = {}
        self.parameters = {
            name: nn.Parameter(target.tensor.detach().clone().float()) for name, target in selected.items()
        }

    def __len__(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def values(self) -> dict[str, Tensor]:
        """The masters as plain tensors, without copying."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the masters; names and shapes must match exactly."""
        if values.keys() != self.parameters.keys():
            different = sorted(values.keys() ^ self.parameters.keys())
            raise ValueError(f"saved weights differ from the selection in {different[:3]}; expected the same names.")
        for name, parameter in self.parameters.items():
            if values[name].shape != parameter.shape:
                raise ValueError(
                    f"saved {name} is {tuple(values[name].shape)}; expected {tuple(parameter.shape)}. "
                    "It belongs to another model."
                )
            parameter.copy_(values[name])

    def rate(self, name: str) -> float:
        return 1.0

    @contextmanager
    def attach(self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()) -> Iterator[None]:
        """Puts the masters (or other `values` of the same names, such as an average) in effect on the networks.

        draw: names this moment of a run for those kinds that draw something while attached; nothing here does.
        Everything else is frozen meanwhile, and all of it is put back on the way out, also after an exception.
        """
        values = self.parameters if values is None else values
        originals = {name: target.tensor for name, target in self._targets.items()}
        with frozen(self._networks):
            try:
                self._originals = originals
                self._put({name: values[name].to(original.device) for name, original in originals.items()})
                yield
            finally:
                self._originals = {}
                self._put(originals)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While entered, inside `attach`, the networks are what they were before it."""
        attached = {name: target.tensor for name, target in self._targets.items()}
        try:
            self._put(self._originals)
            yield
        finally:
            self._put(attached)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            target = self._targets[name]
            target.owner._parameters[target.attribute] = value


class TrainableGroup:
    """Trainable: several kinds in one run, their names all different.

    parts: each with its learning rate as a multiple of the run's.
    """

    def __init__(self, *parts: tuple[Trainable, float]):
        self._rates = [rate for _, rate in parts]
        self._parts = parts = [part for part, _ in parts]
        self.parameters = {name: value for part in parts for name, value in part.parameters.items()}
        self._owners = {name: i for i, part in enumerate(parts) for name in part.parameters}

    def __len__(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def values(self) -> dict[str, Tensor]:
        """The masters as plain tensors, without copying."""
        return {name: value for part in self._parts for name, value in part.values().items()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the masters; names and shapes must match exactly."""
        for part, own in zip(self._parts, self._shared(values), strict=True):
            part.load(own)

    def rate(self, name: str) -> float:
        owner = self._owners[name]
        return self._rates[owner] * self._parts[owner].rate(name)

    @contextmanager
    def attach(self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()) -> Iterator[None]:
        """Puts all of them in effect; see `SelectedWeights.attach`."""
        shared = [None] * len(self._parts) if values is None else self._shared(values)
        with ExitStack() as stack:
            for part, own in zip(self._parts, shared, strict=True):
                stack.enter_context(part.attach(own, rng_key))
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While entered, inside `attach`, the networks are what they were before it."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.disabled())
            yield

    def _shared(self, values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Each part's own; a name that nobody has goes to the first, which refuses it."""
        shares: list[dict[str, Tensor]] = [{} for _ in self._parts]
        for name, value in values.items():
            shares[self._owners.get(name, 0)][name] = value
        return shares
