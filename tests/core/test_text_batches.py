"""Prompts of a text encoder that trains are one batch: one forward pass, the rows and gradients of single ones."""

from dataclasses import replace

import pytest
import torch
from retune.training.config.lora import LoraConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.order import Slot
from retune.training.models.protocols import Conditioning
from retune.training.models.sdxl_clip import SdxlTextEncoder
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.objectives.regularizers import drift
from retune.training.objectives.reward import RewardObjective
from retune.training.recipes.lora import networks_of, trainable_layers
from retune.training.recipes.reward import build_trainable
from retune.training.sampling.generate import encode_with
from retune.training.sampling.guidance import Guidance
from retune.training.text_encoder.projection import Projection
from retune.training.text_encoder.t5 import load_t5
from retune.training.trainables.lora import Adapters, select_layers

from .test_reward_tune import config as reward_config
from .test_reward_tune import loaded, reward

LONG = "a red circle on the left and " * 12
CAPTIONS = ["a red circle", LONG, "", "two small blue squares, white background"]


@pytest.fixture(params=["clip", "sdxl", "t5"])
def encoder(request, tiny_model, write_t5_folder, tmp_path):
    """A text encoder of each kind."""
    if request.param == "t5":
        return load_t5(write_t5_folder(tmp_path / "t5", d_model=48, d_kv=8, d_ff=64), Projection(48, 32))
    clip = tiny_model.text_encoder
    return SdxlTextEncoder(clip, clip) if request.param == "sdxl" else clip


def test_rows_of_a_batch_equal_single_encodings(encoder):
    batch = encoder.backbone(encoder.tokenize(CAPTIONS))
    for row, caption in enumerate(CAPTIONS):
        alone = encode_with(encoder)(caption)
        length = alone.context.shape[1]
        torch.testing.assert_close(batch.context[row, :length], alone.context[0], rtol=0, atol=1e-5)
        assert not batch.mask[row, length:].any() and batch.mask[row, :length].all()
        if alone.pooled is not None:
            torch.testing.assert_close(batch.pooled[row], alone.pooled[0], rtol=0, atol=1e-5)


class Counted:
    """Counts a text encoder's forward passes, by the prompts of each."""

    def __init__(self, encoder):
        self._encoder, self.sizes = encoder, []

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def backbone(self, tokens):
        self.sizes.append(len(tokens))
        return self._encoder.backbone(tokens)

    def encode(self, tokens):
        return self.project(self.backbone(tokens))


def caption_gradients(model, together):
    """Of adapters on the text encoder, of a step on four captions, in one batch or one by one; sizes of the passes."""
    encoder = Counted(model.text_encoder)
    config = LoraConfig(run_name="r", rank=2, text_encoder_learning_rate=1e-4)
    layers = select_layers(trainable_layers(model, config), config)
    adapters = Adapters(layers, networks_of(model, layers), config, 0)
    objective = DenoisingObjective(
        model.denoiser,
        TrainingSettings(caption_dropout=0.0),
        0,
        latent_of=lambda slot: torch.full((4, 8, 8), slot.index / 4),
        text_of=encode_with(encoder),
        texts_of=(lambda captions: encoder.backbone(encoder.tokenize(captions))) if together else None,
        project=encoder.project,
    )
    captions = [caption or "a star" for caption in CAPTIONS]
    pictures = from_images([torch.zeros(3, 16, 16)] * len(captions), captions, resolution=None)
    slots = [Slot(example, False, 1, i) for i, example in enumerate(pictures.examples)]
    with model.text_encoder.training(), adapters.attach(rng_key=(1, 0)):
        objective(list(enumerate(objective.load(slots))), 1).per_sample.sum().backward()
    return {name: p.grad for name, p in adapters.parameters.items() if p.grad is not None}, encoder.sizes


def expect_equal(found, expected):
    assert found.keys() == expected.keys() and any("text_encoders" in name for name in found)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * largest, msg=name)


def test_captions_that_train_are_one_batch_with_the_sum_of_single_gradients(tiny_model):
    (found, sizes), (expected, one_by_one) = (caption_gradients(tiny_model, together) for together in (True, False))
    assert (sizes, one_by_one) == ([4], [1, 1, 1, 1])
    expect_equal(found, expected)


def reward_gradients(model, cfg, together, monkeypatch):
    """As `caption_gradients`, of a reward objective on two prompts."""
    encoder = Counted(model.text_encoder)
    model, chosen = replace(model, text_encoder=encoder), reward_config(train="text encoder LoRA", cfg=cfg, lora_rank=2)
    trainable = build_trainable(model, chosen)
    objective = RewardObjective(model, reward(), chosen, trainable, text_trains=True)
    if not together:
        one = RewardObjective._encode
        monkeypatch.setattr(
            objective, "_encode", lambda *texts: Conditioning.cat(one(objective, text) for text in texts)
        )
    with encoder.training(), trainable.attach(rng_key=(1, 0)):
        objective(loaded(objective), 1).per_sample.sum().backward()
    return {name: p.grad for name, p in trainable.parameters.items() if p.grad is not None}, encoder.sizes


@pytest.mark.parametrize("cfg, prompts", [(2.0, 3), (1.0, 2)])
def test_prompts_of_a_reward_are_one_batch_with_the_empty_one(tiny_model, cfg, prompts, monkeypatch):
    (found, sizes), (expected, one_by_one) = (
        reward_gradients(tiny_model, cfg, together, monkeypatch) for together in (True, False)
    )
    assert (sizes, one_by_one) == ([prompts], [1] * prompts)
    expect_equal(found, expected)


def test_drift_does_not_count_the_pads_of_a_batch():
    """The empty prompt, encoded together with a longer one, has pads that it has not alone."""
    context, pads = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4, 3)
    mask = torch.tensor([[True, True, False, False, False, False]])
    alone, padded = Conditioning(context), Conditioning(torch.cat([context, pads], 1), mask=mask)
    assert drift(Guidance(padded, padded, 2.0), Guidance(alone, alone, 2.0)).tolist() == [0.0]
