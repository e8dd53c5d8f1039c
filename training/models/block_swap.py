"""Block swap: frozen weights of a network's last blocks stay in RAM and are on the device while their block runs.

Each block's weights lie in one piece of RAM, pinned for a CUDA device. A copy goes to the device one block ahead of the
computation, on a stream of its own, forward and backward alike; two blocks are there at a time. What autograd would
keep of a swapped weight for backward is kept as its place in that piece, and read from the next copy. So no weight is
ever computed with other bits than without block swap, and gradients are bit-equal.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Forward, blocks_in_order, wrapped
from .protocols import Denoiser

log = logging.getLogger(__name__)

_ALIGNMENT = 256
"""Bytes; what CUDA aligns allocations to."""


def check_block_swap(denoiser: Denoiser, count: int) -> None:
    """Raises ValueError for more blocks than the network has, or for weights that cannot be moved as plain memory."""
    if not count:
        return
    blocks = blocks_in_order(denoiser)
    if count > len(blocks):
        raise ValueError(
            f"block_swap is {count}; expected at most {len(blocks)}, the blocks of this UNet. Lower it; "
            f"{len(blocks)} keeps all of them in RAM."
        )
    for name, parameter in (pair for block in blocks[len(blocks) - count :] for pair in block.named_parameters()):
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"block_swap is {count}, but {name} is a {type(parameter.data).__name__}; expected plain weights. Use "
                "a checkpoint in fp16, bf16 or fp32, or block_swap 0."
            )


@contextmanager
def swapped_blocks(
    denoiser: Denoiser, count: int, trained: Collection[str] = (), recomputed: bool = False
) -> Iterator[BlockSwap | None]:
    """While entered, frozen weights of the last `count` blocks stay in RAM; afterwards they are on the device again.

    Args:
        denoiser: its network must be on the device.
        count: blocks, from the last one back; 0 changes nothing.
        trained: canonical names of weights that train, which stay on the device.
        recomputed: whether the blocks keep no activations for backward (`blocks.recomputed`), entered inside of this.

    Raises:
        ValueError: there are fewer blocks, or nothing in them is frozen.
    """
    if not count:
        yield None
        return
    check_block_swap(denoiser, count)
    chosen = _chosen(denoiser, count, trained)
    if not chosen:
        raise ValueError(f"block_swap is {count}, but all weights of these blocks train; expected 0.")
    swap = BlockSwap([weights for _, weights in chosen], denoiser.device, recomputed)
    log.info("block swap: %d blocks, %.0f MB, stay in RAM", len(chosen), swap.swapped_bytes / 2**20)
    if denoiser.device.type == "cpu":
        log.warning("block_swap saves nothing on a CPU, whose memory is the RAM")
    with swap, swap.on([block for block, _ in chosen]):
        yield swap


def _chosen(denoiser: Denoiser, count: int, trained: Collection[str]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Those of the last `count` blocks that have frozen weights, with these."""
    names = {id(p): denoiser.canonical_name(name) for name, p in denoiser.network.named_parameters()}
    blocks = blocks_in_order(denoiser)[-count:] if count else []
    frozen = [[p for p in block.parameters() if names[id(p)] not in trained] for block in blocks]
    return [(block, weights) for block, weights in zip(blocks, frozen, strict=True) if weights]


def freed_bytes(denoiser: Denoiser, count: int, trained: Collection[str] = ()) -> int:
    """Bytes by which `swapped_blocks` lowers what weights take of the device: all of these blocks' but for two, which
    are there at a time. On a CPU nothing leaves, and the copies of two blocks are added.

    Args:
        denoiser: as for `swapped_blocks`.
        count: likewise.
        trained: likewise.
    """
    chosen = _chosen(denoiser, count, trained)
    sizes = [sum(map(_aligned_size, weights)) for _, weights in chosen]
    copies = max((one + other for one, other in pairwise([*sizes, 0])), default=0)
    leaving = sum(p.nbytes for _, weights in chosen for p in weights)
    return (0 if denoiser.device.type == "cpu" else leaving) - copies


class _Saved(NamedTuple):
    """A tensor that autograd keeps, as its place among a block's weights."""

    block: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Copy:
    """A block's weights on the device.

    Attributes:
        flat: bytes of all of them.
        arrived: when they are there; None for a copy that is not asynchronous.
    """

    flat: Tensor
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """The bytes, for computing on the current stream, which waits for them."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.flat.device).wait_event(self.arrived)
        return self.flat


def _aligned_size(weight: Tensor) -> int:
    """Bytes of a weight in its block's piece of memory."""
    return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT


class _Block:
    """Weights in one piece of RAM, and their views into such a piece."""

    def __init__(self, weights: Sequence[nn.Parameter], pinned: bool):
        self._weights, self._offsets, size = list(weights), [], 0
        for weight in weights:
            self._offsets.append(size)
            size += _aligned_size(weight)
        self.flat = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for weight, view in zip(self._weights, self._views(self.flat), strict=True):
            view.copy_(weight.data)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [self._view(flat, *place) for place in zip(self._weights, self._offsets, strict=True)]

    @staticmethod
    def _view(flat: Tensor, weight: nn.Parameter, offset: int) -> Tensor:
        """The weight's place in a piece of memory, with its shape and its order of dimensions."""
        stride = torch.empty_like(weight, device="meta").stride()
        piece = flat[offset : offset + weight.numel() * weight.element_size()].view(weight.dtype)
        return piece.as_strided(weight.shape, stride)

    def place(self, flat: Tensor) -> None:
        """Makes the weights views into a piece of memory; setting `data` leaves each Parameter the same object."""
        for weight, view in zip(self._weights, self._views(flat), strict=True):
            weight.data = view

    def release(self, device: torch.device) -> None:
        """Makes the weights tensors of their own on a device."""
        for weight, view in zip(self._weights, self._views(self.flat), strict=True):
            weight.data = view.to(device, copy=True)


class BlockSwap:
    """Streams the weights of blocks to a device.

    Args:
        weights: frozen parameters of each block, in the order in which the blocks run.
        device: where they are computed with. On a CPU all is the same, with copies in other places of the RAM.
        recomputed: whether the blocks are recomputed in backward.
    """

    def __init__(self, weights: Sequence[Sequence[nn.Parameter]], device: torch.device, recomputed: bool = False):
        self._weights, self._device, self._recomputed = weights, device, recomputed
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks: list[_Block] = []
        self._there: dict[int, _Copy] = {}
        self._last = -1

    @property
    def swapped_bytes(self) -> int:
        """Bytes of all blocks' weights, which leave the device."""
        return sum(p.numel() * p.element_size() for block in self._weights for p in block)

    @property
    def resident_bytes(self) -> int:
        """Bytes of copies that are on the device now, or on their way."""
        return sum(copy.flat.numel() for copy in self._there.values())

    def __enter__(self) -> BlockSwap:
        try:
            for weights in self._weights:
                self._blocks.append(_Block(weights, pinned=self._stream is not None))
                self._blocks[-1].place(self._blocks[-1].flat)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        """Puts all weights on the device again."""
        for number in list(self._there):
            self._leave(number)
        for block in self._blocks:
            block.release(self._device)

    def on(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """While entered, the forward pass of each block's module fetches its weights."""
        numbers = {module: number for number, module in enumerate(modules)}
        return wrapped(modules, lambda module, forward: partial(self._run, numbers[module], forward))

    def _run(self, number: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        block, flat = self._blocks[number], self._fetch(number)
        block.place(flat)
        try:
            with self._saving_places(number, flat):
                return forward(*args, **kwargs)
        finally:
            block.place(block.flat)

    def _saving_places(self, number: int, flat: Tensor) -> AbstractContextManager:
        """While entered, autograd keeps places of weights in this copy, in place of the copy.

        Not where blocks are recomputed: there nothing is kept of them until backward, which then runs at once.
        """
        if self._recomputed or not torch.is_grad_enabled():
            return nullcontext()
        address = flat.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Tensor | _Saved:
            if tensor.untyped_storage().data_ptr() != address:
                return tensor.detach()  # an output that keeps itself would never be freed
            return _Saved(number, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        storage = self._fetch(saved.block).untyped_storage()
        empty = torch.empty(0, dtype=saved.dtype, device=storage.device)
        return empty.set_(storage, saved.offset, saved.size, saved.stride)

    def _fetch(self, number: int) -> Tensor:
        """A block's weights on the device; begins to copy those of the next one, whichever way the pass goes."""
        if number != self._last or number not in self._there:
            wanted = [number, *self._next(number)]
            for other in self._there.keys() - wanted:
                self._leave(other)
            for other in wanted:
                if other not in self._there:
                    self._there[other] = self._copy(other)
            self._last = number
        return self._there[number].wait()

    def _next(self, number: int) -> list[int]:
        """The block after this one: forward turns into backward at the last block, and back at the first."""
        step = 1 if number > self._last else -1
        step = step if 0 <= number + step < len(self._blocks) else -step
        return [number + step] if 0 <= number + step < len(self._blocks) else []

    def _copy(self, number: int) -> _Copy:
        """Begins to copy a block's weights to the device.

        The copy belongs to the current stream, on which it is used and freed; so memory is reused in that stream's
        order, however far the CPU is ahead, and `record_stream` is not needed.
        """
        source = self._blocks[number].flat
        flat = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        if self._stream is None:
            return _Copy(flat.copy_(source))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            flat.copy_(source, non_blocking=True)
            return _Copy(flat, self._stream.record_event())

    def _leave(self, number: int) -> None:
        """Forgets a copy; one that nobody used must have arrived before its memory is another's."""
        self._there.pop(number).wait()
