"""The demo model as ComfyUI loads it, and small captioned pictures."""

import pytest
import torch


@pytest.fixture
def demo(comfyui):
    """(MODEL, CLIP, VAE) made under inference mode, as nodes do."""
    from retune.nodes.demo_model import load_demo

    with torch.inference_mode():
        return load_demo()


@pytest.fixture
def core_demo():
    """The same model through diffusers."""
    from retune.training.build import ModelConfig, build_model

    return build_model(ModelConfig(model="demo"))


@pytest.fixture
def pictures():
    """Four captioned 64x64 pictures."""
    from retune.training.data.dataset import from_images

    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return from_images(images, ["a red circle on the left", "two small blue squares (flat)"] * 2)


@pytest.fixture
def sampled(comfyui):
    """`sampled(model, clip)`: two DDIM steps through ComfyUI's own sampler."""
    import comfy.sample

    def sample(model, clip):
        with torch.inference_mode():
            positive = clip.encode_from_tokens_scheduled(clip.tokenize("two small red circles"))
            negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
            latent = torch.zeros(1, 4, 8, 8)
            noise = comfy.sample.prepare_noise(latent, 1)
            options = {"denoise": 1.0, "disable_pbar": True, "seed": 1}
            return comfy.sample.sample(
                model, noise, 2, 4.0, "ddim", "ddim_uniform", positive, negative, latent, **options
            ).clone()

    return sample


@pytest.fixture
def small_sdxl_clip(comfyui):
    """comfy.sd.CLIP of SDXL's two encoders at small size (32 + 64 wide), random weights."""
    from types import SimpleNamespace

    import comfy.sd
    from comfy import sdxl_clip

    small = {"num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 2}
    target = SimpleNamespace(clip=sdxl_clip.SDXLClipModel, tokenizer=sdxl_clip.SDXLTokenizer, params={})
    configs = {f"clip_{name}_model_config": small | {"hidden_size": width} for name, width in (("l", 32), ("g", 64))}
    clip = comfy.sd.CLIP(target, model_options=configs | {"dtype": torch.float32})
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clip.cond_stage_model.parameters():
            parameter.normal_(std=0.2, generator=source)
    return clip
