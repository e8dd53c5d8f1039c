"""The demo model as ComfyUI loads it, and small captioned pictures."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from retune.training.models import ldm

SMALL_CLIP = {"num_hidden_layers": 3, "intermediate_size": 64, "hidden_size": 32, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def schemas(comfyui):
    """What ComfyUI tells its frontend about our nodes, by node id."""
    import retune

    nodes = asyncio.run(asyncio.run(retune.comfy_entrypoint()).get_node_list())
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in nodes}


@pytest.fixture
def demo(comfyui):
    """(MODEL, CLIP, VAE) made under inference mode, as nodes do."""
    from retune.nodes.common.demo_model import load_demo

    with torch.inference_mode():
        return load_demo()


@pytest.fixture
def dynamic_vram(comfyui, monkeypatch):
    """ComfyUI's patcher class for dynamic VRAM, in use on this CPU: all that it does but for the memory of a GPU.

    Weights keep their file's dtype until they are loaded, layers cast them for each pass, patches wait for it, and what
    a patcher loaded is taken back when it is unloaded.
    """
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    pins = ("weights", "patches", "weights-loaded", "patches-loaded")

    class Dynamic(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, *args, **options):
            return object.__new__(cls)

        def register_load_device(self, device):
            state = {name: (SimpleNamespace(size=0), [], [-1], [0], [0], {}) for name in pins}
            flags = {"hostbufs_initialized": True, "failed": False, "active": False, "current_prompt": False}
            self.model.dynamic_pins.setdefault(device, state | flags)

        def get_free_memory(self, device):
            return comfy.model_management.get_free_memory(device)

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
            return self.restore_loaded_backups()

        def load(self, *args, **options):
            super().load(*args, **options)
            for module in self.model.modules():
                for name in ("weight", "bias"):
                    patch = getattr(module, f"{name}_lowvram_function", None)
                    if patch is not None:  # which only layers in a GPU's memory would apply
                        getattr(module, f"{name}_function").append(patch)

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    yield Dynamic
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture
def core_demo():
    """The same model through diffusers."""
    from retune.training.commands.open_model import ModelConfig, build_model

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


def comfyui_unet(network, about):
    """(MODEL, LDM prefix -> diffusers prefix) with a diffusers UNet's weights; about: a class of supported_models."""
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models

    names = ldm.unet_names(network.config)
    state = {ldm.UNET_PREFIX + name: v for name, v in ldm.to_ldm(network.state_dict(), names).items()}
    config = comfy.model_detection.detect_unet_config(state, ldm.UNET_PREFIX)
    about = getattr(comfy.supported_models, about)(config)
    about.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        model = about.get_model(state, ldm.UNET_PREFIX, device="cpu")
        model.load_model_weights(state, ldm.UNET_PREFIX)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")), names


@pytest.fixture(scope="session")
def sd15(comfyui, sd15_unet):
    return comfyui_unet(sd15_unet, "SD15")


@pytest.fixture(scope="session")
def sdxl(comfyui, sdxl_unet):
    return comfyui_unet(sdxl_unet, "SDXL")


@pytest.fixture(scope="session")
def clips(comfyui):
    """A small CLIP of SD1.5's, SD2's and SDXL's structure, by name."""
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import sd2_clip

    targets = {
        "SD1.5": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
        "SD2": (sd2_clip.SD2ClipModel, sd2_clip.SD2Tokenizer),
    }
    targets["SDXL"] = (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer)
    return {name: small_clip(*classes) for name, classes in targets.items()}


def small_clip(model, tokenizer):
    import comfy.sd

    configs = {f"clip_{letter}_model_config": dict(SMALL_CLIP) for letter in "lgh"}
    with torch.inference_mode():
        target = SimpleNamespace(clip=model, tokenizer=tokenizer, params={})
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **configs})
        for seed, value in enumerate(clip.cond_stage_model.state_dict().values()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return clip


@pytest.fixture(scope="session")
def t5(comfyui, tmp_path_factory, write_t5_folder):
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.text_encoder.projection import Projection

    folder = write_t5_folder(tmp_path_factory.mktemp("lora_t5") / "t5")
    with torch.inference_mode():
        return load_t5_clip(folder, Projection(64, 768), dtype="fp32")
