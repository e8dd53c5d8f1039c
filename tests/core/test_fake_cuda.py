"""The forward pass of a step of every trainer under torch's FakeTensorMode, with weights on a CUDA device that need not
be there: by torch's own rules a tensor on the wrong device raises. tests/core/test_device.py runs whole trainings."""

import copy
from contextlib import contextmanager

import pytest
import torch
from retune.training.config.lora import ALGORITHMS, LoraConfig
from retune.training.config.reward import METHODS
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.order import BatchOrder
from retune.training.data.prompts import PromptSlot
from retune.training.loop.precision import autocast
from retune.training.models.concepts import Concept
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.models.recast import store_in
from retune.training.objectives import denoising, reward_on_images
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.objectives.reward import RewardObjective
from retune.training.objectives.reward_on_images import DirectObjective
from retune.training.recipes.lora import networks_of, trainable_layers
from retune.training.recipes.reward import build_trainable
from retune.training.rewards.preprocess import checked_later
from retune.training.text_encoder.projection import Projection
from retune.training.trainables import lora
from retune.training.trainables.lora import Adapters, select_layers
from retune.training.trainables.token_embeddings import TokenEmbeddings
from retune.training.trainables.weights import SelectedWeights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from .test_reward_tune import config as reward_config
from .test_reward_tune import reward

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this build of torch has no CUDA, and so no tensors that say they are"
)
CUDA = torch.device("cuda")
LOSSES = [
    {},
    {"loss": "pseudo-huber", "huber_schedule": "snr", "loss_weighting": "debiased", "noise_offset": 0.1}
    | {"input_perturbation": 0.1},
]


@contextmanager
def fake_cuda(*networks):
    """FakeTensorMode, networks moved to "cuda"."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for network in networks:
                network.to("cuda")
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.fixture(autouse=True)
def adapters_with_values(monkeypatch):
    """LyCORIS computes the sizes of its factors with tensors, so its modules are made with values and then moved."""
    make = lora._lycoris_module

    def make_with_values(name, layer, config, seed):
        with unset_fake_temporarily():
            real = copy.copy(layer)
            vars(real)["_parameters"] = {"weight": nn.Parameter(torch.zeros(tuple(layer.weight.shape)))}
            return make(name, real, config, seed)

    monkeypatch.setattr(lora, "_lycoris_module", make_with_values)


def objective_of(denoiser, settings, monkeypatch, encoder=None):
    """Timesteps and dropped captions are drawn by numbers, which fake tensors do not have. encoder: one that trains."""
    monkeypatch.setattr(denoising, "draw_timestep", lambda settings, total, random: total // 2)
    monkeypatch.setattr(DenoisingObjective, "_drop_caption", lambda self, caption, step, index: caption)
    return DenoisingObjective(
        denoiser,
        settings,
        0,
        latent_of=lambda slot: torch.zeros(4, 16, 16),
        text_of=lambda caption: Conditioning(torch.zeros(1, 8, 32)),
        texts_of=None if encoder is None else lambda captions: encoder.backbone(encoder.tokenize(captions)),
        project=lambda states, time: states,
        mask_of=lambda slot: torch.ones(1, 16, 16),
    )


def loaded_batch(objective):
    pictures = from_images([torch.zeros(3, 32, 32)] * 2, ["a <it>", "a red <it>"], resolution=None)
    return list(enumerate(objective.load(BatchOrder(pictures, 2, 0).batch(1))))


def loss_of(denoiser, settings, monkeypatch, build=None):
    """The loss of a step, and the masters; build: makes the trainable, by default that of the whole UNet."""
    objective, network = objective_of(denoiser, settings, monkeypatch), denoiser.network
    batch = loaded_batch(objective)
    with fake_cuda(network):
        trainable = build() if build else SelectedWeights(parameter_refs(network), [network])
        with trainable.attach(rng_key=(1, 0)), autocast(settings.precision, CUDA):
            return objective(batch, 1).per_sample.sum(), trainable.parameters


def expect_cuda(loss, masters):
    assert loss.device.type == "cuda" and loss.requires_grad
    assert {parameter.device.type for parameter in masters.values()} == {"cuda"}


@pytest.mark.parametrize("settings", LOSSES, ids=["default", "others"])
def test_a_step_is_on_one_device(tiny_model, monkeypatch, settings):
    expect_cuda(*loss_of(tiny_model.denoiser, TrainingSettings(**settings, precision="fp32"), monkeypatch))


def adapters_of(model, **changes):
    """A builder of adapters, those of the text encoder too where the config trains it."""
    config = LoraConfig(run_name="r", rank=2, **changes)

    def build():
        layers = select_layers(trainable_layers(model, config), config)
        return Adapters(layers, networks_of(model, layers), config, 0)

    return build


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapters_are_on_one_device(tiny_model, monkeypatch, algorithm):
    build = adapters_of(tiny_model, algorithm=algorithm, targets="all")
    expect_cuda(*loss_of(tiny_model.denoiser, TrainingSettings(precision="fp32"), monkeypatch, build))


def pretend_bf16(monkeypatch):
    """Lets autocast be turned on for a card that is not there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.amp.autocast_mode, "amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


@pytest.mark.parametrize("algorithm", [None, "LoRA", "DoRA"])
def test_a_step_in_bf16_is_on_one_device(tiny_model, monkeypatch, algorithm):
    """Frozen weights in bf16 beside fp32 masters; the UNet's output is bf16, so autocast is at work."""
    pretend_bf16(monkeypatch)
    denoiser, outputs = tiny_model.denoiser, []
    store_in(denoiser.network, torch.bfloat16, lambda name: algorithm is None)
    build = adapters_of(tiny_model, algorithm=algorithm) if algorithm else None
    denoiser.network.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].dtype))
    expect_cuda(*loss_of(denoiser, TrainingSettings(precision="bf16"), monkeypatch, build))
    assert outputs == [torch.bfloat16]


@contextmanager
def known_words(learned):
    """Fake tensors have no values: tells the text encoder whether its prompts hold learned words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "__bool__", lambda self: learned, raising=False)
        yield


def text_loss(model, encoder, build, monkeypatch, learned):
    """As `loss_of`, of something in a text encoder."""
    networks, settings = (model.denoiser.network, encoder.network), TrainingSettings(precision="fp32")
    objective = objective_of(model.denoiser, settings, monkeypatch, encoder)
    batch = loaded_batch(objective)
    with fake_cuda(*networks), known_words(learned):
        trainable = build()
        with encoder.training(), trainable.attach(rng_key=(1, 0)):
            return objective(batch, 1).per_sample.sum(), trainable.parameters


@pytest.mark.parametrize("kind", ["mlp", "timestep resampler"])
def test_a_text_encoder_that_is_swapped_is_on_one_device(tiny_model, monkeypatch, kind):
    """The projection of its states, with a pooled output, trains along."""
    projection = Projection(32, 32, kind, pooled_width=8, tokens=4, layers=1)
    settings, network = TrainingSettings(precision="fp32"), tiny_model.denoiser.network
    objective = objective_of(tiny_model.denoiser, settings, monkeypatch)
    objective.project = projection.project
    batch = loaded_batch(objective)
    with fake_cuda(network, projection):
        refs = parameter_refs(network) | parameter_refs(projection, "projection.")
        trainable = SelectedWeights(refs, [network, projection])
        with trainable.attach(rng_key=(1, 0)):
            expect_cuda(objective(batch, 1).per_sample.sum(), trainable.parameters)


def test_words_are_on_one_device(tiny_model, monkeypatch):
    network = tiny_model.denoiser.network
    encoder = tiny_model.text_encoder.with_concepts([Concept("<it>", {"clip_l": torch.zeros(2, 32)})])
    build = lambda: TokenEmbeddings(encoder.concepts, [network], {"clip_l": 0.4}, CUDA)  # noqa: E731
    expect_cuda(*text_loss(tiny_model, encoder, build, monkeypatch, learned=True))


def test_adapters_of_a_text_encoder_are_on_one_device(tiny_model, monkeypatch):
    build = adapters_of(tiny_model, text_encoder_learning_rate=1e-4)
    loss, masters = text_loss(tiny_model, tiny_model.text_encoder, build, monkeypatch, learned=False)
    assert any(name.startswith("text_encoders.") for name in masters)
    expect_cuda(loss, masters)


def score_pictures(model, chosen, monkeypatch, direct=False):
    """Total scores of a step's pictures, with the graph from the latents, and the masters."""
    scores, networks = reward(), (model.denoiser.network, model.autoencoder.network)
    monkeypatch.setattr(reward_on_images, "draw_timestep", lambda settings, total, random: total // 2)
    monkeypatch.setattr(RewardObjective, "_chosen_steps", lambda self, step: [len(self.chain) - 1])
    prompts = ["a red circle", "two small blue squares"]
    encode = lambda text: model.text_encoder.encode(model.text_encoder.tokenize([text]))  # noqa: E731
    encoded = {text: Conditioning(encode(text).context.detach()) for text in ("", *prompts)}
    with fake_cuda(*networks, scores.network):
        trainable = build_trainable(model, chosen)
        more = {"latent_of": lambda slot: torch.zeros(4, 16, 16)} if direct else {}
        kind = DirectObjective if direct else RewardObjective
        objective = kind(model, scores, chosen, trainable, text_trains=False, **more)
        monkeypatch.setattr(objective, "_encode_frozen", encoded.__getitem__)
        samples = RewardObjective.load(objective, [PromptSlot(text, 1, i) for i, text in enumerate(prompts)])
        samples = [sample._replace(latent=torch.zeros(4, 16, 16)) for sample in samples]
        with trainable.attach(rng_key=(1, 0)):
            chain = objective._draw([0, 1], samples, 1, objective._guidance_now(samples, objective._cfg).detached())
            _, images = objective._pixels(chain.states[-1])
            with checked_later():
                return scores.evaluate(images, prompts).total.sum(), trainable.parameters


@pytest.mark.parametrize("method", METHODS)
def test_rewards_are_on_one_device(tiny_model, monkeypatch, method):
    chosen = reward_config(train="UNet LoRA", method=method, lora_rank=2)
    expect_cuda(*score_pictures(tiny_model, chosen, monkeypatch, direct=method == "direct"))


def test_a_tensor_on_the_wrong_device_is_found(tiny_model, monkeypatch):
    """As a target that is left on the CPU would be."""
    monkeypatch.setattr(type(tiny_model.denoiser), "target", lambda *_: torch.zeros(2, 4, 16, 16))
    with pytest.raises(RuntimeError, match="two different devices cuda:0, cpu"):
        loss_of(tiny_model.denoiser, TrainingSettings(precision="fp32"), monkeypatch)
