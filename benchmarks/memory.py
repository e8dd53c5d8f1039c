"""Peak bytes of the tensors that autograd saves for backward passes: a CPU has no allocator that records its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _Saved:
    """A tensor saved for the backward pass; its storage counts as long as this object lives."""

    def __init__(self, tensor: Tensor, storages: _Storages):
        self.tensor, self._storages = tensor, storages
        storage = tensor.untyped_storage()
        self._key = storage.data_ptr()
        storages.add(self._key, storage.nbytes())

    def __del__(self):
        self._storages.remove(self._key)


class _Storages:
    """Bytes of the saved storages, each counted once however many saved tensors share it. peak: the maximum so far."""

    def __init__(self, exclude: Iterable[Tensor]):
        self.peak, self._now = 0, 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self._live: dict[int, tuple[int, int]] = {}  # data pointer -> (saved tensors, bytes)

    def add(self, key: int, size: int) -> None:
        count, size = self._live.get(key, (0, 0 if key in self._excluded else size))
        self._live[key] = (count + 1, size)
        self._now += 0 if count else size
        self.peak = max(self.peak, self._now)

    def remove(self, key: int) -> None:
        count, size = self._live.pop(key)
        if count > 1:
            self._live[key] = (count - 1, size)
        else:
            self._now -= size


def peak_saved_bytes(run: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Calls `run` on a CPU; returns the most bytes of storages that autograd holds for backward passes at one time.

    Args:
        run: Forward and backward passes. Activations that checkpointing recomputes count only with
            `use_reentrant=True`: without it, checkpointing installs saved-tensor hooks that replace those of this
            function.
        exclude: Tensors that exist anyway, such as weights.
    """
    storages = _Storages(exclude)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, storages), lambda saved: saved.tensor):
        run()
    return storages.peak
