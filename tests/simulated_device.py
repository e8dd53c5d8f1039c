"""A device that is not there: its tensors say that they are on it, and compute on the CPU.

Whole trainings run on it, backward passes included, in any build of torch and with the values of a CPU. What would fail
on an accelerator fails here: an operation on tensors of two devices, a CPU generator for a draw on the device, and
float64, which Apple's GPUs lack. Reads of the device by the host are counted, each of which makes it wait; so are
casts. torch's FakeTensorMode knows the rules for every device type, but has no values to read, and no backward pass
where the device is missing.

The device has the type "lazy": it needs nothing from a build of torch, and autograd runs it in the CPU's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device("lazy")
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
"""Operations whose result, or its size, the host needs."""
MIXED = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten._index_put_impl_, aten.set_data}
"""Operations that take tensors of two devices."""


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on DEVICE; `on_cpu` holds its values."""

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> DeviceTensor:
        strides, offset = on_cpu.stride(), on_cpu.storage_offset()
        options = {"strides": strides, "storage_offset": offset, "dtype": on_cpu.dtype, "device": DEVICE}
        tensor = torch.Tensor._make_wrapper_subclass(cls, on_cpu.shape, **options)
        tensor.on_cpu = on_cpu
        return tensor

    def tolist(self) -> list:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} runs outside of SimulatedDevice")


class SimulatedDevice(TorchDispatchMode):
    """Computes for tensors of the device, and counts.

    Attributes:
        reads: number of times that the host waits for a value, by operation.
        casts: bytes of the tensors on the device that are cast to another dtype, by (from, to).
        uploads: number of tensors that go from the host to the device.
        waits: number of those whose copy blocks, for which a CUDA device is waited for as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
        self.uploads = self.waits = 0

    def reset(self) -> None:
        """Starts counting anew."""
        self.reads, self.casts, self.uploads, self.waits = Counter(), Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        target = kwargs.get("device")
        if not inputs and not _is_device(target):
            return func(*args, **kwargs)
        expect_one_device(func, args, leaves)
        here = _is_device(target) if target is not None else _stays(func, args)
        if here and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func} draws on {DEVICE} with a generator of the CPU")
        self._count(func, args, kwargs, inputs, here)
        result = func(*_on_cpu(args), **_on_cpu({**kwargs, "device": torch.device("cpu")} if target else kwargs))
        return _wrapped(result, inputs, args) if here else result

    def _count(self, func, args, kwargs, inputs: list[DeviceTensor], here: bool) -> None:
        if inputs and (func.overloadpacket in READS or not here):
            self.reads[str(func.overloadpacket)] += 1
        if func.overloadpacket is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.reads["index by a mask"] += 1
        if here and func.overloadpacket in (aten._to_copy, aten.copy_):
            copies = func.overloadpacket is aten.copy_
            source = args[1] if copies else args[0]
            if not isinstance(source, DeviceTensor):
                self.uploads += 1
                self.waits += not (args[2:] == (True,) if copies else kwargs.get("non_blocking"))
        if func.overloadpacket is aten._to_copy and inputs and kwargs.get("dtype") not in (None, args[0].dtype):
            self.casts[args[0].dtype, kwargs["dtype"]] += args[0].nbytes


def expect_one_device(func, args: tuple, leaves: list[Any]) -> None:
    """Raises RuntimeError where torch would: tensors of two devices. A number may be on the CPU where it is one of an
    element-wise operation's inputs."""
    if func.overloadpacket in MIXED and (func.overloadpacket is not aten.index or isinstance(args[0], DeviceTensor)):
        return
    here = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)]
    if torch.Tag.pointwise in func.tags and not (func._schema.is_mutable and not isinstance(args[0], DeviceTensor)):
        there = [tensor for tensor in there if tensor.ndim]
    if here and there:
        raise RuntimeError(
            f"{func} gets tensors of two devices: {[tuple(t.shape) for t in here]} on {DEVICE}, "
            f"{[tuple(t.shape) for t in there]} on the CPU"
        )


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _stays(func, args: tuple) -> bool:
    """Whether the result of an operation on the device's tensors is there too."""
    return func.overloadpacket is not aten.copy_ or isinstance(args[0], DeviceTensor)


def _on_cpu(values: Any) -> Any:
    return tree_map_only(DeviceTensor, lambda tensor: tensor.on_cpu, values)


def _wrapped(result: Any, inputs: list[DeviceTensor], args: tuple) -> Any:
    """Results as tensors of the device; one that is an input's own is that input (operations in place)."""
    known = {id(tensor.on_cpu): tensor for tensor in inputs}

    def wrap(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError(f"a tensor of {tuple(tensor.shape)} is float64 on {DEVICE}; Apple's GPUs have no such type")
        return known.get(id(tensor)) if id(tensor) in known else DeviceTensor(tensor)

    return tree_map_only(Tensor, wrap, result)


def _autocast(autocast: type, device_type: str, *args: Any, enabled: bool = True, **options: Any):
    """torch.autocast, which does not know DEVICE: there it can be turned off only."""
    if device_type != DEVICE.type:
        return autocast(device_type, *args, enabled=enabled, **options)
    if enabled:
        raise ValueError(f"autocast is on for {DEVICE}; expected fp32.")
    return nullcontext()


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """While entered, modules can be moved to DEVICE, and compute there."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor moves its values by an operation, as in FakeTensorMode
    autocast, torch.autocast = torch.autocast, partial(_autocast, torch.autocast)
    torch.lazy = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0)
    try:
        with SimulatedDevice() as mode:
            yield mode
    finally:
        del torch.lazy
        torch.autocast = autocast
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(before)
