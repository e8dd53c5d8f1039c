"""One run on several processes: each computes its share of every batch, and gradients are summed.

Noise and timesteps belong to the sample's number in the step, not to the process, so a run on n GPUs equals a run on
one up to the order of additions, except for adapters' dropout, which each process draws for its share. Started by
`accelerate launch`; a plain start has one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(days=2)
"""The others wait while the main process fills caches, draws and validates: torch's ten minutes are too short."""
FLAT_SIZE = 2**26
"""Elements that are summed over processes at once, at most: a quarter of a GB in fp32. A larger tensor goes alone."""


class ProcessLost(ConnectionError):
    """Another process of this run has ended, or cannot be reached."""


@contextmanager
def _reaching_all() -> Iterator[None]:
    """Raises ProcessLost in place of the error with which torch's collective operations end when a process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ProcessLost(
            f"another process of this run has ended or cannot be reached ({reason}). Its own message says why. Start "
            "all of them again: the run goes on from its last state."
        ) from error


@dataclass(frozen=True)
class World:
    """This process among all processes of a run, and their collective operations; no-ops in a world of one."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Samples of a batch that each process computes. Raises ValueError for a batch that does not divide."""
        if batch_size % self.size:
            raise ValueError(
                f"batch_size is {batch_size} on {self.size} processes; expected a multiple of {self.size}. It counts "
                f"the samples of all processes together: choose {batch_size // self.size * self.size + self.size}, or "
                "another number of processes."
            )
        return batch_size // self.size

    def shard(self, items: list) -> list:
        """This process's part of a list, round robin: items rank, rank + size, ..."""
        return items[self.rank :: self.size]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over all processes, in place; every process gives the same shapes in the same order.

        Tensors travel as few long ones: a message for each of a LoRA's hundreds would cost its latency each time.
        """
        if self.size == 1:
            return
        for part in _parts(tensors):
            flat = torch.cat([tensor.flatten() for tensor in part])
            with _reaching_all():
                torch.distributed.all_reduce(flat)
            for tensor, summed in zip(part, flat.split([tensor.numel() for tensor in part]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def all_gather(self, value: Any) -> list:
        """The values of all processes, in order of rank; for small objects that pickle."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with _reaching_all():
            torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """The numbers of the main process, on every process."""
        if self.size == 1:
            return list(numbers)
        shared = torch.tensor(numbers).to(device)
        with _reaching_all():
            torch.distributed.broadcast(shared, src=0)
        return shared.tolist()

    def mesh(self, device: torch.device) -> Any:
        """All processes as a torch DeviceMesh of one dimension; device: of a kind that is theirs."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device.type, (self.size,))

    def barrier(self) -> None:
        """Waits until every process has called this."""
        if self.size > 1:
            with _reaching_all():
                torch.distributed.barrier()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided among processes (DTensor), all of which must ask; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors on one device and of one dtype, of FLAT_SIZE elements at most."""
    for _, alike in groupby(tensors, key=lambda tensor: (tensor.device, tensor.dtype)):
        part: list[Tensor] = []
        room = FLAT_SIZE
        for tensor in alike:
            if part and tensor.numel() > room:
                yield part
                part, room = [], FLAT_SIZE
            part.append(tensor)
            room -= tensor.numel()
        yield part


def world() -> World:
    """The processes of this run, from the environment that accelerate's launcher sets; joins them on the first call.

    Raises ValueError when accelerate does not join the processes: each would train alone.
    """
    size = _size()
    if size == 1:
        return World()
    state = _state()
    if state.num_processes != size:
        raise ValueError(
            f"number of joined processes is {state.num_processes}; expected {size}, as WORLD_SIZE says. "
            "Start with `accelerate launch`, or with one process."
        )
    return World(state.process_index, state.num_processes)


def local_device() -> torch.device:
    """The device that accelerate assigns to this process."""
    return _state().device


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _state():
    """accelerate's state of this process; without an accelerator it joins several processes only with cpu=True."""
    from accelerate import PartialState

    return PartialState(cpu=_size() > 1 and not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)
