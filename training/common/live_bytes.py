"""Bytes of the tensors that are alive while something runs, on any device and for tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, each once; tensors from before do not count.

    It sees what a caching allocator is asked for: forward and backward passes, recomputed activations and temporary
    tensors between operations, but not the workspace inside one. Enter it after `FakeTensorMode` to count without
    computing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """The most that were alive at a time."""
        self._history: list[int] = []
        self._born: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor, counts=not _is_view(func))
        return result

    def peak_without(self, kept: Iterable[Tensor]) -> int:
        """The most bytes that were alive at a time besides tensors that are still alive."""
        sizes = [0] * (len(self._history) + 1)
        for key in {tensor.untyped_storage()._cdata for tensor in kept} & self._born.keys():
            sizes[self._born[key]] += self._sizes[key]
        return max((now - less for now, less in zip(self._history, accumulate(sizes), strict=False)), default=0)

    def _add(self, tensor: Tensor, counts: bool) -> None:
        """Begins to follow a tensor's storage, unless it is followed already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if counts else 0
        self._references[key] = weakref.ref(storage, lambda _: self._remove(key))
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        self._born[key] = len(self._history)
        self._history.append(self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._references[key], self._born[key]


def _is_view(func: Any) -> bool:
    """Whether an operation's results are views of its inputs.

    `FakeTensorMode` puts a tensor without values in the place of a weight, so a view of one has a storage of its own.
    """
    return any(value.alias_info is not None for value in func._schema.returns)


def _tensors(values: Any) -> list[Tensor]:
    return [part for leaf in tree_leaves(values) if isinstance(leaf, Tensor) for part in parts_of(leaf)]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that take memory for one: those inside of a quantised or divided tensor, or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]
