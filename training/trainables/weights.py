"""Master weights that take the place of a network's own for a step.

The network's own parameters are never written, so a base model is bit-identical after any run. Masters are swapped
into `module._parameters` (as torch.func.functional_call does), which leaves the module tree alone and works with
backward and with activation checkpointing as long as both happen inside `attach()`. They stay fp32, or bf16 where asked
for (`loop.rounding`), among frozen weights of another dtype; the network casts per operation (autocast,
`models.recast`, or ComfyUI's own casting).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..models.parameters import ParameterRef
from ..models.stored import exact
from .base import SwappedTrainable, Trainable


@contextmanager
def swapped(refs: Mapping[str, ParameterRef], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While entered, tensors of the same names stand in the place of parameters, on their devices."""
    originals = {name: ref.tensor for name, ref in refs.items()}
    replacements = {name: tensors[name].to(original.device) for name, original in originals.items()}
    try:
        put(refs, replacements)
        yield
    finally:
        put(refs, originals)


def put(refs: Mapping[str, ParameterRef], tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of the parameters of the same names."""
    for name, tensor in tensors.items():
        ref = refs[name]
        ref.owner._parameters[ref.attribute] = tensor


class SelectedWeights(SwappedTrainable):
    """Chosen parameters of one or more networks, as masters under canonical names.

    Args:
        selected: canonical name -> the parameter in its network.
        networks: roots that are frozen while mounted.
        bf16: names of those whose masters are bf16; biases and norms, which are few numbers, stay fp32 all the same.

    Raises:
        ValueError: nothing is selected.
    """

    def __init__(
        self, selected: Mapping[str, ParameterRef], networks: list[nn.Module], bf16: Container[str] = frozenset()
    ):
        if not selected:
            raise ValueError("selection of weights to train is empty; expected at least one. Choose other layers.")
        self._refs = dict(selected)
        super().__init__({name: _master(ref.tensor, name in bf16) for name, ref in selected.items()}, networks)

    def _current(self) -> dict[str, Tensor]:
        return {name: ref.tensor for name, ref in self._refs.items()}

    def _replacements(self, values: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name].to(original.device) for name, original in originals.items()}

    def _swap(self, tensors: Mapping[str, Tensor]) -> None:
        put(self._refs, tensors)


def _master(weight: Tensor, bf16: bool) -> nn.Parameter:
    value = exact(weight.detach()).clone()
    return nn.Parameter(value.to(torch.bfloat16) if bf16 and value.ndim > 1 else value)


class TrainableGroup(Trainable):
    """Several trainables in one run, their names all different.

    All their networks are frozen before any part takes effect: the masters of one may be parameters of a network of
    another by then.

    Args:
        parts: each with its learning rate as a multiple of the run's.
    """

    def __init__(self, *parts: tuple[Trainable, float]):
        self._rates = [rate for _, rate in parts]
        self._parts = [part for part, _ in parts]
        self._owners = {name: i for i, part in enumerate(self._parts) for name in part.parameters}
        parameters = {name: value for part in self._parts for name, value in part.parameters.items()}
        super().__init__(parameters, [network for part in self._parts for network in part.networks])
        self.shards = {name: shard for part in self._parts for name, shard in part.shards.items()}
        self.gathered_bytes = sum(part.gathered_bytes for part in self._parts)

    def rate(self, name: str) -> float:
        owner = self._owners[name]
        return self._rates[owner] * self._parts[owner].rate(name)

    @contextmanager
    def _mount(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part._mount())
            yield

    @contextmanager
    def _in_effect(self, values: Mapping[str, Tensor] | None, rng_key: tuple[int, ...]) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                of_part = None if values is None else {name: values[name] for name in part.parameters}
                stack.enter_context(part._in_effect(of_part, rng_key))
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.disabled())
            yield
