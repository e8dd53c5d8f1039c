"""Presets by card: what their runs are computed to take fits the card with a tenth to spare, without any values."""

import copy
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from retune.benchmarks import memory_use
from retune.training.__main__ import parser
from retune.training.commands.train import ADAPTER_PRESETS, REWARD_PRESETS, TRAIN_PRESETS, WORD_PRESETS
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.loop import LoopConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import CARDS, TrainingSettings
from retune.training.data.examples import Example
from retune.training.data.order import Slot
from retune.training.data.prompts import PromptSlot
from retune.training.loop.estimate import ACTIVATIONS, estimate_memory
from retune.training.loop.gradient_step import GradientStep
from retune.training.loop.optimizers import PACKAGES
from retune.training.models.block_swap import freed_bytes
from retune.training.models.concepts import Concept
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.layers import is_selected
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning, TextToImage
from retune.training.models.recast import store_in
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.objectives.reward import RewardObjective
from retune.training.recipes.lora import unet_layers
from retune.training.recipes.reward import build_trainable
from retune.training.recipes.run import encoding, sample_decoding
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.trainables.lora import Adapters, select_layers
from retune.training.trainables.token_embeddings import TokenEmbeddings
from retune.training.trainables.weights import SelectedWeights
from torch._subclasses.fake_tensor import FakeTensorMode

SPARE = 0.1
KINDS = {
    "lora": (LoraConfig, ADAPTER_PRESETS),
    "train": (TrainModelConfig, TRAIN_PRESETS),
    "embedding": (EmbeddingConfig, WORD_PRESETS),
    "reward": (RewardTuneConfig, REWARD_PRESETS),
}
CLIPS = {"sd15": {"clip_l": (768, 12)}, "sdxl": {"clip_l": (768, 12), "clip_g": (1280, 32)}}
"""Width and layers of each text encoder."""
NOT_OF_A_STEP = {"block_swap": 0, "optimizer": "AdamW", "gradient_accumulation": 1, "fused_backward": False}
"""Settings that the peaks of a step do not depend on."""
SCORER_BYTES = 304 * 10**6 * 4
"""Of a reward's image tower, OpenAI's ViT-L/14 in fp32, beside which its activations are small."""


PEAKS = {}
"""Peaks of one picture's step, by all that they depend on: presets that differ in block swap or batch share them."""


class PeaksOf:
    """`KnownPeaks` of this process: of one picture, or of a batch, whose activations are at most `count` times those.

    more: bytes of gradients that are there too while a later step of a reward's chain is differentiated.
    """

    def __init__(self, key, count=0, more=0):
        self._key, self._count, self._more = key, count, more

    def read(self):
        if not self._count:
            return None
        peak, less = PEAKS[self._key][ACTIVATIONS]
        bound = (peak + (self._count - 1) * less + self._more, self._count * less + self._more)
        return PEAKS[self._key] | {ACTIVATIONS: bound}

    def write(self, peaks):
        PEAKS[self._key] = dict(peaks)


class OnACard(DiffusersDenoiser):
    """From which blocks leave when they are swapped."""

    device = torch.device("meta")


class ClipText(memory_use.FixedText):
    """CLIPs of true size in fp32, through which words train."""

    def __init__(self, size, denoiser, mode):
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__(denoiser)
        shapes = {name: (width, layers, 4 * width, width // 64) for name, (width, layers) in CLIPS[size].items()}
        names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
        configs = [
            CLIPTextConfig(vocab_size=49408, **dict(zip(names, shape, strict=True))) for shape in shapes.values()
        ]
        with mode:
            networks = [CLIPTextModel(config).eval().requires_grad_(False) for config in configs]
        object.__setattr__(self, "networks", networks)

    def encode(self, texts):
        ids = torch.zeros(len(texts), 77, dtype=torch.long)
        for network in self.networks:
            network.get_input_embeddings().weight.requires_grad_(True)  # as the words in it do
        context = torch.cat([network(input_ids=ids).last_hidden_state for network in self.networks], dim=-1)
        return Conditioning(context, super().encode(texts).pooled)


def preset_config(name, kind):
    """A run's config with a preset's values, in bf16 as on a card of today, and a sample prompt; the pictures' side."""
    config, presets = KINDS[kind]
    values = presets[name]

    def chosen(cls, prefix=""):
        names = (field.name for field in fields(cls) if field.name not in ("settings", "samples"))
        return {key: values[prefix + key] for key in names if prefix + key in values}

    settings = TrainingSettings(**{**chosen(TrainingSettings), "precision": "bf16"})
    samples = SamplePrompts(prompts=("a red circle",), **chosen(SamplePrompts, "sample_"))
    more = {"token": "<it>"} if kind == "embedding" else {}
    return config(run_name="r", settings=settings, samples=samples, **chosen(config), **more), values["resolution"]


def build_preset_trainable(model, config, kind, size, trains):
    denoiser, network = model.denoiser, model.denoiser.network
    if kind == "reward":
        return build_trainable(model, config)
    if kind == "embedding":
        vectors = {name: torch.zeros(1, width) for name, (width, _) in CLIPS[size].items()}
        return TokenEmbeddings([Concept("<it>", vectors)], [network], {}, denoiser.device)
    names = {denoiser.canonical_name(n): ref for n, ref in parameter_refs(network).items()}
    if kind == "train":
        return SelectedWeights({n: ref for n, ref in names.items() if trains(n)}, [network])
    return Adapters(select_layers(unet_layers(denoiser), config), [network], config, 0)


def build_preset_objective(model, config, kind, side, trainable):
    """The objective, and the slot that it trains on."""
    if kind == "reward":
        reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
        one = replace(config, gradient_steps=1)
        return RewardObjective(model, reward, one, trainable, text_trains=False), PromptSlot("a red circle", 1, 0)
    latent, text = torch.zeros(4, side // 8, side // 8), model.text_encoder.encode([""])
    text_of = (lambda caption: model.text_encoder.encode([caption])) if kind == "embedding" else (lambda caption: text)
    parts = {"latent_of": lambda slot: latent, "text_of": text_of, "project": model.text_encoder.project}
    slot = Slot(Example("", "a red circle", side, side, latent, "picture"), False, 0, 0)
    return DenoisingObjective(model.denoiser, config.settings, 0, **parts), slot


def filling(model, config, side):
    """The encoding of the largest picture, before the first step."""
    slot = Slot(Example("", "a red circle", side, side, None, "picture"), False, 0, 0)
    return encoding(model, config, slot)


def preset_estimate(name, kind):
    """The estimate of a preset's run on the command line: text encoder and VAE wait in RAM where neither trains nor
    scores. A text encoder that does not train has the fp16 of its file. Bytes of what is beside it on the device."""
    (config, side), size = preset_config(name, kind), name.split()[0].lower().replace(".", "")
    mode, besides = FakeTensorMode(allow_non_fake_inputs=True), 0
    model = memory_use.sized_model(size, mode)
    denoiser, network = model.denoiser, model.denoiser.network
    weights = [network]
    if kind in ("embedding", "reward"):
        text = ClipText(size, denoiser, mode)
        weights += [model.autoencoder.network, *(text.networks if kind == "embedding" else ())]
        if kind == "embedding":
            model = TextToImage(denoiser, text, model.autoencoder)
        else:
            besides = SCORER_BYTES + sum(p.numel() * 2 for clip in text.networks for p in clip.parameters())
    trains = (lambda n: is_selected(n, config.train)) if kind == "train" else (lambda n: False)
    store_in(network, torch.bfloat16, lambda n: trains(denoiser.canonical_name(n)))
    trainable = build_preset_trainable(model, config, kind, size, trains)
    loop = LoopConfig(
        steps=1, batch_size=config.batch_size, learning_rate=1e-4, settings=config.settings, samples=SamplePrompts()
    )
    objective, slot = build_preset_objective(model, config, kind, side, trainable)
    step = GradientStep(trainable, objective, memory_use.OneBatch(slot, config.batch_size), loop, denoiser.device)
    card = copy.copy(denoiser)
    card.__class__ = OnACard
    swapped = freed_bytes(card, config.settings.block_swap, trainable.parameters if kind == "train" else ())
    tensors = [tensor for module in weights for tensor in (*module.parameters(), *module.buffers())]
    (sample,) = objective.load([slot])
    with denoiser.checkpointing(True) if config.settings.gradient_checkpointing else nullcontext():
        more = sample_decoding(model, config) | filling(model, config, side)
        settings = replace(config.settings, **NOT_OF_A_STEP)
        key = repr((size, kind, side, replace(config, batch_size=1, settings=settings)))
        if key not in PEAKS:
            estimate_memory(step, tensors, sample, 1, more, known=PeaksOf(key))
        one_by_one = kind == "reward"  # its pictures, and the steps of its chain
        gradients = sum(p.nbytes for p in trainable.parameters.values())
        known = PeaksOf(key, 1, gradients) if one_by_one else PeaksOf(key, config.batch_size)
        return estimate_memory(step, tensors, sample, config.batch_size, more, swapped, known), besides


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CARDS)
def test_a_presets_run_fits_its_card(name, kind):
    assert preset_config(name, kind)[0].settings.optimizer not in PACKAGES  # every preset needs torch alone
    (estimate, besides), room = preset_estimate(name, kind), float(name.split()[1]) * 1e9
    assert estimate.peak + besides <= (1 - SPARE) * room, (estimate.text(None), besides)


@pytest.mark.parametrize("name", CARDS)
def test_presets_by_card_name_settings_that_there_are(name):
    for kind in KINDS:
        config, side = preset_config(name, kind)
        assert config.settings.gradient_checkpointing and side == config.samples.width == config.samples.height


@pytest.mark.parametrize("name", CARDS)
def test_presets_for_rewards_set_what_trains_and_the_pictures_size(name):
    config, side = preset_config(name, "reward")
    assert (config.train, config.width, config.height, config.stop_gradient) == ("UNet LoRA", side, side, True)
    assert config.learning_rate == 1e-4  # the default is one for whole encoders


def test_the_command_line_reads_them():
    words = ["reward", "--preset", "SDXL 8 GB", "--rewards", "demo aesthetic", "--run-name", "r", "--width", "512"]
    arguments = parser("SDXL 8 GB").parse_args([*words, "--model", "m"])
    assert (arguments.train, arguments.width, arguments.height, arguments.block_swap) == ("UNet LoRA", 512, 768, 87)
