"""Text encoder and VAE are on the device only while they are used, one group at a time, never beside the UNet."""

import dataclasses

import pytest
import torch
from retune.training.commands.open_model import TEXT_ENCODER, VAE, build_demo_model, build_model
from retune.training.commands.train import visitors_of
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.model import ModelConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.models.visitors import Visitors, arrive, send_visitors_away
from retune.training.recipes.reward import tune
from retune.training.recipes.textual_inversion import train_embedding
from retune.training.recipes.unet import train_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .test_reward_tune import PROMPTS, reward
from .test_reward_tune import config as reward_config
from .test_train_embedding import config as embedding_config


class Moves(nn.Module):
    """A network that notes where it was sent."""

    def __init__(self, log, name):
        super().__init__()
        self.log, self.name = log, name

    def to(self, device):
        self.log.append((self.name, str(device)))
        return self


def test_one_group_is_there_at_a_time():
    log = []
    unet, clip_l, clip_g, vae = (Moves(log, name) for name in ("unet", "clip_l", "clip_g", "vae"))
    device = torch.device("cuda:0")
    Visitors(unet, ([clip_l, clip_g], [vae]), device)
    assert log == [("unet", "cuda:0"), ("clip_l", "cpu"), ("clip_g", "cpu"), ("vae", "cpu")]
    log.clear()
    arrive(clip_l)
    arrive(clip_g)
    assert log == [("clip_l", "cuda:0"), ("clip_g", "cuda:0")]
    arrive(vae)
    assert log[2:] == [("clip_l", "cpu"), ("clip_g", "cpu"), ("vae", "cuda:0")]
    send_visitors_away(unet)
    send_visitors_away(unet)
    assert log[5:] == [("vae", "cpu")]
    arrive(vae)
    assert log[6:] == [("vae", "cuda:0")]
    with FakeTensorMode():  # nothing has values there, and what is moved would lose its own
        send_visitors_away(unet)
        arrive(clip_l)
    assert len(log) == 7
    arrive(nn.Linear(1, 1))
    send_visitors_away(nn.Linear(1, 1))


def test_a_run_computes_the_unet_with_nobody_else_there(tiny_model, pictures, tmp_path):
    settings = TrainingSettings(validation_fraction=0.3, validate_every=2, warmup_steps=0)
    samples = SamplePrompts(prompts=("a red circle",), every=1, steps=2, cfg=2.0, width=32, height=32)
    config = TrainModelConfig(run_name="plain", steps=2, batch_size=2, settings=settings, samples=samples)
    plain = train_model(tiny_model, pictures, config, tmp_path)
    parts = [part.network for part in (tiny_model.denoiser, tiny_model.text_encoder, tiny_model.autoencoder)]
    unet, clip, vae = parts
    visitors, seen = Visitors(unet, ([clip], [vae]), torch.device("cpu")), set()
    for name, network in (("unet", unet), ("clip", clip), ("vae", vae.encoder), ("vae", vae.decoder)):

        def note(module, inputs, name=name):
            if not isinstance(torch.empty(0), FakeTensor):  # the estimate of the run's memory moves nothing
                seen.add((name, *(id(one) for one in visitors._there)))

        network.register_forward_pre_hook(note)
    (tmp_path / "plain").rename(tmp_path / "before")
    again = train_model(tiny_model, pictures, dataclasses.replace(config, run_name="v"), tmp_path / "new")
    assert seen == {("unet",), ("clip", id(clip)), ("vae", id(vae))}
    assert all(torch.equal(again.unet[name], value) for name, value in plain.unet.items())


@pytest.mark.parametrize("options", [{}, {"t5": "demo"}])
def test_a_model_on_a_cpu_has_no_visitors(options, caplog):
    model = build_demo_model(**options)
    encoder = model.text_encoder
    network = encoder.network if encoder.projection is None else encoder.model
    assert all("_retune_visitors" not in vars(n) for n in (network, model.denoiser.network, model.autoencoder.network))


@pytest.mark.parametrize("t5", [None, "demo"])
def test_on_another_device_the_unet_stays_and_the_others_wait_in_ram(t5):
    model = build_model(ModelConfig(model="demo", t5=t5, device="meta"), visiting={TEXT_ENCODER, VAE})
    encoder = model.text_encoder
    network = encoder.network if t5 is None else encoder.model
    assert model.denoiser.device.type == "meta"
    assert {p.device.type for p in (*network.parameters(), *model.autoencoder.network.parameters())} == {"cpu"}
    assert t5 is None or {p.device.type for p in encoder.projection.parameters()} == {"meta"}
    assert vars(network)["_retune_visitors"] is vars(model.denoiser.network)["_retune_visitors"]


def test_a_vae_alone_waits_in_ram_beside_a_text_encoder_that_trains():
    model = build_model(ModelConfig(model="demo", device="meta"), visiting={VAE})
    assert {p.device.type for p in model.autoencoder.network.parameters()} == {"cpu"}
    assert {p.device.type for p in model.text_encoder.network.parameters()} == {"meta"}
    assert "_retune_visitors" not in vars(model.text_encoder.network)


@pytest.mark.parametrize(
    "kind, changes, crop, expected",
    [
        (TrainModelConfig, {}, "center", {VAE, TEXT_ENCODER}),
        (TrainModelConfig, {}, "random", {TEXT_ENCODER}),
        (TrainModelConfig, {"settings": TrainingSettings(caption_shuffle=True)}, "center", {VAE}),
        (LoraConfig, {}, "center", {VAE, TEXT_ENCODER}),
        (LoraConfig, {"text_encoder_learning_rate": 1e-5}, "center", {VAE}),
        (LoraConfig, {"text_encoder_learning_rate": 1e-5}, "random", set()),
        (EmbeddingConfig, {"token": "<it>"}, "center", {VAE}),
        (RewardTuneConfig, {"train": "UNet LoRA"}, "center", {TEXT_ENCODER}),
        (RewardTuneConfig, {"train": "projection"}, "center", set()),
    ],
)
def test_what_no_step_computes_with_visits(pictures, kind, changes, crop, expected):
    config = kind(run_name="r", **changes)
    assert visitors_of(config, dataclasses.replace(pictures, crop=crop)) == expected


@pytest.mark.parametrize("trainer", ["embedding", "reward"])
def test_with_visitors_a_run_has_the_same_bits(tiny_model, pictures, tmp_path, trainer):
    """A text encoder comes once for each prompt of a reward tuning, not in every step."""

    def run(name):
        if trainer == "embedding":
            config = embedding_config(run_name=name, steps=2, template="object")
            return train_embedding(tiny_model, pictures, config, tmp_path / name).embedding.concepts[0].vectors
        config = reward_config(run_name=name, train="UNet LoRA")
        return tune(tiny_model, reward(), PROMPTS, config, tmp_path / name).lora

    plain, unet, arrivals = run("plain"), tiny_model.denoiser.network, []
    visiting = tiny_model.autoencoder.network if trainer == "embedding" else tiny_model.text_encoder.network
    visitors = Visitors(unet, ([visiting],), torch.device("cpu"))
    arrive_once = visitors.arrive
    visitors.arrive = lambda network: (arrivals.append(1), arrive_once(network))

    def alone(module, inputs):
        assert isinstance(torch.empty(0), FakeTensor) or not visitors._there

    unet.register_forward_pre_hook(alone)
    again = run("again")
    assert again.keys() == plain.keys() and all(torch.equal(again[name], value) for name, value in plain.items())
    assert arrivals and (trainer == "embedding" or len(arrivals) == len(PROMPTS) + 1)
