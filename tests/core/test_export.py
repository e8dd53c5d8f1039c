"""Configs read back from shapes, and tokenizers found by their fingerprint."""

import pytest
import torch
from retune.training.commands.export_diffusers import (
    BYT5,
    ImageParts,
    build_unet,
    build_vae,
    export_pipeline,
    find_tokenizer_file,
    scheduler,
)
from retune.training.models import ldm
from retune.training.models.diffusers import SD1_VAE
from retune.training.text_encoder.tokenizers import load_tokenizer


@pytest.mark.parametrize("layers, channels", [(2, (128, 256, 512, 512)), (0, (32, 64, 64, 64)), (1, (32, 64))])
def test_a_vae_is_described_from_its_shapes(layers, channels):
    from diffusers import AutoencoderKL

    config = SD1_VAE | {"layers_per_block": layers, "block_out_channels": channels}
    for side in ("Down", "Up"):
        kind = "DownEncoderBlock2D" if side == "Down" else "UpDecoderBlock2D"
        config[f"{side.lower()}_block_types"] = (kind,) * len(channels)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    names = ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config))
    found = ldm.vae_config({name: value.shape for name, value in names.items()})
    expected = {name: vae.config[name] for name in found}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()} == found
    with torch.device("meta"):
        again = AutoencoderKL.from_config(found)
    shapes = [{n: p.shape for n, p in one.state_dict().items()} for one in (vae, again)]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="expected an AutoencoderKL"):
        ldm.vae_config({"decoder.1.weight": torch.Size([64, 4, 3, 3])})


SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def on_meta(heads=8, **config):
    """Names and shapes of Stable Diffusion's UNet and VAE at their true size, without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**config), AutoencoderKL(**SD1_VAE)
    return unet, ImageParts(
        unet=ldm.to_ldm(unet.state_dict(), ldm.unet_names(unet.config)),
        num_heads=heads,
        prediction_type="eps",
        vae=ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config)),
        scaling_factor=0.13025,
    )


@pytest.mark.parametrize("heads, config", [(8, SD1), (None, SD2)])
def test_the_true_layouts_are_rebuilt(heads, config):
    unet, parts = on_meta(heads, **config)
    built, vae = build_unet(parts), build_vae(parts)
    assert len(built.state_dict()) == 686 and len(vae.state_dict()) == 248
    counts = [[m.heads for m in one.modules() if hasattr(m, "heads")] for one in (unet, built)]
    assert counts[0] == counts[1] and len(counts[0]) == 32
    assert built.config.sample_size == 64 and vae.config.scaling_factor == 0.13025


def test_other_kinds_of_unet_are_refused():
    with pytest.raises(ValueError, match="MODEL is one of SDXL; expected a plain text-to-image model"):
        build_unet(on_meta(**SD1, **SDXL)[1])
    with pytest.raises(ValueError, match="MODEL is one of 9 input channels"):
        build_unet(on_meta(**SD1, in_channels=9)[1])


def test_the_scheduler_has_the_training_noise_levels():
    from retune.training.models.diffusers import SD1_SCHEDULER, training_sigmas

    found = scheduler("v")
    kept = found.alphas_cumprod
    torch.testing.assert_close(((1 - kept) / kept).sqrt(), training_sigmas(SD1_SCHEDULER), rtol=1e-4, atol=1e-5)
    assert found.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="MODEL predicts flow; expected one of eps, v"):
        scheduler("flow")


def test_the_tokenizer_is_found_by_its_fingerprint(tmp_path, write_t5_folder):
    folder = write_t5_folder(tmp_path / "t5")
    fingerprint = load_tokenizer(folder).fingerprint
    name, content = find_tokenizer_file(folder, fingerprint)
    assert name == "tokenizer.json" and content == (folder / "tokenizer.json").read_bytes()
    assert find_tokenizer_file(folder, BYT5) == (BYT5, b"")
    (tmp_path / "tokenizer").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer" / "tokenizer.json")
    assert find_tokenizer_file(folder, fingerprint)[1] == content
    with pytest.raises(ValueError, match="tokenizer of t5 is not beside it any more"):
        find_tokenizer_file(folder, "0" * 64)


def test_a_bad_name_is_refused_before_anything_is_looked_at(tmp_path):
    with pytest.raises(ValueError, match="folder_name is '../x'"):
        export_pipeline(tmp_path, "../x", None, None)
