"""Jobs of `in_processes.py`: runs of a tiny model with weights whole or divided, and what a step of them sends."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from retune.training.common.callbacks import Callbacks
from retune.training.common.distributed import world
from retune.training.config.loop import LoopConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.order import BatchOrder
from retune.training.loop.gradient_step import GradientStep
from retune.training.models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from retune.training.models.protocols import Conditioning, TextToImage
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.recipes.unet import _build_trainable, train_model
from torch.utils._python_dispatch import TorchDispatchMode


class Projection(torch.nn.Linear):
    bands = 0

    def config(self):
        return {"width": 32}


class Text:
    """A backbone of fixed states, and a projection that trains."""

    def __init__(self):
        self.projection = Projection(32, 32)
        self.width, self.pooled_width, self.fingerprint, self.weights = 32, 0, "words", {}

    def tokenize(self, texts):
        return texts

    def backbone(self, texts):
        states = [torch.randn(8, 32, generator=torch.Generator().manual_seed(len(text))) for text in texts]
        return Conditioning(torch.stack(states))

    def project(self, states, time=None):
        return replace(states, context=self.projection(states.context))

    def encode(self, tokens):
        return self.project(self.backbone(tokens))


def model(unet):
    torch.manual_seed(0)
    denoiser = DiffusersDenoiser(UNet2DConditionModel(**unet))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return TextToImage(denoiser, Text(), DiffusersAutoencoder(vae))


def train(unet, root, name, steps, layers, options):
    """A run to its end; the network is then what it was before."""
    torch.manual_seed(1)
    pictures = from_images([torch.rand(3, 8, 8) for _ in range(8)], ["a", "bb"] * 4, resolution=None)
    settings = {"warmup_steps": 0, "lr_schedule": "constant", "validation_fraction": 0.25}
    settings |= {"validate_every": 2, "save_every": 2, **options}
    samples = SamplePrompts(prompts=("a",), every=2, steps=2, width=8, height=8)
    base = {"batch_size": 4, "learning_rate": 1e-3, "steps": steps, "train": layers, "samples": samples}
    config = TrainModelConfig(run_name=name, settings=TrainingSettings(**settings), **base)
    tuned = model(unet)
    network = tuned.denoiser.network
    before = {key: (value, value.clone(), value.requires_grad) for key, value in network.named_parameters()}
    train_model(tuned, pictures, config, Path(root))
    for key, value in network.named_parameters():
        parameter, copy, required = before[key]
        assert value is parameter and torch.equal(value, copy) and value.requires_grad == required, key
    assert all("forward" not in vars(module) for module in network.modules())
    assert type(network) is UNet2DConditionModel and not network._forward_hooks


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective operation, and their number."""

    def __init__(self):
        super().__init__()
        self.bytes, self.messages = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            tensors = whole if isinstance(whole, (list, tuple)) else [whole]
            self.bytes[name] = self.bytes.get(name, 0) + sum(t.nbytes for t in tensors)
            self.messages[name] = self.messages.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def count(unet, file, options):
    """What a step of two accumulated batches sends, with the shapes of the weights."""
    tuned = model(unet)
    denoiser = tuned.denoiser
    settings = TrainingSettings(gradient_accumulation=2, **options)
    config = TrainModelConfig(run_name="r", train="whole UNet", train_projection=False, settings=settings)
    trainable = _build_trainable(tuned, config)
    pictures = from_images([torch.rand(3, 8, 8) for _ in range(4)], ["a"] * 4, resolution=None)
    words = Conditioning(torch.randn(1, 8, 32))
    objective = DenoisingObjective(
        denoiser,
        settings,
        0,
        latent_of=lambda slot: torch.ones(4, 8, 8),
        text_of=lambda text: words,
        project=lambda states, time: states,
    )
    loop = LoopConfig(steps=9, batch_size=4, learning_rate=1.0, settings=settings, samples=SamplePrompts())
    step = GradientStep(trainable, objective, BatchOrder(pictures, 4, 0), loop, torch.device("cpu"))
    step.gradient(1, Callbacks())
    with Sent() as sent:
        step.gradient(2, Callbacks())
    shapes = {name: list(p.shape) for name, p in denoiser.network.named_parameters()}
    if world().is_main:
        found = {"bytes": sent.bytes, "messages": sent.messages, "shapes": shapes}
        Path(file).write_text(json.dumps(found), encoding="utf-8")
