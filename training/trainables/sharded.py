"""Trained weights of a network divided among processes: torch's `fully_shard` (FSDP2), block by block.

Each process keeps 1 / N of every master, gradient and optimizer state, as plain tensors: neighbouring rows of a weight.
A block's whole weights are gathered before the block runs, forward and backward, and freed after it; its gradients are
summed over the processes and divided again as soon as they are there. `fully_shard` changes modules for good, so it is
given a copy of the module tree, with the network's own frozen weights; the network itself is never touched, and
evaluates with whole values. ZeRO-3: arXiv 1910.02054; per-block sharding: arXiv 2304.11277.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.blocks import recomputing, units_to_recompute, wrapped
from ..models.parameters import ParameterRef, parameter_refs
from ..models.recast import recastable, recasting
from ..models.stored import exact
from .weights import SelectedWeights, SwappedTrainable, put

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """How a tensor is divided among processes, by rows.

    Attributes:
        like: a tensor that is divided so.
    """

    like: DTensor

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.like.shape

    def part(self, whole: Tensor) -> Tensor:
        """A copy of this process's rows of a whole tensor, on the device of the others: the last process may have less.

        Only these rows are read where the tensor lies in a file.
        """
        mesh = self.like.device_mesh
        rows, rank = -(-len(whole) // mesh.size()), mesh.get_local_rank()
        return whole[rank * rows : (rank + 1) * rows].to(self.like.device, copy=True)

    def divided(self, part: Tensor) -> DTensor:
        """The whole tensor of which `part` is this process's; its `full_tensor()` gathers it."""
        from torch.distributed.tensor import DTensor

        shape = {"shape": self.like.shape, "stride": self.like.stride()}
        return DTensor.from_local(part, self.like.device_mesh, self.like.placements, run_check=False, **shape)

    def is_part(self, tensor: Tensor) -> bool:
        """Whether a tensor that belongs to this one, such as an optimizer's state, is divided as it is."""
        return tensor.dim() > 0 and tensor.shape == self.like.to_local().shape


class ShardedWeights(SelectedWeights):
    """Chosen parameters of a network, whose masters are divided among processes; `parameters` are this process's rows.

    Args:
        selected: canonical name -> the parameter in the network.
        network: trains by its divided copy while attached, and evaluates itself.
        mesh: all processes of the run, in one dimension.
        recompute: whether blocks recompute their activations in the backward pass.
    """

    def __init__(
        self, selected: Mapping[str, ParameterRef], network: nn.Module, mesh: DeviceMesh, recompute: bool = False
    ):
        self._refs, self._network, self._forward = dict(selected), network, network.forward
        self._copy = _sharing_copy(network)
        units = units_to_recompute(self._copy)
        self._recomputed = units if recompute else []
        names, of_copy = {ref: name for name, ref in parameter_refs(network).items()}, parameter_refs(self._copy)
        refs = {name: of_copy[names[ref]] for name, ref in selected.items()}
        *of_units, of_rest = shard(self._copy, units, list(refs.values()), mesh)
        self._divided: dict[str, DTensor] = {name: ref.tensor for name, ref in refs.items()}
        masters = {name: nn.Parameter(divided.detach().to_local()) for name, divided in self._divided.items()}
        SwappedTrainable.__init__(self, masters, [network])
        self.shards = {name: Shard(divided.detach()) for name, divided in self._divided.items()}
        self.gathered_bytes = of_rest + 3 * max(of_units, default=0)  # a block, the one after it, and its gradient

    @contextmanager
    def _mount(self) -> Iterator[None]:
        with recasting(recastable(self._copy)), recomputing(self._recomputed):
            yield

    @contextmanager
    def _in_effect(self, values: Mapping[str, Tensor] | None, rng_key: tuple[int, ...]) -> Iterator[None]:
        if values is not None:
            with super()._in_effect(values, rng_key):
                yield
            return
        try:
            with wrapped([self._network], lambda network, forward: self._copy.__call__):
                yield
        finally:
            self._take_gradients()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._originals:
            with super().disabled():
                yield
            return
        with wrapped([self._network], lambda network, forward: self._forward):
            yield

    def _take_gradients(self) -> None:
        """Adds this process's rows of the summed gradient to the masters'."""
        for name, divided in self._divided.items():
            if divided.grad is None:
                continue
            gradient, parameter = divided.grad.to_local(), self.parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            divided.grad = None


def _sharing_copy(network: nn.Module) -> nn.Module:
    """A copy of a module tree with the same parameters and buffers."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def shard(network: nn.Module, units: Sequence[nn.Module], refs: Iterable[ParameterRef], mesh: DeviceMesh) -> list[int]:
    """Puts fp32 copies of parameters in their places and divides these, one unit after another.

    Gradients are sums over the processes. What is not divided stays as it is.

    Args:
        network: of these parameters; it gathers what lies in no unit itself.
        units: modules whose weights are gathered together.
        refs: the parameters to divide.
        mesh: the processes.

    Returns:
        Bytes of the whole weights of each unit, and of the network's others.
    """
    from torch.distributed.fsdp import fully_shard

    left, sizes = set(refs), []
    for unit in (*units, network):
        modules = set(unit.modules())
        chosen = {ref for ref in left if ref.owner in modules}
        left -= chosen
        ignored = {p for p in unit.parameters() if not hasattr(p, "full_tensor")}
        ignored -= {ref.tensor for ref in chosen}
        masters = {str(i): nn.Parameter(exact(ref.tensor.detach()).clone()) for i, ref in enumerate(chosen)}
        put({str(i): ref for i, ref in enumerate(chosen)}, masters)
        sizes.append(sum(master.nbytes for master in masters.values()))
        if chosen or unit is network:
            fully_shard(unit, mesh=mesh, ignored_params=ignored)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # NCCL and gloo then add alike
    return sizes
