"""Adapters that begin where another LoRA, of any tool, ended."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..common.text import first_few
from ..formats.lora import Lora, LoraModule
from ..formats.lora_difference import LINEAR_KINDS, low_rank_delta
from ..formats.lora_names import TEXT, detect_naming
from .lora import Adapters

log = logging.getLogger(__name__)


def start_from(adapters: Adapters, start: Lora, unet_config: Mapping | None = None) -> None:
    """Gives adapters the values with which their layers add what `start` adds.

    Layers of the same kind and size are taken over; LoRA and LoCon take any other kind that does not depend on the
    weight as its nearest product of their rank (SVD), and smaller ranks exactly. Layers of `start` without an adapter
    are left out with a warning, adapters without a layer begin at nothing. Raises ValueError when none or not all of
    the layers that have an adapter can be taken. unet_config: UNet2DConditionModel's, for the names of layers.
    """
    naming = detect_naming(start, unet_config=unet_config)
    known = {plain_layer(name): name for name in adapters.modules}
    values, idle, misfits = dict(adapters.values()), [], []
    for module in start.modules.values():
        name = known.get(plain_layer(naming.comfyui_name(module.name) or module.name))
        if name is None:
            idle.append(module.name)
            continue
        own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
        taken = _taken(module, own, adapters.modules[name].scale)
        if taken is None:
            misfits.append(f"{module.name} ({module.kind}, rank {module.rank})")
        else:
            values |= {f"{name}.{role}": value for role, value in taken.items()}
    if misfits:
        raise ValueError(
            f"{start.name} has layers that this training's adapters cannot begin from: {first_few(misfits)}; expected "
            f"the same algorithm, rank and size, or algorithm LoRA or LoCon, which take most kinds at any rank."
        )
    if len(idle) == len(start.modules):
        raise ValueError(
            f"{start.name} has no layer that trains here, only {first_few(idle)}. Choose its targets, or none."
        )
    if idle:
        log.warning("%s: %d layers have no adapter here and are left out: %s", start.name, len(idle), first_few(idle))
    adapters.load(values)


def plain_layer(layer: str) -> str:
    """A layer's name in which every T5 is `t5`: it has several names in ComfyUI."""
    return re.sub(rf"^{re.escape(TEXT)}t5\w*\.", f"{TEXT}t5.", layer)


def _taken(module: LoraModule, own: Mapping[str, Tensor], scale: float) -> dict[str, Tensor] | None:
    """Values for an adapter with tensors `own`, by role; None when it cannot add what the module adds."""
    given = {role: value.detach().float() for role, value in module.tensors.items() if role != "alpha"}
    if {r: v.numel() for r, v in given.items()} == {r: v.numel() for r, v in own.items()}:
        whole = module.rank is None or module.alpha is None
        ratio = (1.0 if whole else module.alpha / module.rank) / scale
        scaled = next(role for role in SCALED if role in own)
        given[scaled] = given[scaled] * ratio
        return {role: given[role].reshape(value.shape).to(value.device) for role, value in own.items()}
    if own.keys() != {"lora_down.weight", "lora_up.weight"} or module.kind not in LINEAR_KINDS:
        return None
    down, up = own["lora_down.weight"], own["lora_up.weight"]
    if module.shape != (up.shape[0], down[0].numel()):
        return None
    nearest = low_rank_delta(module, rank=len(down))
    count = len(nearest.down)
    new_down, new_up = down.detach().clone().flatten(1), torch.zeros_like(up).flatten(1)
    new_down[:count] = nearest.down.to(down)
    new_up[:, :count] = nearest.up.to(up) / scale
    return {"lora_down.weight": new_down.reshape(down.shape), "lora_up.weight": new_up.reshape(up.shape)}


SCALED = ("lora_up.weight", "hada_w2_a", "lokr_w2_b", "lokr_w2", "lokr_w1_b", "lokr_w1")
"""Which tensor takes up a difference in scale, the first that there is."""
