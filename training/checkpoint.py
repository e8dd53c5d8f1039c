"""A run's state as one safetensors file: masters, optimiser, average, step. Renamed into place, so never half there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .files import read_tensors, write_tensors
from .run_folder import RunFolder


@dataclass
class State:
    """step: finished optimiser steps. metrics_size: bytes of metrics.jsonl that belong to them."""

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
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    about = {"step": step, "metrics_size": folder.metrics_size(), "optimizer": plain, "extra": dict(extra)}
    write_tensors(folder.latest, tensors, {"retune.state": json.dumps(about)})


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
    optimizer: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in about["optimizer"].items()}
    parts: dict[str, dict[str, Tensor]] = {"master": {}, "ema": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            optimizer.setdefault(int(index), {})[key] = value
        else:
            parts[kind][rest] = value
    return State(about["step"], about["metrics_size"], parts["master"], parts["ema"], optimizer, about["extra"])


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Puts saved per-parameter state back; groups (and so the learning rate) stay as built."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
