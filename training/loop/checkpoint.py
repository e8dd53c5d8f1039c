"""A run's state as one safetensors file: masters, optimiser, average, step. Renamed into place, so never half there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.files import read_tensors, write_tensors
from ..runs.folder import RunFolder

AS_BUILT = {"params", "lr", "foreach", "fused"}
"""Entries of a parameter group that a resumed run sets anew; all others may be state, such as Prodigy's d."""


@dataclass
class State:
    """step: finished optimiser steps. metrics_size: bytes of metrics.jsonl that belong to them. optimizer: for
    `restore_optimizer`."""

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
) -> None:
    """Writes state/latest.safetensors."""
    tensors = {f"master.{name}": value for name, value in masters.items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    plain: dict[str, dict[str, Any]] = {}
    whole = optimizer.state_dict()
    for index, entries in whole["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    groups = [{key: value for key, value in group.items() if key not in AS_BUILT} for group in whole["param_groups"]]
    about = {"step": step, "metrics_size": folder.metrics_size(), "optimizer": plain, "groups": groups}
    write_tensors(folder.latest, _unshared(tensors), {"retune.state": json.dumps(about | {"extra": dict(extra)})})


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries under dotted names; bitsandbytes nests its quantised state."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _put(entries: dict[str, Any], name: str, value: Any) -> None:
    """Sets a leaf under its dotted name."""
    first, dot, rest = name.partition(".")
    if dot:
        _put(entries.setdefault(first, {}), rest, value)
    else:
        entries[first] = value


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory with an earlier one (bitsandbytes' code books): safetensors refuses those."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        where = value.untyped_storage().data_ptr()
        result[name] = value.clone() if where in seen else value
        seen.add(where)
    return result


def load_state(folder: RunFolder) -> State | None:
    """The last saved state, or None when there is none. Raises ValueError on a damaged file."""
    if not folder.latest.exists():
        return None
    try:
        tensors, metadata = read_tensors(folder.latest)
        about = json.loads(metadata["retune.state"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"state file {folder.latest} cannot be read ({error}). Choose resume = restart to begin again."
        ) from error
    optimizer: dict[int, dict[str, Any]] = {}
    for index, entries in about["optimizer"].items():
        for key, value in entries.items():
            _put(optimizer.setdefault(int(index), {}), key, value)
    parts: dict[str, dict[str, Tensor]] = {"master": {}, "ema": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            _put(optimizer.setdefault(int(index), {}), key, value)
        else:
            parts[kind][rest] = value
    whole = {"state": optimizer, "param_groups": about.get("groups", [])}
    return State(about["step"], about["metrics_size"], parts["master"], parts["ema"], whole, about["extra"])


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Puts saved state of parameters and groups back; the learning rate stays as built."""
    groups = optimizer.state_dict()["param_groups"]
    for group, entries in zip(groups, saved["param_groups"], strict=False):  # none in states of earlier versions
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()})
    optimizer.load_state_dict({"state": dict(saved["state"]), "param_groups": groups})
