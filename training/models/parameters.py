"""Parameters of networks: addressed by their modules, checked for completeness, and frozen for a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .stored import exact


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


def assign_weights(
    module: nn.Module, state: Mapping[str, Tensor], owner: str, *, own_dtypes: bool = False
) -> nn.Module:
    """Fills a module made on the meta device with a complete state dict, in fp32 or in the tensors' own dtypes.

    Raises ValueError for missing or unknown names, other shapes, and weights that are not finite; `owner` names the
    network in its message.
    """
    wanted = module.state_dict()
    expect_tensors(state, wanted, owner)
    if unknown := state.keys() - wanted.keys():
        raise ValueError(f"{owner} has {len(unknown)} tensors that such a model lacks, such as {min(unknown)!r}.")
    for name, value in state.items():
        expect_shape(name, value, wanted[name].shape, owner)
    finite = {name: finite_weight(name, value, owner, own_dtype=own_dtypes) for name, value in state.items()}
    module.load_state_dict(finite, assign=True)
    return module


def expect_shape(name: str, value: Tensor, shape: Iterable[int], owner: str) -> None:
    """Raises ValueError unless a weight has this shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{owner}: {name} is {tuple(value.shape)}; expected {tuple(shape)}. It is of another model.")


def finite_weight(name: str, value: Tensor, owner: str, *, own_dtype: bool = False) -> Tensor:
    """A copy of a weight in fp32; or itself in its own dtype, which then may lie in a file until `recast.own_memory`.

    Raises ValueError where it has NaN or infinite values.
    """
    numbers = exact(value)
    expect_finite(name, numbers, owner)
    if own_dtype:
        return value
    return value.clone() if numbers is value else numbers


def expect_finite(name: str, value: Tensor, owner: str) -> None:
    """Raises ValueError where an fp32 weight has NaN or infinite values."""
    if not value.sum().isfinite() and not value.isfinite().all():  # the sum alone is the cheaper pass
        raise ValueError(f"{owner}: {name} has values that are no finite numbers. Download or save the file again.")


def frozen(networks: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """While entered, no parameter of these module trees requires a gradient."""
    return gradients_required(networks, False)


@contextmanager
def copied_to(network: nn.Module, device: torch.device, whole: bool = False) -> Iterator[None]:
    """While entered, copies on a device stand in the place of those parameters that are elsewhere; whole: of all."""
    refs = [ref for ref in parameter_refs(network).values() if whole or ref.tensor.device.type != device.type]
    originals = [ref.tensor for ref in refs]
    try:
        for ref in refs:
            value = ref.tensor.detach().to(device, copy=True)
            ref.owner._parameters[ref.attribute] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for ref, original in zip(refs, originals, strict=True):
            ref.owner._parameters[ref.attribute] = original


@contextmanager
def gradients_required(networks: Iterable[nn.Module], required: bool) -> Iterator[None]:
    """While entered, all parameters of these module trees require a gradient, or none does.

    It holds no parameter, so that one which is replaced meanwhile, as when a model moves, leaves memory.
    """
    refs = [ref for network in networks for ref in parameter_refs(network).values()]
    changed = [ref for ref in refs if ref.tensor.requires_grad != required]
    try:
        for ref in changed:
            ref.tensor.requires_grad_(required)
        yield
    finally:
        for ref in changed:
            ref.tensor.requires_grad_(not required)
