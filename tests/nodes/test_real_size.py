"""Reward tuning at its real size: SD1.5 and a ViT-H/14 reward of HPSv2's layout, random weights, on a CPU."""

import json
import logging
import resource
import subprocess
import sys
import time

import pytest
import torch
from retune.training.commands.comfyui_server import server
from retune.training.models import ldm
from retune.training.models.diffusers import SD1_VAE
from safetensors.torch import save_file

log = logging.getLogger(__name__)
LIMIT = 14e9
"""Bytes of memory that a run may take at most."""
PROMPTS = ["a red cat (sitting)", "two blue birds"]
SIZES = {"steps": 2, "batch_size": 1, "gradient_steps": 2, "sampling_steps": 3, "width": 64, "height": 64}
IMAGE_TOWER, TEXT_TOWER = (1280, 32), (1024, 24)
"""Width and layers; both project to 1024."""


def sd15_shapes():
    """Name in the original layout -> shape, of UNet, VAE and text encoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(**SD1_VAE)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    words = {"text_model." + name.removeprefix("text_model."): v for name, v in text.state_dict().items()}
    parts = {
        ldm.UNET_PREFIX: ldm.to_ldm(unet.state_dict(), ldm.unet_names(unet.config)),
        ldm.VAE_PREFIX: ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config)),
        ldm.CLIP_PREFIX: {name: v for name, v in words.items() if "position_ids" not in name},
    }
    return {prefix + name: tuple(v.shape) for prefix, part in parts.items() for name, v in part.items()}


def vit_h_shapes():
    """Name as OpenCLIP has it -> shape, of ViT-H/14: 632 M parameters of the image tower, 354 M of the text tower."""
    image, text = IMAGE_TOWER[0], TEXT_TOWER[0]
    shapes = {
        "visual.class_embedding": (image,),
        "visual.conv1.weight": (image, 3, 14, 14),
        "visual.positional_embedding": (257, image),
        "visual.proj": (image, 1024),
        "token_embedding.weight": (49408, text),
        "positional_embedding": (77, text),
        "text_projection": (text, 1024),
        "logit_scale": (),
    }
    for start, (width, layers) in (("visual.", IMAGE_TOWER), ("", TEXT_TOWER)):
        pairs = {f"{start}{name}": (width,) for name in (("ln_pre", "ln_post") if start else ("ln_final",))}
        for layer in range(layers):
            block = f"{start}transformer.resblocks.{layer}."
            pairs |= {f"{block}ln_1": (width,), f"{block}ln_2": (width,)}
            pairs |= {f"{block}attn.out_proj": (width, width), f"{block}mlp.c_fc": (4 * width, width)}
            pairs |= {f"{block}mlp.c_proj": (width, 4 * width)}
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        for name, shape in pairs.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory, cheap_weights):
    """(checkpoint, reward) in a models folder as ComfyUI has it."""
    models = tmp_path_factory.mktemp("real size") / "models"
    checkpoint, reward = models / "checkpoints" / "sd15.safetensors", models / "retune_rewards" / "HPS_v2.1.pt"
    for path in (checkpoint, reward):
        path.parent.mkdir(parents=True)
    shapes = vit_h_shapes()
    image = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("visual."))
    whole = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert round(image / 1e6) == 632 and round((whole - image) / 1e6) == 354
    torch.save({"epoch": 1, "state_dict": cheap_weights(shapes)}, reward)
    save_file(cheap_weights(sd15_shapes()), checkpoint)
    yield checkpoint, reward
    for path in (checkpoint, reward):
        path.unlink()


def expect_tuned(run, began):
    """Two steps, each with a reward and a gradient; and no process that this one waited for took more than LIMIT."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    log.warning("%.0f s, at most %.2f GB; %s", time.monotonic() - began, peak / 1e9, rows)
    assert peak < LIMIT
    for path in run.rglob("*.safetensors"):  # half a gigabyte each, and pytest keeps the folders of three runs
        path.unlink()


@pytest.mark.slow
def test_the_command_line_tunes_sd15_with_a_vit_h_reward(comfyui, files, tmp_path):
    checkpoint, reward = files
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = ["--model", checkpoint, "--rewards", f"HPSv2,file={reward}", "--prompts", tmp_path / "prompts.txt"]
    arguments += ["--comfyui", comfyui, "--output", tmp_path, "--run-name", "r", "--device", "cpu"]
    for name, value in SIZES.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "retune.training", "reward", *map(str, arguments)], check=True)
    expect_tuned(tmp_path / "r", began)


@pytest.mark.slow
def test_a_workflow_tunes_sd15_with_a_vit_h_reward(comfyui, files):
    checkpoint, reward = files
    base = checkpoint.parent.parent.parent
    values = SIZES | {"prompts": "\n".join(PROMPTS), "learning_rate": 1e-6, "seed": 0}
    values |= {"train": "text encoder", "method": "last K", "cfg": 7.5, "clip_constraint": 0.0, "run_name": "r"}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "reward": ["2", 0]}
    loaded = {"kind": "HPSv2", "file": reward.name, "weight": 1.0}
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint.name}},
        "2": {"class_type": "RetuneLoadReward", "inputs": loaded},
        "3": {"class_type": "RetuneRewardTune", "inputs": links | values},
    }
    began = time.monotonic()
    with server(comfyui, base) as running:
        running.run(workflow, timeout=3600)
    expect_tuned(base / "output" / "retune" / "r", began)
