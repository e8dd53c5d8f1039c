"""Parameters of networks: addressed by their modules, checked for completeness, and frozen for a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterRef:
    """One parameter of a network by its module and attribute, which stay valid when the Parameter is replaced."""

    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        return self.owner._parameters[self.attribute]


def parameter_refs(module: nn.Module, prefix: str = "") -> dict[str, ParameterRef]:
    """Every parameter of a module tree as prefix + dotted name -> ParameterRef."""
    refs = {}
    for path, owner in module.named_modules():
        for attribute, value in owner._parameters.items():
            if value is not None:
                refs[prefix + (f"{path}.{attribute}" if path else attribute)] = ParameterRef(owner, attribute)
    return refs


def expect_tensors(state: Mapping[str, Tensor], names: Iterable[str], owner: str) -> None:
    """Raises ValueError unless the state dict has all of these names; `owner` names the network in its message."""
    missing = set(names) - state.keys()
    if missing:
        raise ValueError(f"{owner} lacks {len(missing)} tensors such as {min(missing)!r}.")


def fill(network: nn.Module, state: Mapping[str, Tensor], owner: str) -> None:
    """Fills a network that was made on the meta device with a complete state dict, in fp32.

    Shapes are compared before anything is stored, so a wrong file costs no memory.

    Args:
        network: the network, of the names and shapes that are expected.
        state: name -> tensor.
        owner: names the network in messages.

    Raises:
        ValueError: names or shapes differ, or a tensor holds NaN, infinity or whole numbers.
    """
    expected = network.state_dict()
    expect_tensors(state, expected, owner)
    for name, tensor in state.items():
        if name not in expected:
            raise ValueError(f"{owner} has a tensor {name!r}; expected only those of its kind. It is of another model.")
        if tensor.shape != expected[name].shape:
            shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{owner} has {name} of shape {shape}; expected {wanted}. It is of another model.")
        if not tensor.is_floating_point() or not tensor.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{owner} has {name} with NaN, infinity or whole numbers; expected finite numbers.")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)


def frozen(networks: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """While entered, no parameter of these module trees requires a gradient."""
    return gradients_required(networks, False)


@contextmanager
def gradients_required(networks: Iterable[nn.Module], required: bool) -> Iterator[None]:
    """While entered, all parameters of these module trees require a gradient, or none does."""
    changed = [p for network in networks for p in network.parameters() if p.requires_grad != required]
    try:
        for parameter in changed:
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not required)
