"""Several processes, one run: each takes its share of every batch, gradients are summed.

Noise and timesteps belong to the sample's number in the step, not to the process, so a run on n GPUs equals a run on
one up to the order of additions; adapters' dropout aside, which each process draws for its own share. Started by
`accelerate launch`; a plain start is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: list) -> list:
        """This process's part of a list, round robin."""
        return items[self.rank :: self.size]

    def all_reduce_(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors up over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def all_gather(self, value: Any) -> list:
        """What each process has, in their order; small things that pickle."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def broadcast(self, number: int, device: torch.device) -> int:
        """The main process's number on every process; all wait for it here."""
        if self.size == 1:
            return number
        shared = torch.tensor([number if self.is_main else 0], device=device)
        torch.distributed.all_reduce(shared)
        return int(shared)

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def world() -> World:
    """The world that accelerate's launcher describes in the environment; joins it on the first call.

    Raises ValueError when accelerate does not join the processes: each would train on its own.
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
    """The device that accelerate gives this process."""
    return _state().device


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _state():
    """accelerate's view of this process; without an accelerator it joins several processes only when told "cpu".

    The others wait for the main process while it fills caches, draws and validates: torch's ten minutes are too short.
    """
    from accelerate import PartialState

    return PartialState(cpu=_size() > 1 and not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)
