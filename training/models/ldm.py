"""The original (LDM) checkpoint layout of Stable Diffusion, by name and by shape.

`*_names` map LDM parameter prefixes to diffusers ones for a given diffusers config; `to_diffusers` and `to_ldm` rename
whole state dicts. `unet_config` reads the diffusers config back from an LDM state dict's shapes. LDM names are the
project's canonical names: run folders and saved files use them, whichever implementation trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.foreign import count_numbered

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
SDXL_CLIP_PREFIXES = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
SD2_CLIP_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
"""Of the original repository, and of SDXL's (sgm)."""
MOST_BLOCKS = 64
"""Input blocks of a UNet; known ones have up to 12."""

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _children(ldm: str, diffusers: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in table.items()}


def unet_names(config: Mapping) -> dict[str, str]:
    """LDM module prefix -> diffusers module prefix for a UNet2DConditionModel config."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    names |= _children("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    names |= _children("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    for i, kind in enumerate(config["down_block_types"]):
        for j in range(layers):
            names |= _unet_layer(f"input_blocks.{1 + i * (layers + 1) + j}", f"down_blocks.{i}", j, kind)
        if i < levels - 1:
            names[f"input_blocks.{(i + 1) * (layers + 1)}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
    for i, kind in enumerate(config["up_block_types"]):
        for j in range(layers + 1):
            names |= _unet_layer(f"output_blocks.{i * (layers + 1) + j}", f"up_blocks.{i}", j, kind)
        if i < levels - 1:
            upsample = f"output_blocks.{i * (layers + 1) + layers}.{2 if 'CrossAttn' in kind else 1}.conv"
            names[upsample] = f"up_blocks.{i}.upsamplers.0.conv"
    return names


def _unet_layer(ldm: str, diffusers: str, number: int, kind: str) -> dict[str, str]:
    """A resnet and, in blocks with attention, a transformer: one LDM block, one layer of a diffusers block."""
    attention = {f"{ldm}.1": f"{diffusers}.attentions.{number}"} if "CrossAttn" in kind else {}
    return _children(f"{ldm}.0", f"{diffusers}.resnets.{number}", _UNET_RESNET) | attention


def vae_names(config: Mapping) -> dict[str, str]:
    """LDM module prefix -> diffusers module prefix for an AutoencoderKL config."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side, blocks, per_level in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        names |= _children(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
        for j in (0, 1):
            names |= _children(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}", _VAE_RESNET)
        for i in range(levels):
            ldm = f"{side}.{blocks}.{i if side == 'encoder' else levels - 1 - i}"
            diffusers = f"{side}.{blocks}_blocks.{i}"
            for j in range(per_level):
                names |= _children(f"{ldm}.block.{j}", f"{diffusers}.resnets.{j}", _VAE_RESNET)
            if i < levels - 1:
                names[f"{ldm}.{blocks}sample.conv"] = f"{diffusers}.{blocks}samplers.0.conv"
    return names


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replaces the longest module prefix in `prefixes` of a parameter name; ValueError when none fits."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        prefix = ".".join(parts[:cut])
        if prefix in prefixes:
            return ".".join([prefixes[prefix], *parts[cut:]])
    raise ValueError(
        f"parameter name is {name!r}; expected a name of this model's layout. The file is of another model."
    )


def to_diffusers(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Renames an LDM state dict; 1x1 convolutions of the VAE's attention become linear layers."""
    return {rename(k, names): _linear_if_attention(rename(k, names), v) for k, v in state.items()}


def to_ldm(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    inverse = {b: a for a, b in names.items()}
    return {rename(k, inverse): _conv_if_attention(rename(k, inverse), v) for k, v in state.items()}


def _linear_if_attention(name: str, tensor: Tensor) -> Tensor:
    in_attention = re.search(r"mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight$", name)
    return tensor[:, :, 0, 0] if in_attention and tensor.ndim == 4 else tensor


def _conv_if_attention(name: str, tensor: Tensor) -> Tensor:
    in_attention = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name)
    return tensor[:, :, None, None] if in_attention and tensor.ndim == 2 else tensor


def unet_config(shapes: Mapping[str, torch.Size], num_heads: int | None = None) -> dict:
    """The UNet2DConditionModel config of an LDM UNet (prefix stripped), from shapes alone.

    Head counts are not in the shapes: 8 heads for a 768-wide context (SD1.x), 64 channels per head for wider ones (SD2,
    SDXL), unless `num_heads` is given. Raises ValueError when the tensors are not a UNet with cross-attention.
    """
    if "input_blocks.0.0.weight" not in shapes or not any(k.endswith("attn2.to_k.weight") for k in shapes):
        raise ValueError(
            "checkpoint holds no UNet with cross-attention (input_blocks, attn2.to_k); expected an SD1.x, SD2 or SDXL "
            "file in the original layout. Convert it, or give a diffusers folder."
        )
    context = next(shape[1] for k, shape in shapes.items() if k.endswith("attn2.to_k.weight"))
    levels = _levels(shapes)
    channels = [level.channels for level in levels]
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0].depths),
        "cross_attention_dim": context,
        "attention_head_dim": num_heads or (8 if context == 768 else [c // 64 for c in channels]),
        "use_linear_projection": next(len(v) == 2 for k, v in shapes.items() if k.endswith(".1.proj_in.weight")),
        **_block_types(shapes, levels),
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


@dataclass(frozen=True)
class _Level:
    """The layers of one resolution: their width, and the depth of each one's transformer, 0 without attention."""

    channels: int
    depths: list[int]


def _block_types(shapes: Mapping[str, torch.Size], levels: list[_Level]) -> dict:
    """The kinds of blocks and the depths of their transformers.

    Distilled SDXL (SSD-1B, Segmind Vega, KOALA) has other depths on the way up than on the way down, and a smaller
    middle or none. Another model without a middle is an incomplete file.
    """
    layers = len(levels[0].depths)
    down = [level.depths for level in levels]
    up = [
        [_depth(shapes, f"output_blocks.{i * (layers + 1) + j}.1.") for j in range(layers + 1)]
        for i in range(len(down))
    ]
    if any(0 in depths and any(depths) for depths in down + up) or any(len(depths) != layers for depths in down):
        raise ValueError(
            "checkpoint has levels of unequal layers; expected as many in each, with attention in all of a level's "
            "layers or in none. Use another checkpoint."
        )
    config = {
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in up],
    }
    if "label_emb.0.0.weight" in shapes:
        config["mid_block_type"] = _mid_block_type(shapes)
    if all(len({*depths, *back}) == 1 for depths, back in zip(down, reversed(up), strict=True)):
        return config | {"transformer_layers_per_block": [max(depths[0], 1) for depths in down]}
    return config | {
        "transformer_layers_per_block": [depths if any(depths) else 1 for depths in down],
        "reverse_transformer_layers_per_block": [depths if any(depths) else 1 for depths in up],
    }


def _mid_block_type(shapes: Mapping[str, torch.Size]) -> str | None:
    if "middle_block.1.proj_in.weight" in shapes:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if "middle_block.0.in_layers.2.weight" in shapes else None


def _depth(shapes: Mapping[str, torch.Size], block: str) -> int:
    return count_numbered((k for k in shapes if k.startswith(block)), f"{block}transformer_blocks.")


def vae_config(shapes: Mapping[str, torch.Size]) -> dict:
    """The AutoencoderKL config of an LDM VAE (prefix stripped), from shapes alone; without its scaling factor.

    Raises ValueError when the tensors are not an AutoencoderKL's.
    """
    levels = count_numbered(shapes, "decoder.up.")
    layers = count_numbered(shapes, "decoder.up.0.block.")
    if not layers or "encoder.conv_in.weight" not in shapes:
        raise ValueError(
            "VAE holds no encoder and decoder of the original layout (encoder.conv_in, decoder.up); expected an "
            "AutoencoderKL as in SD1.x, SD2 and SDXL. TAESD and other kinds do not go."
        )
    return _vae_config(shapes, levels, layers)


def _vae_config(shapes: Mapping[str, torch.Size], levels: int, layers: int) -> dict:
    """The config; `layers` is the number of residual blocks per level of the decoder."""
    widths = [f"decoder.up.{i}.block.0.conv2.weight" for i in range(levels)]
    if missing := set(widths) - shapes.keys():
        raise ValueError(f"VAE in the checkpoint lacks {len(missing)} tensors such as {min(missing)!r}.")
    first = shapes.get("decoder.conv_in.weight")
    return ({} if first is None else {"latent_channels": first[1]}) | {
        "block_out_channels": [shapes[width][0] for width in widths],
        "layers_per_block": layers - 1,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _levels(shapes: Mapping[str, torch.Size]) -> list[_Level]:
    """One per resolution, from the input blocks in order. Raises ValueError for more blocks than any model has."""
    levels, block = [_Level(0, [])], 1
    while any(f"input_blocks.{block}.0.{part}.weight" in shapes for part in ("op", "in_layers.2")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append(_Level(0, []))
        else:
            width = shapes[f"input_blocks.{block}.0.in_layers.2.weight"][0]
            levels[-1] = _Level(width, [*levels[-1].depths, _depth(shapes, f"input_blocks.{block}.1.")])
        block += 1
        if block > MOST_BLOCKS:
            raise ValueError(f"the UNet has more than {MOST_BLOCKS} input blocks; expected SD1.x's, SD2.x's or SDXL's.")
    return levels
