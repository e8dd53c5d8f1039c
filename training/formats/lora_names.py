"""The name of a LoRA's layer in each tool.

Inside this package a layer has ComfyUI's name, which follows the original (ldm) layout:
`diffusion_model.input_blocks.1.1.proj_in`, `text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1`, for
a T5 `text_encoders.t5base.transformer.encoder.block.0.layer.0.SelfAttention.q`. `Naming` converts it to kohya's and
diffusers' names and back. The names depend on the model family and on the number of layers in a UNet block;
`detect_naming` finds both from a LoRA's layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..common.foreign import short, whole_number
from ..common.text import first_few
from ..models import ldm
from .lora import Lora, LoraModule, magnitude_axis
from .lora_keys import kohya_aliases
from .lora_report import WIDTHS, base_of_lora

UNET, TEXT = "diffusion_model.", "text_encoders."
"""Prefixes of ComfyUI's layer names."""
SECOND_TEXT = TEXT + "clip_g."
"""Prefix of the layers of SDXL's second text encoder."""
FAMILIES = ("SD1.x", "SD2.x", "SDXL")
_ATTENTION = {"SD1.x": (True, True, True, False), "SD2.x": (True, True, True, False), "SDXL": (False, True, True)}
"""Whether each resolution of a family's UNet has attention, the finest first."""
_UNKNOWN_LEVELS = 8
_MAX_LAYERS_PER_BLOCK = 4
_MOST_LAYERS = 99
"""Layers per block that a UNet's config may have, far above all known ones."""

_CONVOLUTIONS = re.compile(r"(in_layers\.2|out_layers\.3|\.op|_blocks\.\d+\.\d\.conv|input_blocks\.0\.0|^out\.2)$")
_IN_TRANSFORMER = {
    f"{kind}{number}{end}".replace(".", "_"): f"{kind}{number}{end}"
    for kind, ends in {"attn": (".to_q", ".to_k", ".to_v", ".to_out.0"), "norm": ("",)}.items()
    for number in (1, 2, 3)
    for end in ends
} | {"ff_net_0_proj": "ff.net.0.proj", "ff_net_2": "ff.net.2"}
_CLIP_LAYER = re.compile(r"text_model[._]encoder[._]layers[._](\d+)[._](self_attn|mlp)[._]([qkv]_proj|out_proj|fc[12])")
_T5_LAYER = re.compile(r"encoder[._]block[._](\d+)[._]layer[._](\d)[._](SelfAttention|DenseReluDense)[._](\w+)")
_TEXT_LAYER = re.compile(r"text_encoders\.(?P<encoder>\w+)\.transformer\.(?P<path>.+)")
_KOHYA_TEXT = re.compile(r"lora_te(?P<number>\d?)_(?P<path>.+)")
_BLOCK = re.compile(r"(input|output)_blocks[._](\d{1,2})[._](\d)[._]?(\w*)")
_DIFFUSERS_BLOCK = re.compile(r"(down|up)_blocks[._](\d{1,2})[._](?:attentions|resnets)[._](\d{1,2})(?!\d)")
"""Numbers of blocks; a name with a longer number is none of a UNet's, whatever a file says."""


@dataclass(frozen=True)
class Naming:
    """Converts layer names of one model between tools.

    Args:
        family: One of FAMILIES, "" for others.
        layers_per_block: As in a UNet2DConditionModel's config.
        attention: Whether each resolution has attention, the finest first; None if unknown.
        linear_projection: Whether proj_in and proj_out are linear layers instead of 1x1 convolutions; None if unknown.
    """

    family: str = ""
    layers_per_block: int = 2
    attention: tuple[bool, ...] | None = None
    linear_projection: bool | None = None

    @classmethod
    def from_family(cls, family: str) -> Naming:
        """The naming of the standard SD1.x, SD2.x or SDXL models."""
        return cls(family, 2, _ATTENTION[family], family != "SD1.x")

    @classmethod
    def from_unet_config(cls, config: Mapping) -> Naming:
        """The naming for a UNet2DConditionModel's config; its cross_attention_dim determines the family.

        Raises ValueError for a damaged config.
        """
        kinds = config.get("down_block_types")
        if (
            not isinstance(kinds, list | tuple)
            or not 0 < len(kinds) <= _MOST_LAYERS
            or not all(isinstance(k, str) for k in kinds)
        ):
            raise ValueError(f"down_block_types of the UNet's config is {short(kinds)}; expected a list of kinds.")
        layers = whole_number(
            config.get("layers_per_block"), "layers_per_block of the UNet's config", most=_MOST_LAYERS
        )
        attention, width = tuple("CrossAttn" in kind for kind in kinds), config.get("cross_attention_dim")
        family = WIDTHS.get(width, "") if isinstance(width, int) else ""
        if family and (attention != _ATTENTION[family] or layers != 2):
            family = ""
        return cls(family, layers, attention, bool(config.get("use_linear_projection")))

    @cached_property
    def _to_diffusers(self) -> dict[str, str]:
        """Original module prefix -> diffusers'. If attention is unknown, both possible names of an upsampler."""
        levels = self.attention or (True,) * _UNKNOWN_LEVELS
        kinds = ["CrossAttn" if has_attention else "" for has_attention in levels]
        config = {"block_out_channels": levels, "layers_per_block": self.layers_per_block}
        names = ldm.unet_names(config | {"down_block_types": kinds, "up_block_types": kinds[::-1]})
        alternatives = {re.sub(r"\.2\.conv$", ".1.conv", name): path for name, path in names.items()}
        return alternatives | names

    @cached_property
    def _to_original(self) -> dict[str, str]:
        """Module prefix in the original or diffusers' layout, with underscores -> original module prefix."""
        names = {path: name for name, path in self._to_diffusers.items()} | {name: name for name in self._to_diffusers}
        return {name.replace(".", "_"): original for name, original in names.items()}

    @cached_property
    def _longest_prefix(self) -> int:
        """Number of parts of the longest prefix in `_to_original`."""
        return max(name.count("_") + 1 for name in self._to_original)

    def comfyui_name(self, name: str) -> str | None:
        """ComfyUI's name for a layer named by any tool; None if not in a Stable Diffusion UNet, a CLIP or a T5."""
        for alias in kohya_aliases(name):
            if alias.startswith((UNET, TEXT)):
                return alias
            if alias.startswith("lora_unet_") and (path := self._unet_path(alias.removeprefix("lora_unet_"))):
                return UNET + path
            if (text := _KOHYA_TEXT.fullmatch(alias)) and (path := _text_path(text["path"])):
                return f"{TEXT}{self._text_encoder(text['number'], path)}.transformer.{path}"
        return None

    def _text_encoder(self, number: str, path: str) -> str:
        """ComfyUI's name of the encoder of a layer with kohya's prefix `lora_te<number>_`; a T5 may have any number."""
        if path.startswith("encoder.block"):
            return "t5"
        return "clip_g" if number == "2" else "clip_h" if self.family == "SD2.x" else "clip_l"

    def kohya_name(self, layer: str) -> str | None:
        """kohya's name for a layer with ComfyUI's name `layer`; None if kohya's format has no name for it.

        UNet layers follow diffusers' layout; those of SDXL and of models other than Stable Diffusion follow the
        original one. kohya's trainers support T5 for Flux only; a T5 layer here becomes `lora_te1_encoder_block_...`,
        which RetuneApplyLora reads for a T5 of any size, and ComfyUI's loader for T5-XXL only.

        Raises:
            ValueError: A UNet layer does not exist in this layout.
        """
        if layer.startswith(UNET):
            path = layer.removeprefix(UNET)
            path = ldm.rename(path, self._to_diffusers) if self.family != "SDXL" and _in_unet(path) else path
            return "lora_unet_" + path.replace(".", "_")
        return self._kohya_text_name(layer)

    def own_kohya_name(self, name: str, clip: bool = True) -> str | None:
        """The name of a text encoder's layer that is kohya's already; None for others.

        The number in its prefix tells which of a model's encoders it is, and the layers of one encoder alone do not
        tell which model that was: `lora_te1_` is SDXL's, SD3's or Flux's, `lora_te3_` SD3's T5.

        clip: Whether a CLIP's layer has one; where the family is known, `kohya_name` tells its number.
        """
        path = (text := _KOHYA_TEXT.fullmatch(name)) and _text_path(text["path"])
        return name if path and (clip or path.startswith("encoder.block")) else None

    def _kohya_text_name(self, layer: str) -> str | None:
        """kohya's name for a layer of a text encoder; None if there is none."""
        text = _TEXT_LAYER.fullmatch(layer)
        path = text and _text_path(text["path"])
        if not path:
            return None
        prefixes = {"clip_g": "lora_te2_", "clip_l": "lora_te1_" if self.family == "SDXL" else "lora_te_"}
        default = "lora_te1_" if path.startswith("encoder.block") else "lora_te_"
        return prefixes.get(text["encoder"], default) + path.replace(".", "_")

    def diffusers_path(self, layer: str) -> tuple[str, str] | None:
        """(component of the pipeline, path in it) for a layer; None if it is not in a Stable Diffusion UNet or a CLIP.

        None for T5 layers too: `load_lora_weights` raises an error for a T5 that replaces a CLIP.
        """
        if layer.startswith(UNET):
            path = layer.removeprefix(UNET)
            return ("unet", ldm.rename(path, self._to_diffusers)) if _in_unet(path) else None
        text = _TEXT_LAYER.fullmatch(layer)
        path = text and _text_path(text["path"])
        if not path or path.startswith("encoder.block"):
            return None
        return ("text_encoder_2" if text["encoder"] == "clip_g" else "text_encoder", path)

    def kernel_size(self, layer: str) -> tuple[int, ...] | None:
        """(height, width) of a layer's convolution kernel, () for a linear layer, None if unknown."""
        path = layer.removeprefix(UNET)
        if layer.startswith(UNET) and not _in_unet(path):
            return None
        if re.search(r"\.proj_(in|out)$", path):
            return None if self.linear_projection is None else () if self.linear_projection else (1, 1)
        if layer.startswith(UNET) and path.endswith("skip_connection"):
            return (1, 1)
        return (3, 3) if layer.startswith(UNET) and _CONVOLUTIONS.search(path) else ()

    def dora_axis(self, module: LoraModule) -> int | None:
        """0 if a layer's DoRA magnitude varies along its outputs, 1 if along its inputs, None without DoRA."""
        layer = self.comfyui_name(module.name)
        return magnitude_axis(module, (layer and self.kernel_size(layer)) or ())

    def _unet_path(self, name: str) -> str | None:
        """The original path of a layer with underscores in the original or diffusers' layout; None if unknown."""
        parts = name.split("_")
        for cut in range(min(len(parts), self._longest_prefix), 0, -1):
            if (prefix := self._to_original.get("_".join(parts[:cut]))) is None:
                continue
            rest = "_".join(parts[cut:])
            block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", rest)
            if block and block[2] in _IN_TRANSFORMER:
                return f"{prefix}.transformer_blocks.{block[1]}.{_IN_TRANSFORMER[block[2]]}"
            if rest in ("", "norm", "proj_in", "proj_out"):
                return f"{prefix}.{rest}".rstrip(".")
        return None


def detect_naming(lora: Lora, base: str = "auto", unet_config: Mapping | None = None) -> Naming:
    """Determines the layer naming of the model that a LoRA was trained on.

    Args:
        lora: The LoRA.
        base: The model family, one of FAMILIES. "auto" derives it from the first of these that decides: the metadata,
            the width of cross-attention, the text encoders, the blocks with attention.
        unet_config: The UNet2DConditionModel's config; takes precedence over `base`.

    Raises:
        ValueError: `base` is unknown, or the LoRA has block numbers that a UNet with that many layers per block lacks.
    """
    if base != "auto" and base not in FAMILIES:
        raise ValueError(f"base is {base!r}; expected auto, {', '.join(FAMILIES)}.")
    if unet_config is not None:
        naming = Naming.from_unet_config(unet_config)
    elif base != "auto":
        naming = Naming.from_family(base)
    else:
        layers = _layers_per_block(lora.modules, is_known_family=base_of_lora(lora).family in FAMILIES)
        family = _guess_family(lora) if layers == 2 else ""
        naming = Naming.from_family(family) if family else Naming(layers_per_block=layers)
    if not all(_may_exist(block, naming.layers_per_block) for block in _original_blocks(lora.modules)):
        names = [name for name in lora.modules if _BLOCK.search(name)]
        raise ValueError(
            f"{lora.name} has layers such as {first_few(names)}, which a UNet of {naming.layers_per_block} layers per "
            f"block ({naming.family or 'unknown family'}) lacks. Choose the base it was trained on, or connect its run."
        )
    return naming


def _in_unet(path: str) -> bool:
    """Whether a path is one of a Stable Diffusion UNet in the original layout."""
    return re.match(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.", path) is not None


def _text_path(path: str) -> str | None:
    """A text layer's path, given with dots or underscores, with dots; None unless a linear layer of a CLIP or T5."""
    if path == "text_projection":
        return path
    if clip := _CLIP_LAYER.fullmatch(path):
        return "text_model.encoder.layers.{}.{}.{}".format(*clip.groups())
    t5 = _T5_LAYER.fullmatch(path)
    return t5 and "encoder.block.{}.layer.{}.{}.{}".format(*t5.groups())


def _guess_family(lora: Lora) -> str:
    """The model family of a LoRA for a UNet with two layers per block; "" if nothing decides it."""
    if (family := base_of_lora(lora).family) in FAMILIES:
        return family
    names = " ".join(lora.modules)
    if "lora_te2_text_model" in names or "clip_g" in names or "text_encoder_2." in names:
        return "SDXL"
    if "clip_h" in names:
        return "SD2.x"
    return _family_of_unet(lora, names)


def _family_of_unet(lora: Lora, names: str) -> str:
    """SD1.x or SDXL, by the UNet blocks that have attention; "" if nothing decides it.

    names: The names of all layers, separated by spaces.
    """
    with_attention = {(side, number) for side, number, module, part in _original_blocks(lora.modules) if module == 1}
    if with_attention & ({("input", n) for n in (1, 2)} | {("output", n) for n in range(6, 12)}):
        return "SD1.x"
    has_late_block = any(number > 8 for _, number, *_ in _original_blocks(lora.modules))
    if has_late_block or re.search(r"down_blocks[._]0[._]attentions|up_blocks[._]3[._]", names):
        return "SD1.x"
    has_deep_transformer = re.search(r"transformer_blocks[._][1-9]|up_blocks[._]0[._]attentions", names)
    if has_deep_transformer or with_attention & {("output", n) for n in (0, 1)}:
        return "SDXL"
    has_unet = with_attention or re.search(r"_blocks|unet|diffusion_model", names)
    is_one_of_several = re.search(r"lora_te\d_", names)  # SDXL's, SD3's or Flux's
    return "SD1.x" if "text_model" in names and not has_unet and not is_one_of_several else ""


def _original_blocks(names: Iterable[str]) -> set[tuple[str, int, int, str]]:
    """(side, block, module in it, first part of the rest) of all names in the original layout."""
    matches = (_BLOCK.search(name) for name in names)
    return {(m[1], int(m[2]), int(m[3]), re.split(r"[._]", m[4])[0]) for m in matches if m}


def _may_exist(block: tuple[str, int, int, str], layers: int) -> bool:
    """Whether a UNet with this many layers per resolution can have a block (see `_original_blocks`)."""
    side, number, _, part = block
    last = number % (layers + 1) == 0 if side == "input" else (number + 1) % (layers + 1) == 0
    if part == "op" or (side == "output" and part == "conv"):
        return last
    return number == 0 or side == "output" or not last


def _layers_per_block(names: Iterable[str], is_known_family: bool) -> int:
    """Guesses a UNet's layers per resolution from layer names; 2 for a known family if the names allow it."""
    blocks = _original_blocks(names)
    fitting = [n for n in range(1, _MAX_LAYERS_PER_BLOCK + 1) if all(_may_exist(block, n) for block in blocks)]
    if is_known_family and 2 in fitting:
        return 2
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := _DIFFUSERS_BLOCK.search(name):
            numbers[match[1]].add(int(match[3]))
    if numbers:
        return max([number + 1 for number in numbers["down"]] + [*numbers["up"], 1])
    complete = [n for n in fitting if _is_complete(blocks, n)]
    return (complete or [n for n in fitting if n == 2] or fitting or [2])[0]


def _is_complete(blocks: set[tuple[str, int, int, str]], layers: int) -> bool:
    """Whether every resolution with attention has it in all its layers, on both sides of the UNet."""
    for side, first, count in (("input", 1, layers), ("output", 0, layers + 1)):
        levels: dict[int, int] = defaultdict(int)
        for number in {number for s, number, module, part in blocks if s == side and module == 1 and part != "conv"}:
            levels[(number - first) // (layers + 1)] += 1
        if not levels or set(levels.values()) != {count}:
            return False
    return True
