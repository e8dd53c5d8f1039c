"""Models at the true size of SD1.5 and SDXL with random weights, as diffusers folders in fp16; and the demo model so.

What a step costs does not depend on the values. Weights are uniform with the variance 1 / inputs, so that activations
stay finite in half precision.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..training.commands.open_model import build_demo_model
from ..training.common.rng import generator
from ..training.demo.files import weights_path
from ..training.models.checkpoint import SD1_VAE, SDXL_VAE
from ..training.models.noise_levels import SD1_SCHEDULER

SIDES = {"demo": 128, "sd15": 512, "sdxl": 1024}
"""Pixels of a picture's side by size, where no flag sets it, on a GPU."""
CPU_SIDE = 256
"""The most on a CPU, where larger pictures take minutes a step."""
SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIPS = {"sd15": [CLIP_L], "sdxl": [CLIP_L, CLIP_G | {"projection_dim": 1280, "hidden_act": "gelu"}]}
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


def default_side(size: str, device: str) -> int:
    """Pixels of a picture's side, where no flag sets it. device: its kind, such as "cpu"."""
    return min(SIDES[size], CPU_SIDE) if device == "cpu" else SIDES[size]


def write_model(size: str, folder: Path) -> Path:
    """Writes the model of a size as a diffusers folder, unless it is there; returns the folder."""
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write = _write_demo if size == "demo" else _write_random
        write(size, folder)
        done.touch()
    return folder


def _write_demo(size: str, folder: Path) -> None:
    model = build_demo_model()
    parts = {
        "unet": model.denoiser.network,
        "vae": model.autoencoder.network,
        "text_encoder": model.text_encoder.network,
    }
    for name, network in parts.items():
        network.half().save_pretrained(folder / name)
    _write_small_files(folder, model.denoiser.scheduler, 1)


def _write_random(size: str, folder: Path) -> None:
    for name, build in random_parts(size).items():
        write_part(build, folder / name)
    _write_small_files(folder, SD1_SCHEDULER, len(CLIPS[size]))


def write_part(build: Callable[[], nn.Module], folder: Path) -> None:
    """Writes the config of a network and random weights as diffusers or transformers lay them out.

    Args:
        build: makes the network.
        folder: of the part; a name that begins with "text" is a text encoder's.
    """
    with torch.device("meta"):
        network = build()
    about = network.config if hasattr(network.config, "save_pretrained") else network
    (about.save_pretrained if about is network.config else about.save_config)(folder)
    file = TRANSFORMERS_FILE if folder.name.startswith("text") else DIFFUSERS_FILE
    save_file(dict(random_weights(network)), folder / file, {"format": "pt"})


def random_parts(size: str) -> dict[str, Callable[[], nn.Module]]:
    """Folder name -> a function that makes that network of SD1.5 or SDXL."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet, vae = (SD15_UNET, SD1_VAE) if size == "sd15" else (SDXL_UNET, SDXL_VAE)
    end = json.loads((weights_path("clip_tokenizer") / "vocab.json").read_text(encoding="utf-8"))["<|endoftext|>"]
    configs = [CLIPTextConfig(**values, eos_token_id=end) for values in CLIPS[size]]
    parts = {"unet": lambda: UNet2DConditionModel(**unet), "vae": lambda: AutoencoderKL(**vae)}
    parts["text_encoder"] = lambda: CLIPTextModel(configs[0])
    if len(configs) > 1:
        parts["text_encoder_2"] = lambda: CLIPTextModelWithProjection(configs[1])
    return parts


def random_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """fp16 values for a network without any: norms and biases as at their start, the rest uniform."""
    for name, parameter in network.named_parameters():
        yield name, _fill_one(name, torch.empty(parameter.shape), generator(0, "bench weights", name)).half()


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    """Gives the parameters of a network such values in place, whatever their dtype and device; returns it."""
    parameters = dict(network.named_parameters())
    random = {device: torch.Generator(device).manual_seed(0) for device in {p.device for p in parameters.values()}}
    for name, parameter in parameters.items():
        _fill_one(name, parameter, random[parameter.device])
    return network


def _fill_one(name: str, value: Tensor, random: torch.Generator) -> Tensor:
    if value.ndim < 2:
        return value.fill_(float(name.endswith("weight")))
    bound = math.sqrt(3 / math.prod(value.shape[1:]))
    return value.uniform_(-bound, bound, generator=random)


def _write_small_files(folder: Path, scheduler: dict, encoders: int) -> None:
    """Tokenizers and the scheduler; other programs know it by its class."""
    for number in range(encoders):
        shutil.copytree(
            weights_path("clip_tokenizer"), folder / ("tokenizer" if not number else f"tokenizer_{number + 1}")
        )
    (folder / "scheduler").mkdir()
    values = {"_class_name": "DDPMScheduler", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values), encoding="utf-8")
