"""OpenCLIP's layouts: of text encoders, as in the original SDXL and SD2 checkpoints, and of image encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..common.foreign import count_numbered

_OUTSIDE_BLOCKS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_VISION_OUTSIDE_BLOCKS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
VISUAL = "visual."
VIT_H_WIDTH, VIT_H_LAYERS = 1024, 24
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP text encoder's tensors under CLIPTextModelWithProjection's names, `text_model.` left out.

    q, k and v are one tensor in OpenCLIP's files, and the projection of the original file is transposed.
    """
    result = _blocks(state)
    result |= {_OUTSIDE_BLOCKS[name]: tensor for name, tensor in state.items() if name in _OUTSIDE_BLOCKS}
    if "text_projection" in state:
        result["text_projection.weight"] = state["text_projection"].T.contiguous()
    return result


def penultimate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP text encoder under CLIPTextModel's names, without its last layer and projection.

    SD2.x reads the states before that layer, after the final norm. diffusers' folders of SD2.x lack the layer too.
    """
    result = to_transformers(state)
    layers = count_numbered(result, "encoder.layers.")
    if layers < 2:
        raise ValueError(f"the text encoder has {layers} layers; expected OpenCLIP's ViT-H. Use a complete checkpoint.")
    real = state["ln_final.weight"].shape == (VIT_H_WIDTH,)
    used = min(layers, VIT_H_LAYERS - 1) if real else layers - 1  # some files of SD2.x lack the last layer
    left_out = (*(f"encoder.layers.{number}." for number in range(used, layers)), "text_projection.")
    return {name: tensor for name, tensor in result.items() if not name.startswith(left_out)}


def vision_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP image encoder's `visual.*` tensors under CLIPVisionModelWithProjection's names, `vision_model.` left
    out."""
    state = {name.removeprefix(VISUAL): tensor for name, tensor in state.items() if name.startswith(VISUAL)}
    names = _VISION_OUTSIDE_BLOCKS
    result = _blocks(state) | {names[name]: tensor for name, tensor in state.items() if name in names}
    if "proj" in state:
        result["visual_projection.weight"] = state["proj"].T.contiguous()
    return result


def _blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of either encoder."""
    result = {}
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if block and block[2] == "attn.in_proj":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                result[f"encoder.layers.{block[1]}.self_attn.{part}_proj.{block[3]}"] = rows
        elif block and block[2] in _IN_BLOCKS:
            result[f"encoder.layers.{block[1]}.{_IN_BLOCKS[block[2]]}.{block[3]}"] = tensor
    return result
