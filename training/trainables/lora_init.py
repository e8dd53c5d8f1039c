"""Initial values of adapters from another LoRA, of any tool."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..common.text import first_few
from ..formats.lora import Lora, LoraModule
from ..formats.lora_difference import LINEAR_KINDS, low_rank_delta
from ..formats.lora_names import TEXT, Naming, detect_naming
from .lora import Adapters

log = logging.getLogger(__name__)


def start_from(adapters: Adapters, start: Lora, unet_config: Mapping | None = None) -> None:
    """Sets adapters to the change of weights that another LoRA makes.

    Modules of the same kind and size are copied. LoRA and LoCon adapters approximate any other kind that does not
    depend on the weight by the nearest product of their rank (SVD); smaller ranks are exact. Layers of `start` without
    an adapter are left out with a warning; adapters of other layers begin without a change.

    Args:
        adapters: to set.
        start: the other LoRA.
        unet_config: UNet2DConditionModel's, for the names of layers.

    Raises:
        ValueError: no layer of `start` has an adapter, or one that has cannot be converted.
    """
    naming = detect_naming(start, unet_config=unet_config)
    by_layer = {plain_layer(name): name for name in adapters.modules}
    values, idle, misfits = dict(adapters.values()), [], []
    for layer, module in modules_by_layer(start, naming).items():
        name = by_layer.get(layer)
        if name is None:
            idle.append(module.name)
            continue
        masters = {key.removeprefix(f"{name}."): v for key, v in values.items() if key.startswith(f"{name}.")}
        converted = _convert(module, masters, adapters.modules[name].scale)
        if converted is None:
            misfits.append(f"{module.name} ({module.kind}, rank {module.rank})")
        else:
            values |= {f"{name}.{role}": value for role, value in converted.items()}
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


def modules_by_layer(lora: Lora, naming: Naming) -> dict[str, LoraModule]:
    """The LoRA's layers by ComfyUI's names, or by their own where these are not understood; see `plain_layer`.

    Raises ValueError for two layers of one name, of which one would be lost.
    """
    modules: dict[str, LoraModule] = {}
    for module in lora.modules.values():
        layer = plain_layer(naming.comfyui_name(module.name) or module.name)
        if (other := modules.setdefault(layer, module)) is not module:
            raise ValueError(f"{lora.name} has {other.name} and {module.name}, which are one layer; expected it once.")
    return modules


def plain_layer(layer: str) -> str:
    """A layer's name with `t5` for every name that ComfyUI has for a T5."""
    return re.sub(rf"^{re.escape(TEXT)}t5\w*\.", f"{TEXT}t5.", layer)


def _convert(module: LoraModule, masters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor] | None:
    """Values for an adapter that then changes its layer as the module does; None where it cannot.

    Args:
        module: of the other LoRA.
        masters: the adapter's tensors by role.
        scale: the adapter's alpha / rank.
    """
    tensors = {role: value.detach().float() for role, value in module.tensors.items() if role != "alpha"}
    if {r: v.numel() for r, v in tensors.items()} == {r: v.numel() for r, v in masters.items()}:
        unscaled = module.rank is None or module.alpha is None
        ratio = (1.0 if unscaled else module.alpha / module.rank) / scale
        scaled = next(role for role in SCALED if role in masters)
        tensors[scaled] = tensors[scaled] * ratio
        return {role: tensors[role].reshape(value.shape).to(value.device) for role, value in masters.items()}
    if masters.keys() != {"lora_down.weight", "lora_up.weight"} or module.kind not in LINEAR_KINDS:
        return None
    down, up = masters["lora_down.weight"], masters["lora_up.weight"]
    if module.shape != (up.shape[0], down[0].numel()):
        return None
    nearest = low_rank_delta(module, rank=len(down))
    count = len(nearest.down)
    new_down, new_up = down.detach().clone().flatten(1), torch.zeros_like(up).flatten(1)
    new_down[:count] = nearest.down.to(down)
    new_up[:, :count] = nearest.up.to(up) / scale
    return {"lora_down.weight": new_down.reshape(down.shape), "lora_up.weight": new_up.reshape(up.shape)}


SCALED = ("lora_up.weight", "hada_w2_a", "lokr_w2_b", "lokr_w2", "lokr_w1_b", "lokr_w1")
"""Tensors that a difference in scale is multiplied into: the first of them that an adapter has."""
