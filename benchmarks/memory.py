"""Bytes that autograd keeps for the backward pass: what a CPU has in place of a GPU's allocator figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _Kept:
    """A tensor that autograd keeps; counted as long as this object lives."""

    def __init__(self, tensor: Tensor, ledger: _Ledger):
        self.tensor, self._ledger = tensor, ledger
        storage = tensor.untyped_storage()
        self._key = storage.data_ptr()
        ledger.add(self._key, storage.nbytes())

    def __del__(self):
        self._ledger.remove(self._key)


class _Ledger:
    """Storages that are kept, each once however many tensors lie in it. peak: the most bytes at one time."""

    def __init__(self, left_out: Iterable[Tensor]):
        self.peak, self._now = 0, 0
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in left_out}
        self._held: dict[int, tuple[int, int]] = {}

    def add(self, key: int, size: int) -> None:
        count, size = self._held.get(key, (0, 0 if key in self._left_out else size))
        self._held[key] = (count + 1, size)
        self._now += 0 if count else size
        self.peak = max(self.peak, self._now)

    def remove(self, key: int) -> None:
        count, size = self._held.pop(key)
        if count > 1:
            self._held[key] = (count - 1, size)
        else:
            self._now -= size


def peak_saved_bytes(run: Callable[[], object], left_out: Iterable[Tensor] = ()) -> int:
    """The most bytes of storages that autograd keeps at one time while `run` is running on a CPU.

    left_out: tensors that are there anyway, such as weights. What torch's checkpointing computes again is counted with
    `use_reentrant=True` alone: otherwise it has hooks of its own in this one's place.
    """
    ledger = _Ledger(left_out)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, ledger), lambda kept: kept.tensor):
        run()
    return ledger.peak
