"""peft's settings of an adapter, which scale its tensors: adapter_config.json, or the metadata of diffusers' files.

A layer's difference is scaled by alpha / r there, whatever its kind; by alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
LyCORIS, and so this package, scales by alpha / rank, and a LoKr of two whole factors not at all. So the settings become
an alpha of each layer, or a factor of its tensors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..common.foreign import finite_number, metadata_json, short, whole_number
from ..common.patterns import PatternTable
from .lora_keys import DOWN, EXTRA_BIAS, PEFT, SINGULAR, rank_of, split_layer

_ALPHA_FIELDS = {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Kinds of peft's adapters that are read -> the field with their alpha."""
_DEFAULT_RANK = 8
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a LoRA that change the base model's weights, to which the file is then relative."""
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens", "layer_replication")
"""Fields that give lora_A and lora_B another meaning."""


@dataclass(frozen=True)
class PeftSettings:
    """What peft's config of one component says about the scale of its layers.

    Args:
        kind: LORA, ADALORA, LOHA or LOKR.
        rank: r.
        alpha: alpha; None if the config has none.
        root: Whether the scale is alpha / sqrt(r), as with rsLoRA.
        ranks: Ranks of single layers by patterns of their names.
        alphas: Alphas of single layers by patterns of their names.
    """

    kind: str = "LORA"
    rank: int = _DEFAULT_RANK
    alpha: float | None = None
    root: bool = False
    ranks: PatternTable[int] = field(default_factory=lambda: PatternTable({}))
    alphas: PatternTable[float] = field(default_factory=lambda: PatternTable({}))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PeftSettings:
        """The settings of a config. Raises ValueError, without the file's name, for what is damaged or not read."""
        kind = config.get("peft_type") or "LORA"
        if kind not in _ALPHA_FIELDS:
            raise ValueError(
                f"its adapter is peft's {short(kind)}; expected LoRA, AdaLoRA, LoHa or LoKr. Merge it into its model "
                "with peft (merge_and_unload), and use that model or make a LoRA of it with extract-lora"
            )
        _check_variant(config)
        alpha, rank = config.get(_ALPHA_FIELDS[kind]), config.get("r")
        ranks = {} if kind == "ADALORA" else _patterns(config, "rank_pattern")  # AdaLoRA's holds lists of masks
        return cls(
            kind,
            _DEFAULT_RANK if rank is None else whole_number(rank, "r in its adapter settings"),
            None if alpha is None else finite_number(alpha, f"{_ALPHA_FIELDS[kind]} in its adapter settings"),
            bool(config.get("use_rslora")),
            PatternTable({k: whole_number(v, f"the rank of {short(k)}") for k, v in ranks.items()}),
            PatternTable(
                {k: finite_number(v, f"alpha of {short(k)}") for k, v in _patterns(config, "alpha_pattern").items()}
            ),
        )

    def scale(self, path: str, rank: int | None) -> float | None:
        """The factor of a layer's difference; None if the config has no alpha.

        Args:
            path: The layer's path in its component.
            rank: The rank of its tensors, None if they have none.
        """
        alpha = self.alphas.get(path)
        alpha = self.alpha if alpha is None else alpha
        if alpha is None:
            return None
        rank = rank or self.ranks.get(path) or self.rank
        if self.kind == "ADALORA":
            return (alpha if alpha > 0 else rank) / (rank + 1e-5)
        return alpha / (math.sqrt(rank) if self.root else rank)


def read_settings(metadata: Mapping[str, str]) -> dict[str, PeftSettings]:
    """Component of the pipeline -> its settings; under "" those of a file for a single network.

    Raises ValueError, without the file's name, for damaged settings and for kinds that are not read.
    """
    if PEFT not in metadata:
        return {}
    by_component: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in metadata_json(metadata, PEFT).items():
        component, _, name = key.rpartition(".")
        by_component[component][name] = value
    return {component: PeftSettings.from_config(config) for component, config in by_component.items()}


def settle(layer: str, tensors: MutableMapping[str, Tensor], settings: Mapping[str, PeftSettings]) -> None:
    """Turns a layer's tensors into LyCORIS's, which mean the same without settings.

    Args:
        layer: The layer's name in the file.
        tensors: LyCORIS's name -> tensor; changed in place.
        settings: `read_settings` of the file.
    """
    component, path = split_layer(layer)
    config = settings.get(component) or settings.get(layer.partition(".")[0]) or settings.get("")
    rank = rank_of(tensors)
    if (values := tensors.pop(SINGULAR, None)) is not None and DOWN in tensors:
        if values.numel() != rank:
            raise ValueError(f"layer {layer} has {values.numel()} singular values; expected {rank}")
        tensors[DOWN] = tensors[DOWN].float() * values.float().reshape(-1, *[1] * (tensors[DOWN].ndim - 1))
    scale = config.scale(path, rank) if config else None
    if scale is not None and "alpha" not in tensors:
        _set_scale(tensors, scale, rank)
    if (bias := tensors.pop(EXTRA_BIAS, None)) is not None:
        factor = tensors["alpha"].float() / rank if "alpha" in tensors and rank else 1.0
        tensors.setdefault("diff_b", bias.float() * factor)


def _set_scale(tensors: MutableMapping[str, Tensor], scale: float, rank: int | None) -> None:
    """Puts a scale into a layer: as alpha where it has a rank, else into LoKr's first factor."""
    if rank:
        tensors["alpha"] = torch.tensor(scale * rank)
    elif "lokr_w1" in tensors:
        tensors["lokr_w1"] = tensors["lokr_w1"].float() * scale


def _check_variant(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a LoRA whose tensors mean something else than B A."""
    begun = str(config.get("init_lora_weights") or "").lower()
    if begun.startswith(_OTHER_BASES):
        raise ValueError(
            f"init_lora_weights in its adapter settings is {short(begun)}: the file is relative to changed base "
            "weights, not to the model's. Save it by peft's save_pretrained with its argument "
            "path_initial_model_for_weight_conversion"
        )
    if variant := next((name for name in _VARIANTS if config.get(name)), None):
        raise ValueError(
            f"{variant} in its adapter settings is {short(config[variant])}; expected a plain LoRA. Merge it into its "
            "model with peft and make a LoRA of the difference with extract-lora"
        )


def _patterns(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field of patterns; {} where it is absent or null."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} in its adapter settings is {short(value)}; expected an object")
    return value
