"""Parameters of live networks: addressed by their owners, and frozen for a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterRef:
    """One parameter of a live network, addressed by its owner so that a replaced Parameter object is found again."""

    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        return self.owner._parameters[self.attribute]


def parameter_refs(module: nn.Module, prefix: str = "") -> dict[str, ParameterRef]:
    """Every parameter of a module tree as prefix + dotted name -> Target."""
    found = {}
    for path, owner in module.named_modules():
        for attribute, value in owner._parameters.items():
            if value is not None:
                found[prefix + (f"{path}.{attribute}" if path else attribute)] = ParameterRef(owner, attribute)
    return found


@contextmanager
def frozen(networks: Iterable[nn.Module]) -> Iterator[None]:
    """While entered, no parameter of these module trees wants a gradient."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
