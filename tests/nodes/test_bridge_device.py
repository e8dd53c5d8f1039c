"""ComfyUI's models on a device that is not the CPU, simulated: a step of every trainer reads the device once."""

from contextlib import contextmanager

import pytest
import torch
from retune.training.common import transfer
from retune.training.common.callbacks import Callbacks
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.prompts import Prompt
from retune.training.models.protocols import Conditioning


def run(**changes):
    common = {"run_name": "r", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "samples": SamplePrompts()}
    return common | {"settings": TrainingSettings(warmup_steps=0, precision="fp32")} | changes


class Counted(Callbacks):
    """Reads of a device within each optimizer step."""

    def __init__(self, device):
        self.device, self.reads, self.waits = device, [], []

    def before_step(self, step):
        self.device.reset()

    def on_step(self, info):
        self.reads.append(sum(self.device.reads.values()))
        self.waits.append(self.device.waits)


def whole(view, pictures, root, callbacks):
    from retune.training.recipes.unet import train_model

    return train_model(view, pictures, TrainModelConfig(**run(train="cross-attention K/V")), root, callbacks)


def lora(view, pictures, root, callbacks):
    from retune.training.recipes.lora import train_lora

    return train_lora(view, pictures, LoraConfig(**run(rank=2)), root, callbacks)


def embedding(view, pictures, root, callbacks):
    """Of captions one of which is longer than a window."""
    from retune.training.recipes.textual_inversion import train_embedding

    chosen = EmbeddingConfig(**run(token="<it>", initial_text="circle"))
    images = [example.load() for example in pictures.examples]
    words = from_images(images, ["a <it>", "a red <it> " * 30] * 2, resolution=None)
    return train_embedding(view, words, chosen, root, callbacks)


@contextmanager
def on_device(view, monkeypatch, text=False, pixels=False):
    """While entered, a view's networks are on the simulated device, and ComfyUI moves nothing.

    text, pixels: whether the text encoder and the VAE are too.
    """
    from retune.nodes.bridge.device import Loaded, load_fully

    lazy, encoder, vae = torch.device("lazy"), view.text_encoder, view.autoencoder.vae
    monkeypatch.setattr(Loaded, "load", lambda *_: None)
    monkeypatch.setattr(view.denoiser, "device", lazy)
    networks = [view.denoiser.network, view.denoiser.sampling]
    if text:
        load_fully([encoder.clip.patcher])
        networks.append(encoder.clip.cond_stage_model)
        monkeypatch.setattr(encoder.clip.patcher, "load_device", lazy)
    if pixels:
        networks.append(vae.first_stage_model)
        monkeypatch.setattr(vae, "device", lazy)
    try:
        for network in networks:
            network.to(lazy)
        yield view
    finally:
        for network in networks:
            network.to("cpu")


@pytest.fixture
def device(device, monkeypatch):
    """Copies to it are those to a CUDA device."""
    monkeypatch.setattr(transfer, "STAGING", ("cuda", "lazy"))
    return device


@pytest.mark.parametrize("trainer", [whole, lora, embedding], ids=lambda trainer: trainer.__name__)
def test_a_step_reads_the_device_once(demo, pictures, device, tmp_path, monkeypatch, trainer):
    """Where the text encoder trains, ComfyUI brings the ids of its prompts to the device, for which the host waits."""
    from retune.nodes.bridge.view import text_to_image

    counted, text = Counted(device), trainer is embedding
    with torch.inference_mode(), text_to_image(*demo) as view, on_device(view, monkeypatch, text=text):
        trainer(view, pictures, tmp_path, counted)
    assert counted.reads == [1, 1]
    assert text or counted.waits == [0, 0]


def test_a_reward_step_reads_the_device_once(demo, device, tmp_path, monkeypatch):
    from retune.nodes.bridge.reward_tuning import ready_to_tune
    from retune.nodes.bridge.rewards import ManagedReward
    from retune.training.recipes.reward import tune
    from retune.training.rewards.load import RewardConfig

    counted, kind = Counted(device), RewardConfig(kind="demo CLIP")
    fixed = {"sampling_steps": 2, "gradient_steps": 1, "width": 64, "height": 64, "train": "UNet LoRA"}
    with torch.inference_mode(), ready_to_tune(*demo, ManagedReward.open(kind)) as (view, judge):
        with on_device(view, monkeypatch, pixels=True):
            judge.network.to("lazy")
            tune(view, judge, [Prompt("a red circle")] * 2, RewardTuneConfig(**run(), **fixed), tmp_path, counted)
    assert (counted.reads, counted.waits) == ([1, 1], [0, 0])


def test_sdxl_is_asked_without_waiting_for_the_device(sdxl, device):
    """Its vector of pooled text and sizes is ComfyUI's."""
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode

    random = torch.Generator().manual_seed(0)
    noisy, pooled = torch.randn(2, 4, 8, 16, generator=random), torch.randn(2, 1280, generator=random)
    with torch.inference_mode(), training_mode():
        denoiser = ComfyDenoiser(sdxl[0])
        model = denoiser.patcher.model
        given = {"pooled_output": pooled, "device": noisy.device, "noise": noisy, "height": 64, "width": 128}
        expected = model.extra_conds(**given)["y"].cond
        assert torch.equal(denoiser._size_conditioning(noisy, Conditioning(pooled, pooled)), expected)
        there = Conditioning(pooled.to("lazy"), pooled.to("lazy"))
        device.reset()
        found = denoiser._size_conditioning(noisy.to("lazy"), there)
        assert found.device.type == "lazy" and not device.reads
        assert torch.equal(found.cpu(), expected)
        sigma = torch.tensor([1.0, 3.0])
        denoiser.sampling.to("lazy")
        try:
            device.reset()
            denoiser.sampling.timestep(sigma.to("lazy"))
            assert not device.reads
        finally:
            denoiser.sampling.to("cpu")
