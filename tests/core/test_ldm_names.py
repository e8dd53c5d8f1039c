"""The original checkpoint layout: names against diffusers' own converters, configs read back from shapes."""

import pytest
import torch
from retune.training.models import ldm

SD1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD2 = SD1 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILIES = {"SD1.5": (SD1, 686), "SD2": (SD2, 686), "SDXL": (SDXL, 1680)}


def unet_shapes(config):
    """diffusers name -> meta tensor of a UNet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config).state_dict()


def vae_shapes():
    from diffusers import AutoencoderKL
    from retune.training.models.diffusers import SD1_VAE

    with torch.device("meta"):
        return AutoencoderKL(**SD1_VAE).state_dict()


def tagged(state):
    """Tensors of one element each, all different, of the same number of dimensions."""
    return {name: torch.full((1,) * t.ndim, float(i)) for i, (name, t) in enumerate(state.items())}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_config_comes_back_from_the_shapes(family):
    config, count = FAMILIES[family]
    state = unet_shapes(config)
    in_file = ldm.to_ldm(state, ldm.unet_names(config))
    assert len(state) == len(in_file) == count
    read = ldm.unet_config({name: tensor.shape for name, tensor in in_file.items()})
    again = unet_shapes(read)
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in state.items()}
    heads = config["attention_head_dim"]
    assert read["attention_head_dim"] == heads


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_names_are_those_of_diffusers_converter(family):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config, _ = FAMILIES[family]
    tags = tagged(unet_shapes(config))
    names = ldm.unet_names(config)
    in_file = ldm.to_ldm(tags, names)
    theirs = convert_ldm_unet_checkpoint({ldm.UNET_PREFIX + n: t for n, t in in_file.items()}, dict(config))
    same(theirs, tags)
    same(ldm.to_diffusers(in_file, names), tags)


def test_vae_names_are_those_of_diffusers_converter():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from retune.training.models.diffusers import SD1_VAE

    state = vae_shapes()
    tags, names = tagged(state), ldm.vae_names(SD1_VAE)
    in_file = ldm.to_ldm(tags, names)
    assert len(in_file) == 248
    assert {n for n, t in in_file.items() if "attn_1" in n and n.endswith("weight") and t.ndim == 4} == {
        f"{side}.mid.attn_1.{part}.weight" for side in ("encoder", "decoder") for part in ("q", "k", "v", "proj_out")
    }
    theirs = convert_ldm_vae_checkpoint({ldm.VAE_PREFIX + n: t for n, t in in_file.items()}, dict(SD1_VAE))
    same(theirs, tags)
    same(ldm.to_diffusers(in_file, names), tags)


def test_known_names_of_sd1():
    names = {b: a for a, b in ldm.unet_names(SD1).items()}
    known = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": "input_blocks.1.1.transformer_blocks.0."
        "attn2.to_k.weight",
        "mid_block.attentions.0.proj_in.bias": "middle_block.1.proj_in.bias",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "conv_out.bias": "out.2.bias",
    }
    assert {name: ldm.rename(name, names) for name in known} == known


def test_a_name_of_another_model_is_refused():
    with pytest.raises(ValueError, match="parameter name is 'double_blocks.0.img_attn.qkv.weight'"):
        ldm.to_diffusers({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, ldm.unet_names(SD1))


def test_a_file_without_cross_attention_is_refused():
    with pytest.raises(ValueError, match="holds no UNet with cross-attention"):
        ldm.unet_config({"input_blocks.0.0.weight": torch.Size([320, 4, 3, 3])})
