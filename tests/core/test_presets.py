"""Presets by card: what their runs are computed to take fits the card with a tenth to spare, without any values."""

import copy
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from retune.benchmarks import memory_use
from retune.training.commands.train import ADAPTER_PRESETS, TRAIN_PRESETS
from retune.training.config.loop import LoopConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import CARDS, TrainingSettings
from retune.training.data.examples import Example
from retune.training.data.order import Slot
from retune.training.loop.estimate import estimate_memory
from retune.training.loop.gradient_step import GradientStep
from retune.training.models.block_swap import freed_bytes
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.layers import is_selected
from retune.training.models.parameters import parameter_refs
from retune.training.models.recast import store_in
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.recipes.lora import unet_layers
from retune.training.recipes.run import sample_decoding
from retune.training.trainables.lora import Adapters, select_layers
from retune.training.trainables.weights import SelectedWeights
from torch._subclasses.fake_tensor import FakeTensorMode

SPARE = 0.1
KINDS = {"lora": (LoraConfig, ADAPTER_PRESETS), "train": (TrainModelConfig, TRAIN_PRESETS)}


class OnACard(DiffusersDenoiser):
    """From which blocks leave when they are swapped."""

    device = torch.device("meta")


def preset_config(name, kind):
    """A run's config with a preset's values, in bf16 as on a card of today, and a sample prompt; the pictures' side."""
    config, presets = KINDS[kind]
    values = presets[name]

    def chosen(cls, prefix=""):
        names = (field.name for field in fields(cls) if field.name not in ("settings", "samples"))
        return {key: values[prefix + key] for key in names if prefix + key in values}

    settings = TrainingSettings(**{**chosen(TrainingSettings), "precision": "bf16"})
    samples = SamplePrompts(prompts=("a red circle",), **chosen(SamplePrompts, "sample_"))
    return config(run_name="r", settings=settings, samples=samples, **chosen(config)), values["resolution"]


def preset_estimate(name, kind):
    """The estimate of a preset's run on the command line, where text encoder and VAE wait in RAM."""
    (config, side), size = preset_config(name, kind), name.split()[0].lower().replace(".", "")
    model = memory_use.sized_model(size, FakeTensorMode(allow_non_fake_inputs=True))
    denoiser, network = model.denoiser, model.denoiser.network
    trains = (lambda n: is_selected(n, config.train)) if kind == "train" else (lambda n: False)
    store_in(network, torch.bfloat16, lambda n: trains(denoiser.canonical_name(n)))
    names = {denoiser.canonical_name(n): ref for n, ref in parameter_refs(network).items()}
    chosen = {n: ref for n, ref in names.items() if trains(n)}
    if kind == "train":
        trainable = SelectedWeights(chosen, [network])
    else:
        trainable = Adapters(select_layers(unet_layers(denoiser), config), [network], config, 0)
    loop = LoopConfig(
        steps=1, batch_size=config.batch_size, learning_rate=1e-4, settings=config.settings, samples=SamplePrompts()
    )
    latent, text = torch.zeros(4, side // 8, side // 8), model.text_encoder.encode([""])
    parts = {"latent_of": lambda slot: latent, "text_of": lambda caption: text, "project": model.text_encoder.project}
    slot = Slot(Example("", "a red circle", side, side, latent, "picture"), False, 0, 0)
    objective = DenoisingObjective(denoiser, config.settings, 0, **parts)
    step = GradientStep(trainable, objective, memory_use.OneBatch(slot, config.batch_size), loop, denoiser.device)
    card = copy.copy(denoiser)
    card.__class__ = OnACard
    swapped = freed_bytes(card, config.settings.block_swap, chosen)
    weights, (sample,) = [*network.parameters(), *network.buffers()], objective.load([slot])
    with denoiser.checkpointing(True) if config.settings.gradient_checkpointing else nullcontext():
        more = sample_decoding(model, config)
        return estimate_memory(step, weights, sample, config.batch_size, more, swapped)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CARDS)
def test_a_presets_run_fits_its_card(name, kind):
    if preset_config(name, kind)[0].settings.optimizer == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    estimate, room = preset_estimate(name, kind), float(name.split()[1]) * 1e9
    assert estimate.peak <= (1 - SPARE) * room, estimate.text(None)


@pytest.mark.parametrize("name", CARDS)
def test_presets_by_card_name_settings_that_there_are(name):
    for kind in KINDS:
        config, side = preset_config(name, kind)
        assert config.settings.gradient_checkpointing and side == config.samples.width == config.samples.height
