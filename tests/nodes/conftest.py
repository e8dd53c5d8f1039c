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
