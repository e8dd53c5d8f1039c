"""Several processes, one run: each takes its share of every batch, gradients are summed.

Noise and timesteps belong to the sample's number in the step, not to the process, so a run on n GPUs equals a run on
one up to the order of additions. Started by `accelerate launch`; a plain start is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of a list, round robin."""
        return items[self.rank :: self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors up over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def world() -> World:
    """The world that accelerate's launcher describes in the environment; joins it on the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    from accelerate import PartialState

    state = PartialState()
    return World(state.process_index, state.num_processes)
