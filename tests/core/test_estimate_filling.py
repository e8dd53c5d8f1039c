"""What fills a run's caches counts among what it takes of the memory; and the estimate of new words."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from retune.training.common.live_bytes import LiveBytes
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.examples import Example
from retune.training.data.order import Slot
from retune.training.models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from retune.training.recipes import run as recipe
from retune.training.recipes.lora import train_lora
from retune.training.recipes.textual_inversion import train_embedding
from torch._subclasses.fake_tensor import FakeTensorMode

from .test_estimate import Records, counted, estimate

pytestmark = pytest.mark.own_peaks


def test_an_estimate_of_new_words(tiny_model, pictures, tmp_path, monkeypatch):
    """Whose gradient comes through the UNet and the text encoder."""
    settings = TrainingSettings(warmup_steps=1)
    config = EmbeddingConfig(run_name="r", token="<it>", steps=2, batch_size=3, settings=settings)
    run = partial(train_embedding, tiny_model, pictures, config, tmp_path)
    estimate, peak = counted(lambda callbacks: run(callbacks=callbacks), monkeypatch)
    assert estimate.needed == pytest.approx(peak, rel=0.1)


def test_filling_the_caches_counts(tiny_model):
    """By what the encoding of the largest picture takes, on whatever device the rest is."""
    config, slot = LoraConfig(run_name="r"), Slot(Example("", "x", 64, 64, None, "x"), False, 0, 0)
    with LiveBytes() as live:
        tiny_model.autoencoder.encode(torch.rand(1, 3, 64, 64))
    vae, unet = tiny_model.autoencoder.network, tiny_model.denoiser.network
    peaks = {}
    for device, place in (("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda")):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            there = DiffusersAutoencoder(type(vae).from_config(vae.config) if place == "cuda" else vae)
            with torch.device(device):
                denoiser = DiffusersDenoiser(type(unet).from_config(unet.config))
            model = replace(tiny_model, denoiser=denoiser, autoencoder=there)
            with LiveBytes() as fake:
                recipe.encoding(model, config, slot)["filling"]()
        peaks[device, place] = fake.peak
    assert peaks["cpu", "cpu"] == pytest.approx(live.peak, rel=0.1)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert peaks["cuda", "cpu"] - peaks["cuda", "cuda"] == weights  # which come to the device
    assert estimate(filling=60).peak == 101 and estimate(filling=5).peak == estimate().peak


def test_caches_are_filled_while_blocks_are_swapped(tiny_model, pictures, tmp_path, monkeypatch):
    events, swapped_blocks, callbacks = [], recipe.swapped_blocks, Records()

    def swapped(*arguments):
        events.append("swapped")
        return swapped_blocks(*arguments)

    monkeypatch.setattr(recipe, "swapped_blocks", swapped)
    callbacks.on_text = lambda text: events.append("caching") if text.startswith("caching") else None
    settings = TrainingSettings(block_swap=2)
    train_lora(tiny_model, pictures, LoraConfig(run_name="r", steps=1, settings=settings), tmp_path, callbacks)
    assert events[0] == "swapped" and "caching" in events
