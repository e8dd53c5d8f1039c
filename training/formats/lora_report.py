"""Reports on LoRA files: their layout, kind, rank and base model, and how much of them a model uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..common.text import first_few
from ..demo.editions import BASE, made_for_another
from .lora import Lora
from .lora_keys import PEFT, unwrapped

WIDTHS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}
"""Width of the context that cross-attention reads -> model family."""

_LAYOUTS = {
    "LyCORIS (diffusers names)": r"lycoris_",
    "kohya": r"lora_(unet|te\d?)_",
    "ComfyUI": r"(diffusion_model|text_encoders)\.",
    "OneTrainer": r"unet\.(input|middle|output)_block|clip_[lg]\.",
    "peft": r"((unet|text_encoder(_\d)?)\.)?base_model\.model\.",
    "diffusers": r"(unet|transformer|text_encoder(_\d)?|(down|up)_blocks|mid_block|text_model|encoder)\.",
}
_FAMILIES = {
    "SDXL": r"sdxl|stable-diffusion-xl",
    "SD1.x": r"(sd|stable-diffusion)[-_]?v?1",
    "SD2.x": r"(sd|stable-diffusion)[-_]?v?2",
}
"""Model family -> pattern of the names that trainers write into the metadata."""


@dataclass(frozen=True)
class Base:
    """The model family that a LoRA or embedding was trained on, and the evidence for it; "" if unknown."""

    family: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.family} ({self.source})" if self.family else "not said"


@dataclass
class LoraReport:
    """How a LoRA was applied to a model and a text encoder.

    Args:
        lora: The LoRA.
        strength_model: Its strength on the UNet.
        strength_clip: Its strength on the text encoder.
        family: Family of the model it was applied to, "" if unknown.
        edition: Name of the demo model it was applied to, "" for other models.
        has_clip: Whether there was a text encoder to apply it to.
        model_layers: Number of layers applied to the UNet.
        text_layers: Number of layers applied to the text encoder.
        zero_weight_layers: Number of layers with block weight 0.
        unused: Keys of the file that fit no layer.
        notes: Further warnings.
    """

    lora: Lora
    strength_model: float
    strength_clip: float
    family: str = ""
    edition: str = ""
    has_clip: bool = True
    model_layers: int = 0
    text_layers: int = 0
    zero_weight_layers: int = 0
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Warnings about a LoRA for another model family, and about keys that were not used; one line each."""
        name, base = self.lora.name, base_of_lora(self.lora)
        lines = [f"{name}: {note}" for note in self.notes]
        if line := missing_alpha(self.lora):
            lines.append(line)
        if base.family and self.family and base.family != self.family:
            lines.append(f"{name} was made for {base}; the model is {self.family}.")
        if line := made_for_another(self.lora.metadata.get(BASE, ""), self.edition):
            lines.append(f"{name} {line}")
        expected = set() if self.has_clip else self._text_keys()
        unused = [key for key in self.unused if key not in expected]
        if not self.model_layers + self.text_layers:
            lines.append(f"{name}: no key fits this model, nothing was applied: {first_few(self.unused)}.")
        elif unused:
            lines.append(f"{name}: {len(unused)} of {self.lora.key_count} keys were not used: {first_few(unused)}.")
        return lines

    def text(self) -> str:
        """Layout, rank, alpha, base model and used keys, as text; warnings come last."""
        lora, count = self.lora, self.lora.key_count
        layers = f"{self.model_layers} layers of the model, {self.text_layers} of the text encoder"
        lines = [
            f"{lora.name}: {layout_of(lora)} {kinds_of(lora)}, {_ranks(lora)}, {_alphas(lora)}, "
            f"base {base_of_lora(lora)}",
            f"  strength {self.strength_model:g} on the model, {self.strength_clip:g} on the text encoder",
            f"  {count - len(self.unused)} of {count} keys used: {layers}",
        ]
        if self.zero_weight_layers:
            lines.append(f"  {self.zero_weight_layers} layers have block weight 0")
        if self.unused:
            lines.append(f"  not used: {first_few(self.unused, limit=20)}")
        if not self.has_clip and self._text_keys():
            lines.append("  the keys of the text encoder need the clip input")
        return "\n".join(lines + [f"  warning: {line}" for line in self.warnings()])

    def _text_keys(self) -> set[str]:
        """The file's keys for text encoder layers."""
        return {key for module in self.lora.modules.values() if module.is_text for key in module.keys.values()}


def layout_of(lora: Lora) -> str:
    """The tool whose naming scheme most layers of a LoRA follow."""
    if "ot_branch" in lora.metadata or any(key.startswith("bundle_emb.") for key in lora.other_keys):
        return "OneTrainer"
    names = map(unwrapped, lora.modules)
    counts = Counter(next((n for n, p in _LAYOUTS.items() if re.match(p, name)), "other") for name in names)
    return counts.most_common(1)[0][0]


def missing_alpha(lora: Lora) -> str:
    """A warning about a peft adapter without its settings, whose strength nothing in the file tells; "" for others."""
    layers = [m for m in lora.modules.values() if "base_model.model." in m.name and "alpha" not in m.tensors]
    if not layers or PEFT in lora.metadata:
        return ""
    return (
        f"{lora.name} is peft's, without the adapter_config.json that has its alpha; alpha = rank is taken. Keep the "
        "file as adapter_model.safetensors next to its adapter_config.json."
    )


def kinds_of(lora: Lora) -> str:
    """All kinds of layer in the file, the most frequent first. Full diffs (of biases, norms) only if no other kind."""
    kinds = [kind for kind, _ in Counter(module.kind for module in lora.modules.values()).most_common()]
    return " + ".join(kind for kind in kinds if kind != "full diff" or len(kinds) == 1)


def base_of_lora(lora: Lora) -> Base:
    """The model family of a LoRA: from its metadata, else from the width of cross-attention."""
    if (base := base_from_metadata(lora.metadata)).family:
        return base
    for module in lora.modules.values():
        if re.search(r"attn2[._](processor\.)?to_[kv]$", module.name) and module.shape and module.shape[1] in WIDTHS:
            return Base(WIDTHS[module.shape[1]], f"cross-attention reads a width of {module.shape[1]}")
    return Base()


def base_from_metadata(metadata: Mapping[str, str]) -> Base:
    """The model family in modelspec.architecture, else in ss_base_model_version, else in ss_v2."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if (value := metadata.get(key, "")) and not value.startswith("unknown"):
            families = (family for family, pattern in _FAMILIES.items() if re.match(pattern, value))
            return Base(next(families, value.split("/")[0]), f"{key} {value}")
    return Base("SD2.x", "ss_v2 True") if metadata.get("ss_v2") == "True" else Base()


def _ranks(lora: Lora) -> str:
    """The rank of a LoRA's layers, or the smallest and the largest."""
    ranks = {module.rank for module in lora.modules.values()} - {None}
    return f"rank {_span(ranks)}" if ranks else "no rank"


def _alphas(lora: Lora) -> str:
    """The alpha of a LoRA's layers, or the smallest and the largest."""
    ranked = [module for module in lora.modules.values() if module.rank is not None]
    alphas = {module.alpha for module in ranked}
    if None not in alphas and alphas:
        return f"alpha {_span(alphas)}"
    return "alpha not given (as the rank)" if alphas == {None} else "no alpha" if not alphas else "alpha in part"


def _span(values: set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
