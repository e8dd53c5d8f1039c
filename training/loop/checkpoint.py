"""A run's state as one safetensors file: masters, optimizer, average, step. Renamed into place, so always whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.distributed import world
from ..common.foreign import metadata_json
from ..common.tensor_writer import take_part
from ..evaluation.diversity_guard import GuardState
from ..runs.folder import RunFolder
from ..runs.state_file import STATE, read_state_file, reading_state, write_state_file
from .rounding import fp32_states
from .validation import ValidationRecord

if TYPE_CHECKING:
    from ..trainables.base import Trainable
    from ..trainables.sharded import Shard
    from .loop import Loop

log = logging.getLogger(__name__)
AS_BUILT = {"params", "lr", "foreach", "fused"}
"""Entries of a parameter group that a resumed run sets again; all others may be state, such as Prodigy's d."""


def save_loop(loop: Loop) -> None:
    """Saves all that a loop needs to resume after its current step.

    Only the main process writes. Where tensors are divided among the processes, all of them must call this.
    """
    gradient_step = loop.gradient_step
    extra = {**loop.validation.state_dict(), "scaler": gradient_step.scaler.state_dict()}
    extra["objective"] = loop.objective_state
    if loop.guard:
        extra["guard"] = loop.guard.state.to_json()
    divided, optimizer = loop.trainable.divided, gradient_step.optimizer
    tensors = (divided(loop.trainable.values()), divided(gradient_step.ema))
    save_state(loop.folder, loop.step, *tensors, optimizer, extra, _shards(optimizer, loop.trainable))


def _shards(optimizer: torch.optim.Optimizer, trainable: Trainable) -> dict[int, Shard]:
    """The divided parameters by their numbers in the optimizer's state."""
    names = {id(parameter): name for name, parameter in trainable.parameters.items()}
    ordered = (names[id(p)] for group in optimizer.param_groups for p in group["params"])
    return {number: trainable.shards[name] for number, name in enumerate(ordered) if name in trainable.shards}


def load_loop(loop: Loop) -> int:
    """Restores the last saved state, if there is one; returns the bytes of metrics.jsonl that belong to it.

    Raises ValueError when the run has done more steps than it is asked for.
    """
    state = load_state(loop.folder, copy=False)
    if state is None:
        return 0
    if state.step > loop.config.steps:
        raise ValueError(
            f"steps is {loop.config.steps}; run {loop.folder.name!r} has done {state.step}. "
            "Ask for at least as many, or choose resume = restart."
        )
    with reading_state(loop.folder.latest):
        _restore(loop, state)
    return state.metrics_size


def _restore(loop: Loop, state: State) -> None:
    gradient_step = loop.gradient_step
    loop.trainable.load(state.masters)
    for name, average in gradient_step.ema.items():
        average.copy_(loop.trainable.part(name, state.ema[name]))
    shards = _shards(gradient_step.optimizer, loop.trainable)
    restore_optimizer(gradient_step.optimizer, parts_of_states(state.optimizer, shards))
    loop.validation = ValidationRecord.from_state_dict(state.extra)
    loop.objective.load_state(state.extra.get("objective", {}))
    if loop.guard:
        loop.guard.state = GuardState.from_json(state.extra["guard"])
    if gradient_step.scaler.is_enabled():
        gradient_step.scaler.load_state_dict(state.extra["scaler"])
    loop.step = loop.saved_step = state.step


@dataclass
class State:
    """A saved state.

    Attributes:
        step: number of finished optimizer steps.
        metrics_size: bytes of metrics.jsonl that belong to them.
        masters: weights by name.
        ema: their average by name; empty without one.
        optimizer: for `restore_optimizer`.
        extra: state of validation, loss scaler, objective and guard, as JSON.
    """

    step: int
    metrics_size: int
    masters: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    extra: dict[str, Any]


def save_state(
    folder: RunFolder,
    step: int,
    masters: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    shards: Mapping[int, Shard] = MappingProxyType({}),
) -> None:
    """Writes state/latest.safetensors; see `State` for the arguments.

    shards: divided parameters by their numbers in the optimizer; all processes then call this, and the main one writes.
    """
    tensors = {f"master.{name}": value for name, value in masters.items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    numbers: dict[str, dict[str, Any]] = {}
    state_dict = optimizer.state_dict()
    for index, entries in state_dict["state"].items():
        for key, value in _flatten(entries):
            if isinstance(value, Tensor):
                divided = index in shards and shards[index].is_part(value)
                tensors[f"optimizer.{index}.{key}"] = shards[index].divided(value) if divided else value
            else:
                numbers.setdefault(str(index), {})[key] = value
    groups = [{key: v for key, v in group.items() if key not in AS_BUILT} for group in state_dict["param_groups"]]
    about = {"step": step, "metrics_size": folder.metrics_size(), "optimizer": numbers, "groups": groups}
    about |= {"record": folder.record, "extra": dict(extra)}
    if world().is_main:
        write_state_file(folder.latest, tensors, {STATE: json.dumps(about)})
    else:
        take_part(tensors)


def _flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries under dotted names; bitsandbytes nests its quantised state."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _set_nested(entries: dict[str, Any], name: str, value: Any) -> None:
    """Sets a leaf of nested dictionaries by its dotted name."""
    first, dot, rest = name.partition(".")
    if dot:
        _set_nested(entries.setdefault(first, {}), rest, value)
    else:
        entries[first] = value


def load_state(folder: RunFolder, copy: bool = True) -> State | None:
    """The last saved state, or None when there is none.

    copy: whether its tensors are copied into RAM, rather than left in the file until each is used. Raises ValueError
    for a damaged or changed file, and for one that was saved under the settings of another run.
    """
    if not folder.latest.exists():
        return None
    tensors, metadata, verified = read_state_file(folder.latest, copy)
    if not verified:
        log.warning("the state of run %r is of an earlier version and could not be verified", folder.name)
    with reading_state(folder.latest):
        about = metadata_json(metadata, STATE)
        if folder.record and about.get("record") not in (None, folder.record):
            raise ValueError("it belongs to a run of other settings; expected that of this config.json")
        return _parse_state(tensors, about)


def _parse_state(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> State:
    optimizer: dict[int, dict[str, Any]] = {}
    for index, entries in about["optimizer"].items():
        for key, value in entries.items():
            _set_nested(optimizer.setdefault(int(index), {}), key, value)
    parts: dict[str, dict[str, Tensor]] = {"master": {}, "ema": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            _set_nested(optimizer.setdefault(int(index), {}), key, value)
        else:
            parts[kind][rest] = value
    state_dict = {"state": optimizer, "param_groups": about.get("groups", [])}
    return State(about["step"], about["metrics_size"], parts["master"], parts["ema"], state_dict, about["extra"])


def parts_of_states(saved: Mapping[str, Any], shards: Mapping[int, Shard]) -> dict[str, Any]:
    """A saved state of an optimizer with what this process keeps of it; shards: divided parameters by number."""
    states = {
        index: {k: shards[index].part(v) if _is_whole(v, shards.get(index)) else v for k, v in entries.items()}
        for index, entries in saved["state"].items()
    }
    return {**saved, "state": states}


def _is_whole(value: Any, shard: Shard | None) -> bool:
    return shard is not None and isinstance(value, Tensor) and value.dim() > 0 and value.shape == shard.shape


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Loads a saved state of parameters and groups; the learning rate stays as built.

    Tensors that torch takes over as they are, on the CPU, are copied one by one: the saved ones may lie in a file.
    """
    groups = optimizer.state_dict()["param_groups"]
    for group, entries in zip(groups, saved["param_groups"], strict=False):  # none in states of earlier versions
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()})
    with fp32_states(optimizer):
        optimizer.load_state_dict({"state": dict(saved["state"]), "param_groups": groups})
    for entries in optimizer.state.values():
        _copy_from_file(entries)


def _copy_from_file(entries: dict[str, Any]) -> None:
    for key, value in entries.items():
        if isinstance(value, dict):
            _copy_from_file(value)
        elif isinstance(value, Tensor) and value.device.type == "cpu":
            entries[key] = value.clone()
