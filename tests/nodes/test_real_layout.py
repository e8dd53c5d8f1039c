"""A checkpoint of SD1.5's true layout and size, and one of SDXL's layout (random weights), go the whole road."""

import gc
import json
import shutil

import pytest
import torch
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.models import ldm
from retune.training.models.diffusers import load_model
from retune.training.models.protocols import Conditioning
from safetensors.torch import save_file

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "block_out_channels": (320, 640, 320),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 5),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, cheap_weights):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from retune.training.models.diffusers import SD1_VAE
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**SD1_VAE)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    parts = {
        ldm.UNET_PREFIX: ldm.to_ldm(unet.state_dict(), ldm.unet_names(unet.config)),
        ldm.VAE_PREFIX: ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config)),
        ldm.CLIP_PREFIX: {
            "text_model." + name.removeprefix("text_model."): value
            for name, value in text.state_dict().items()
            if "position_ids" not in name
        },
    }
    assert [len(part) for part in parts.values()] == [686, 248, 196]
    shapes = {prefix + name: value.shape for prefix, part in parts.items() for name, value in part.items()}
    path = tmp_path_factory.mktemp("sd15") / "sd15.safetensors"
    save_file(cheap_weights(shapes), path)
    return path


def write_t5(folder, **config):
    """A T5 encoder of random weights in Hugging Face's layout, fp16."""
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **config))
    path = folder / "t5.safetensors"
    save_file({n: v.half() for n, v in model.state_dict().items() if n != "encoder.embed_tokens.weight"}, path)
    return path


T5S = {
    "v1.1 base": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": 12},
    "XXL width": {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", T5S)
def test_swap_reset_train_save_and_load_again(comfyui, checkpoint, tmp_path, kind):
    import comfy.sd
    from retune.nodes.bridge import measure
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.clips import t5_clip
    from retune.nodes.common.weights import attention_weights, with_unet_weights
    from retune.training.data.dataset import from_images
    from retune.training.models.layers import ResetConfig, reset_weights
    from retune.training.recipes.unet import train_model
    from retune.training.text_encoder.projection import Projection

    t5 = write_t5(tmp_path, **T5S[kind])
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dataset = from_images([images], ["a red cat (sitting)", "two blue birds"])
    run = TrainModelConfig(
        run_name="r", steps=2, batch_size=1, learning_rate=1e-3, settings=TrainingSettings(warmup_steps=1)
    )
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), embedding_directory=None)
        swapped = t5_clip.load_t5_clip(t5, Projection(T5S[kind]["d_model"], 768))
        swapped, _ = measure.scale_clip(swapped, 0.9, ["a red cat", "two blue birds"])
        assert measure.clip_std(swapped, ["a red cat", "two blue birds"]) == pytest.approx(0.9, rel=1e-3)
        weights, _ = reset_weights(attention_weights(model), ResetConfig(layers="cross-attention"))
        model = with_unet_weights(model, weights)
        with text_to_image(model, swapped, vae) as view:
            assert view.judge is None
            trained = train_model(view, dataset, run, tmp_path / "runs")
        assert len(trained.unet) == 16 * 5
        model = with_unet_weights(model, trained.unet)
        saved = tmp_path / "trained.safetensors"
        comfy.sd.save_checkpoint(str(saved), model, clip, vae)
    del model, clip, vae, swapped, view, weights
    gc.collect()
    noisy, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0])
    words = Conditioning(torch.randn(1, 7, 768, generator=torch.Generator().manual_seed(4)))
    in_comfyui = predicted_by_comfyui(saved, trained.unet, noisy, sigma, words)
    gc.collect()
    torch.testing.assert_close(predicted_by_diffusers(saved, noisy, sigma, words), in_comfyui, atol=1e-3, rtol=1e-3)


def predicted_by_comfyui(saved, trained, noisy, sigma, words):
    import comfy.sd
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode

    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(saved), output_clip=False, output_vae=False)[0]
        state = model.model.diffusion_model.state_dict()
        for name, value in trained.items():
            torch.testing.assert_close(state[name].float(), value, atol=1e-3, rtol=1e-3)  # a half precision file
        with training_mode(), torch.no_grad():
            return ComfyDenoiser(model).predict(noisy, sigma, words).clone()


def predicted_by_diffusers(saved, noisy, sigma, words):
    import comfy.sd1_clip

    tokenizer = comfy.sd1_clip.__file__.replace("sd1_clip.py", "sd1_tokenizer")
    model = load_model(saved, tokenizer=tokenizer)
    with torch.no_grad():
        return model.denoiser.predict(noisy, sigma, words)


@pytest.fixture
def sdxl_checkpoint(tmp_path, cheap_weights):
    """SDXL's UNet under LDM names, fp16, 397 M parameters instead of 2.6 B: its third level is 320 wide, not 1280.

    All else is true, and with it all that ComfyUI knows SDXL by: the 1680 names, the first two widths, transformers of
    0, 2 and 10 blocks, heads of 64, a context of 2048, and 2816 numbers of pooled text and sizes.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    named = ldm.to_ldm(unet.state_dict(), ldm.unet_names(unet.config))
    assert len(named) == 1680
    path = tmp_path / "sdxl.safetensors"
    save_file(cheap_weights({ldm.UNET_PREFIX + name: value.shape for name, value in named.items()}), path)
    yield path
    path.unlink()


@pytest.mark.slow
def test_sdxl_trains_with_t5_and_comes_back_in_both_implementations(
    comfyui, sdxl_checkpoint, small_sdxl_clip, demo, core_demo, write_t5_folder, tmp_path
):
    """Two steps with a T5's context (2048) and pooled output (1280); then what ComfyUI saves, SDXL's own two CLIPs (at
    small size) included, gives the same numbers in the core."""
    import comfy.model_base
    import comfy.sd
    from retune.nodes.bridge.text_encoder import with_projection
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.clips import t5_clip
    from retune.nodes.common.weights import with_unet_weights
    from retune.nodes.text_encoder import widths
    from retune.training.data.dataset import from_images
    from retune.training.recipes.unet import train_model
    from retune.training.text_encoder.projection import Projection

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dataset = from_images([images], ["a red cat (sitting)", "two blue birds"])
    settings = TrainingSettings(warmup_steps=1, optimizer="SGD")
    run = TrainModelConfig(
        run_name="r", steps=2, batch_size=1, learning_rate=1e-2, settings=settings, train="cross-attention K/V"
    )
    saved = tmp_path / "trained.safetensors"
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(sdxl_checkpoint), output_clip=False, output_vae=False)[0]
        assert type(model.model) is comfy.model_base.SDXL
        width, pooled_width = widths("auto", model)
        assert (width, pooled_width) == (2048, 1280)
        projection = Projection(64, width, pooled_width=pooled_width)
        clip = t5_clip.load_t5_clip(write_t5_folder(tmp_path / "t5"), projection)
        with text_to_image(model, clip, demo[2]) as view:
            trained = train_model(view, dataset, run, tmp_path / "runs")
        assert len(trained.unet) == 2 * (2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2)
        for name in ("linear.weight", "pooled.weight"):
            assert not torch.equal(trained.projection[name], projection.state_dict()[name])
        assert t5_clip.output_widths(with_projection(clip, trained.projection)) == (2048, 1280)
        shutil.rmtree(tmp_path / "runs")  # pytest keeps the folders of three runs
        model = with_unet_weights(model, trained.unet)
        comfy.sd.save_checkpoint(
            str(saved), model, small_sdxl_clip, demo[2], metadata={"retune.config": small_parts(core_demo)}
        )
    del model, clip, view
    gc.collect()
    noisy, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0])
    words = Conditioning(
        *(torch.randn(1, *s, generator=torch.Generator().manual_seed(4)) for s in ((7, 2048), (1280,)))
    )
    in_comfyui = predicted_by_comfyui(saved, trained.unet, noisy, sigma, words)
    gc.collect()
    core = load_model(saved, tokenizer=comfyui / "comfy" / "sd1_tokenizer")
    saved.unlink()
    with torch.no_grad():
        prediction = core.denoiser.predict(noisy, sigma, words)
    assert prediction.std() > 0.1
    torch.testing.assert_close(prediction, in_comfyui, atol=1e-3, rtol=1e-3)
    for text in ("a red cat, sitting", "", "one " * 90):
        with torch.inference_mode():
            own = small_sdxl_clip.encode_from_tokens(small_sdxl_clip.tokenize(text), return_pooled=True)
            found = core.text_encoder.encode(core.text_encoder.tokenize([text]))
        torch.testing.assert_close(found.context, own[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.pooled, own[1], atol=1e-4, rtol=1e-4)


def small_parts(core_demo):
    """What cannot be read from the shapes of the demo's VAE and of `small_sdxl_clip`, as JSON."""
    text = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 49408}
    text |= {"bos_token_id": 49406, "eos_token_id": 49407}
    first = text | {"hidden_size": 32, "hidden_act": "quick_gelu"}
    second = text | {"hidden_size": 64, "hidden_act": "gelu", "projection_dim": 64}
    return json.dumps({"vae": dict(core_demo.autoencoder.network.config), "clip": first, "clip_2": second})
