"""What a run takes of its device's memory, by part, computed before its first step.

Weights, masters and averages are in memory by then and are counted. One training step runs on tensors without values
(`FakeTensorMode`), through the very code and modules that train, while `LiveBytes` follows its storages: so precision,
adapters, checkpointing and the pictures' size all count as they will. The optimizer's states are those of small
parameters, from which the size for larger ones follows: states of every optimizer grow in proportion to the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ..common.live_bytes import LiveBytes, parts_of
from ..config.training_settings import TrainingSettings
from .gradient_step import GradientStep
from .known_peaks import KnownPeaks
from .optimizers import build_optimizer
from .precision import autocast
from .rounding import RoundedMasters

log = logging.getLogger(__name__)

ACTIVATIONS, FILLING = "activations", "filling"
"""The parts of a rehearsal that compute the gradient of a batch, and that fill the caches before the first step."""
PROBED_VALUES = 1 << 15
"""Values of a small parameter that stands for a larger one: more than 8-bit optimizers leave in fp32."""
TOLERANCE = 0.1
"""Error of an estimate that is allowed for before a run is refused."""
GB = 1e9

Rehearsal = Mapping[str, Callable[[], Any]]
"""Part of a step -> a function that does its work on tensors without values and returns what stays in memory."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a run on its device, by part."""

    weights: int
    """The model's parts that are on the device during the run."""
    masters: int
    """What trains."""
    average: int
    """The moving average of what trains."""
    optimizer: int
    """The optimizer's states."""
    update: int
    """Temporary tensors of the optimizer's step."""
    gradients: int
    """Gradients of what trains; the largest of them where each is used and freed as it comes."""
    activations: int
    """What a batch's forward and backward passes hold besides the gradients."""
    decode: int = 0
    """Pictures that are decoded: to be scored, with what their gradients need, or as samples; or a text encoder that
    comes between steps of a reward."""
    accumulates: bool = False
    """Whether gradients of earlier batches are there while a batch is computed."""
    step: int = 0
    """The most that activations and gradients take together in a batch's passes."""
    swapped: int = 0
    """Weights that leave the device when the run begins, less what their copies take of it (block swap)."""
    filling: int = 0
    """What fills the caches before the first step: encoders that come to the device for it, and their work."""

    @property
    def present(self) -> int:
        """Bytes that are in memory before the run begins."""
        return self.weights + self.swapped + self.masters + self.average

    @property
    def peak(self) -> int:
        """The most bytes at a time: not all parts are there together."""
        before = self.gradients if self.accumulates else 0
        batch = self.gradients + self.activations if self.accumulates else self.step
        begun = self.weights + self.masters + self.average
        steps = self.optimizer + max(batch, before + self.decode, self.gradients + self.update)
        return begun + max(self.filling, steps)

    @property
    def needed(self) -> int:
        """Bytes that the run takes in addition to what it has."""
        return self.peak - self.present

    def as_dict(self) -> dict[str, int]:
        """The parts and the peak in bytes, for JSON."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("accumulates", "step")}
        return parts | {"peak": self.peak, "needed": self.needed}

    def text(self, free: int | None) -> str:
        """The peak and its parts in one line, with what is free where that is known."""
        names = ("weights", "masters", "average", "optimizer", "gradients", "activations", "decode", "filling")
        parts = ", ".join(f"{name} {_size(getattr(self, name))}" for name in names if getattr(self, name))
        room = "" if free is None else f"; {_size(self.needed)} more than now, {_size(free)} are free"
        return f"memory: at most about {_size(self.peak)} ({parts}){room}"


def estimate_memory(
    step: GradientStep,
    weights: Iterable[Tensor],
    sample: Any,
    count: int,
    more: Rehearsal,
    swapped: int = 0,
    known: KnownPeaks | None = None,
) -> MemoryEstimate:
    """Computes what a run will take.

    Args:
        step: the run's, not yet begun.
        weights: all parameters and buffers of the model's parts.
        sample: the loaded slot that takes the most memory.
        count: samples of a batch in this process.
        more: parts of a run besides those of its objective, such as drawing samples, and FILLING.
        swapped: bytes of `weights` that leave the device when the run begins (`block_swap.freed_bytes`).
        known: where the peaks of such a step are kept; they are computed where they are not there.

    Raises:
        RuntimeError: a network cannot run on tensors without values.
    """
    parameters, weights = step.trainable.parameters, list(weights)
    ours = {id(parameter) for parameter in parameters.values()}
    kinds = {(tuple(p.shape), p.dtype): p for p in parameters.values()}
    found = {kind: _state_bytes(kind[0], p, step.settings) for kind, p in kinds.items()}
    states = [found[tuple(p.shape), p.dtype] for p in parameters.values()]
    sizes = [parameter.nbytes for parameter in parameters.values()]
    gradients, update = max(sizes) if step.fused else sum(sizes), max((extra for _, extra in states), default=0)
    peaks = known.read() if known else None
    if peaks is None:
        peaks = rehearse(step, sample, count, more, fake_mode(weights))
        if known and step.world.is_main:
            known.write(peaks)
    filling, _ = peaks.pop(FILLING, (0, 0))
    batch, activations = peaks.pop(ACTIVATIONS)
    if step.trainable.shards:  # whole gradients are there one block at a time
        activations += step.trainable.gathered_bytes
        batch = activations + gradients
    return MemoryEstimate(
        weights=_bytes_on(step.device, (w for w in weights if id(w) not in ours)) - swapped,
        masters=_bytes_on(step.device, parameters.values()),
        average=_bytes_on(step.device, step.ema.values()),
        optimizer=sum(size for size, _ in states),
        update=update,
        gradients=gradients,
        activations=activations,
        decode=max((peak for peak, _ in peaks.values()), default=0),
        accumulates=step.settings.gradient_accumulation > 1,
        step=activations + gradients + update if step.fused else batch,
        swapped=swapped,
        filling=filling,
    )


def fake_mode(weights: Iterable[Tensor]) -> FakeTensorMode:
    """The mode in which operations on weights give tensors without values: the weights' own where they have none."""
    modes = (weight.fake_mode for weight in weights if isinstance(weight, FakeTensor))
    return next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)


def rehearse(
    step: GradientStep, sample: Any, count: int, more: Rehearsal, mode: FakeTensorMode
) -> dict[str, tuple[int, int]]:
    """The most bytes that tensors of each part of a step have at a time, with and without those that the part returns.

    Nothing is computed but the encoding of a prompt where the text encoder trains. Dropout is left out: it draws
    numbers, which tensors without values have none of. Arguments as for `estimate_memory`.
    """
    trainable, parameters = step.trainable, dict(step.trainable.parameters)
    with mode:
        for name, shard in trainable.shards.items():
            parameters[name] = nn.Parameter(torch.empty(shard.shape, device=step.device))
    with trainable.attach(parameters), autocast(step.settings.precision, step.device):
        parts = {**step.objective.rehearsal(sample, count, list(parameters.values())), **more}
        return {name: _peaks(run, mode) for name, run in parts.items()}


def _peaks(run: Callable[[], Any], mode: FakeTensorMode) -> tuple[int, int]:
    with mode, LiveBytes() as live:
        kept = run()
    return live.peak, live.peak_without(leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))


def _bytes_on(device: torch.device, tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors that are on a device, each tensor once."""
    here = {id(tensor): tensor for tensor in tensors if _same_memory(tensor.device, device)}
    return sum(part.nbytes for tensor in here.values() for part in parts_of(tensor))


def _same_memory(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _state_bytes(shape: tuple[int, ...], like: Tensor, settings: TrainingSettings) -> tuple[int, int]:
    """Bytes of the optimizer's states of a parameter, and of the temporary tensors of its step.

    Both are affine in the number of rows, so two small parameters of as many columns give them.
    """
    columns = max(1, like.numel() // max(1, shape[0] if shape else 1))
    rows = max(2, -(-PROBED_VALUES // columns))
    if not shape or shape[0] <= 2 * rows:
        return _probed_bytes(shape, like, settings)
    small, large = (_probed_bytes((n, *shape[1:]), like, settings) for n in (rows, 2 * rows))
    return tuple(a + (b - a) * (shape[0] - rows) // rows for a, b in zip(small, large, strict=True))


def _probed_bytes(shape: tuple[int, ...], like: Tensor, settings: TrainingSettings) -> tuple[int, int]:
    """`_state_bytes` by a step on a parameter of zeros, whose gradient is zero; Prodigy takes no rate of 0."""
    parameter = nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer({"": parameter}, 1.0, settings)
    with LiveBytes() as live:
        if settings.master_weights == "bf16":
            RoundedMasters(optimizer, {"": parameter}, 0).step(1)
        else:
            optimizer.step()
    storages = {t.untyped_storage()._cdata: t.nbytes for t in _state_tensors(optimizer, parameter)}
    size = sum(storages.values())
    return size, max(live.peak - size, 0)


def _state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    leaves = tree_leaves(dict(optimizer.state[parameter]))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and _same_memory(leaf.device, parameter.device)]


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a device's memory that this process can still take; None where nothing tells."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    backend = getattr(torch, device.type, None)
    if device.type == "mps":
        return backend.recommended_max_memory() - backend.driver_allocated_memory()
    if not hasattr(backend, "mem_get_info"):
        return None
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)
    return backend.mem_get_info(device)[0] + cached


def check_memory(estimate: MemoryEstimate, free: int | None, device: torch.device, hints: str) -> None:
    """Refuses a run that cannot fit, and warns of one that hardly fits.

    Args:
        estimate: of the run.
        free: `free_bytes` of its device.
        device: where it trains.
        hints: which settings to lower, from `memory_hints`.

    Raises:
        ValueError: what is needed is more than what is free, by more than the estimate's error.
    """
    if free is None or estimate.needed <= free:
        return
    message = (
        f"memory that the run takes on {device} is about {_size(estimate.needed)} more than now; expected at most "
        f"{_size(free)}, which are free. {hints}"
    ).strip()
    if estimate.needed > (1 + TOLERANCE) * free + _swap_bytes(device):
        raise ValueError(message)
    log.warning("%s", message)


def _swap_bytes(device: torch.device) -> int:
    """Bytes of free swap space, which a CPU's memory may use."""
    if device.type != "cpu":
        return 0
    import psutil

    return psutil.swap_memory().free


def _size(count: int) -> str:
    """Bytes for people: "3.42 GB", "12 MB"."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
