"""A checkpoint of SD1.5's true layout and size (random weights) goes the whole road."""

import gc

import pytest
import torch
from retune.training.config import TrainingSettings, TrainModelConfig
from retune.training.formats import ldm
from safetensors.torch import save_file

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}


def random_like(shapes, prefix, seed):
    """fp16 weights of a usual size under LDM names: norms at one, biases at zero."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            value = torch.randn(shape, generator=random) * (0.7 * shape[1:].numel() ** -0.5)
        else:
            value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        state[prefix + name] = value.half()
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from retune.training.diffusers_model import SD1_VAE
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
    state = {}
    for seed, (prefix, part) in enumerate(parts.items()):
        state |= random_like({name: value.shape for name, value in part.items()}, prefix, seed)
    path = tmp_path_factory.mktemp("sd15") / "sd15.safetensors"
    save_file(state, path)
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
    from retune.nodes import measure, t5_clip
    from retune.nodes.bridge import attention_weights, text_to_image, with_unet_weights
    from retune.training.data.dataset import from_images
    from retune.training.layers import ResetConfig, reset_weights
    from retune.training.text_encoder.projection import Projection
    from retune.training.train_model import train_model

    t5 = write_t5(tmp_path, **T5S[kind])
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dataset = from_images([images], ["a red cat (sitting)", "two blue birds"])
    run = TrainModelConfig(
        run_name="r", steps=2, batch_size=1, learning_rate=1e-3, settings=TrainingSettings(warmup_steps=1)
    )
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), embedding_directory=None)
        swapped = t5_clip.load_t5_clip(t5, Projection(T5S[kind]["d_model"], 768))
        swapped, report = measure.scale_clip(swapped, 0.9, ["a red cat", "two blue birds"])
        assert report.after.std == pytest.approx(0.9, rel=1e-3)
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
    context = torch.randn(1, 7, 768, generator=torch.Generator().manual_seed(4))
    in_comfyui = predicted_by_comfyui(saved, trained.unet, noisy, sigma, context)
    gc.collect()
    torch.testing.assert_close(predicted_by_diffusers(saved, noisy, sigma, context), in_comfyui, atol=1e-3, rtol=1e-3)


def predicted_by_comfyui(saved, trained, noisy, sigma, context):
    import comfy.sd
    from retune.nodes.bridge import ComfyDenoiser, training_mode
    from retune.training.model import Conditioning

    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(saved), output_clip=False, output_vae=False)[0]
        state = model.model.diffusion_model.state_dict()
        for name, value in trained.items():
            torch.testing.assert_close(state[name].float(), value, atol=1e-3, rtol=1e-3)  # a half precision file
        with training_mode(), torch.no_grad():
            return ComfyDenoiser(model).predict(noisy, sigma, Conditioning(context)).clone()


def predicted_by_diffusers(saved, noisy, sigma, context):
    import comfy.sd1_clip
    from retune.training.diffusers_model import load_model
    from retune.training.model import Conditioning

    tokenizer = comfy.sd1_clip.__file__.replace("sd1_clip.py", "sd1_tokenizer")
    model = load_model(saved, tokenizer=tokenizer)
    with torch.no_grad():
        return model.denoiser.predict(noisy, sigma, Conditioning(context))
