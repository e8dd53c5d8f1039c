"""Parses the rewards of the command line, such as "PickScore,file=PickScore_v1.safetensors,weight=2"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..common.foreign import finite_number
from .combined import CombinedReward, Term
from .load import RewardConfig, load_reward

_PATHS = ("file", "image_tower", "tokenizer", "comfyui")
_TERM = ("weight", "target", "form")


def read_rewards(
    texts: Sequence[str],
    tokenizer: Path | None = None,
    comfyui: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> CombinedReward:
    """Loads the rewards that texts describe, on the CPU.

    Args:
        texts: "<kind>,<name>=<value>,...", names being fields of RewardConfig and Term.
        tokenizer: CLIP tokenizer folder for texts without one.
        comfyui: folder of an installed ComfyUI for texts without one.
        dtype: of the arithmetic of a run; in half precision each is rounded to it (`Reward.store_in`) once it is read.

    Raises:
        ValueError: a name is unknown or a value is no number; also as `load_reward`.
        FileNotFoundError: as `load_reward`.
    """
    return CombinedReward([_read_term(text, {"tokenizer": tokenizer, "comfyui": comfyui}, dtype) for text in texts])


def _read_term(text: str, defaults: Mapping[str, Any], dtype: torch.dtype) -> Term:
    """Loads one reward; `defaults` are values of RewardConfig for those that the text lacks."""
    kind, *given = (part.strip() for part in text.split(","))
    values: dict[str, Any] = dict(part.partition("=")[::2] for part in given)
    names = {field.name for field in fields(RewardConfig)} - {"kind"} | set(_TERM)
    for name in values.keys() - names:
        raise ValueError(f"reward {text!r} has {name!r}; expected {', '.join(sorted(names))}.")
    values |= {name: Path(values[name]) for name in _PATHS if name in values}
    values |= {name: _number(text, name, values[name]) for name in ("weight", "target") if name in values}
    shape = {name: values.pop(name) for name in _TERM if name in values}
    reward = load_reward(RewardConfig(kind=kind, **defaults | values))
    if dtype != torch.float32:
        reward.store_in(dtype)
    return Term(reward=reward, **shape)


def _number(text: str, name: str, value: str) -> float:
    try:
        return finite_number(value, name)
    except ValueError as error:
        raise ValueError(f"reward {text!r} has {name} {value!r}; expected a number.") from error
