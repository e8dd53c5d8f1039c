"""Weights divided among processes (FSDP2, gloo): gradient, weights, states and result of one process; refusals."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from retune.training.common.foreign import read_tensors
from retune.training.config.loop import LoopConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.estimate import estimate_memory
from retune.training.loop.gradient_step import GradientStep
from retune.training.loop.sharding import check_sharding
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective, TrainingSample
from retune.training.trainables.sharded import ShardedWeights
from retune.training.trainables.weights import SelectedWeights
from torch.distributed.device_mesh import init_device_mesh

from .conftest import UNET
from .test_several_processes import masters, run, start, steps_of

TRAIN = (
    f"UNET = {UNET}\n"
    + """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from retune.training.common.callbacks import Callbacks
from retune.training.common.distributed import world
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from retune.training.models.protocols import Conditioning, TextToImage
from retune.training.recipes.unet import train_model


class Projection(torch.nn.Linear):
    bands = 0

    def config(self):
        return {"width": 32}


class Text:
    '''A backbone of fixed states, and a projection that trains.'''

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


def model():
    torch.manual_seed(0)
    denoiser = DiffusersDenoiser(UNet2DConditionModel(**UNET))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return TextToImage(denoiser, Text(), DiffusersAutoencoder(vae))


def train(root, name, steps, layers, options):
    torch.manual_seed(1)
    pictures = from_images([torch.rand(3, 8, 8) for _ in range(8)], ["a", "bb"] * 4, resolution=None)
    settings = {"warmup_steps": 0, "lr_schedule": "constant", "validation_fraction": 0.25}
    settings |= {"validate_every": 2, "save_every": 2, **options}
    samples = SamplePrompts(prompts=("a",), every=2, steps=2, width=8, height=8)
    base = {"batch_size": 4, "learning_rate": 1e-3, "steps": steps, "train": layers, "samples": samples}
    config = TrainModelConfig(run_name=name, settings=TrainingSettings(**settings), **base)
    tuned, before = model(), {}
    network = tuned.denoiser.network
    before = {key: (value, value.clone(), value.requires_grad) for key, value in network.named_parameters()}
    forwards = [(module, dict(vars(module))) for module in network.modules()]
    train_model(tuned, pictures, config, root)
    for key, value in network.named_parameters():
        parameter, copy, required = before[key]
        assert value is parameter and torch.equal(value, copy) and value.requires_grad == required, key
    assert all("forward" not in vars(module) for module, _ in forwards)
    assert type(network) is UNet2DConditionModel and not network._forward_hooks


if __name__ == "__main__":
    root, name, steps, layers, options = sys.argv[1:]
    train(Path(root), name, int(steps), layers, eval(options))
"""
)
SHARDED = {"shard_weights": True}


def train(count, root, name, steps, layers="whole UNet", **options):
    run(count, "-c", TRAIN, root, name, steps, layers, options)
    return read_tensors(root / name / "model.safetensors")[0], masters(root / name)


def expect_equal(found, expected, tolerance):
    """Equal names, and values to a share of the largest change that a run makes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.is_floating_point():
            assert (found[name] - value).abs().max() <= tolerance * max(1.0, value.abs().max()), name


COUNT = """
import json
import sys

from torch.utils._python_dispatch import TorchDispatchMode

exec(sys.argv[1].partition("if __name__")[0])
from retune.training.config.loop import LoopConfig
from retune.training.data.order import BatchOrder
from retune.training.loop.gradient_step import GradientStep
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.recipes.unet import _build_trainable


class Sent(TorchDispatchMode):
    '''Bytes of the whole tensors of each kind of collective operation, and their number.'''

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


def count(options):
    tuned = model()
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
    return {"bytes": sent.bytes, "messages": sent.messages, "shapes": shapes}


print("COUNTED", json.dumps(count(eval(sys.argv[2]))))
"""


def counted(options):
    codes, outputs = start(2, "-c", COUNT, TRAIN, options)
    assert not any(codes), "\n".join(outputs)
    return json.loads(outputs[0].partition("COUNTED ")[2].splitlines()[0])


@pytest.mark.slow
def test_what_a_step_sends_is_what_the_documentation_says():
    """docs/several_gpus.md, to the byte: P numbers summed once a step; or, divided, gathered twice and summed in each
    of two batches, rows rounded up to the number of processes, what lies in no block gathered once."""
    plain = counted({})
    sizes = [math.prod(shape) for shape in plain["shapes"].values()]
    beside = 2 + len(sizes)  # two losses, and whether each parameter has a gradient
    assert plain["bytes"] == {"allreduce_": 4 * (sum(sizes) + beside)}
    assert plain["messages"] == {"allreduce_": 1}
    found = counted(SHARDED)
    padded = {name: math.prod([-(-shape[0] // 2) * 2, *shape[1:]]) for name, shape in found["shapes"].items()}
    in_blocks = sum(size for name, size in padded.items() if ".resnets." in name or ".attentions." in name)
    whole = sum(padded.values())
    assert found["bytes"].pop("allreduce_") == 4 * (beside + 1)  # and the square of the norm
    assert found["bytes"] == {"_allgather_base_": 2 * 4 * (whole + in_blocks), "_reduce_scatter_base_": 2 * 4 * whole}


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["whole UNet", "cross-attention"])
def test_the_run_is_that_of_one_process(tmp_path, layers):
    """Result, masters, average and metrics, with clipping, accumulation, recomputed activations and a projection.

    SGD: AdamW makes whole steps of what rounding left of gradients near zero.
    """
    options = {"optimizer": "SGD", "ema_decay": 0.9, "gradient_accumulation": 2, "max_grad_norm": 0.05}
    options |= {"gradient_checkpointing": True, "lr_self_attention": 2.0, "unfreeze_rest": 2}
    one = train(1, tmp_path, "one", 4, layers, **options)
    two = train(2, tmp_path, "two", 4, layers, **options, **SHARDED)
    for found, expected in zip(two, one, strict=True):
        expect_equal(found, expected, 1e-5)
    for single, divided in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        for key, value in single.items():
            floats = value if isinstance(value, list) else [value]
            close = all(isinstance(number, float) for number in floats)
            assert divided[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if close else value), key


@pytest.mark.slow
def test_a_run_resumes_with_the_same_bits_and_with_another_number_of_processes(tmp_path):
    """From two processes to two (all bits), from two to one, and from one to two. Runs go side by side."""

    def run_on(name, counts):
        for steps, count in zip((2, 4), counts, strict=True):
            values = train(count, tmp_path, name, steps, **(SHARDED if count > 1 else {}))
        return values

    with ThreadPoolExecutor() as pool:
        again, alone = pool.submit(run_on, "again", (2, 2)), pool.submit(run_on, "other", (2, 1))
        divided, whole = pool.submit(run_on, "last", (1, 2)), train(2, tmp_path, "whole", 4, **SHARDED)
    for found, expected in zip(again.result(), whole, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for values in (alone.result(), divided.result()):
        for found, expected in zip(values, whole, strict=True):
            expect_equal(found, expected, 1e-3)  # AdamW makes whole steps of what rounding left


@pytest.fixture
def mesh():
    """One process, joined with itself."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_divided_masters_train_and_the_network_itself_evaluates(tiny_model, mesh):
    """Gradient of `SelectedWeights`; other values and the disabled state run on the network, bit for bit."""
    denoiser = tiny_model.denoiser
    refs = {denoiser.canonical_name(name): ref for name, ref in parameter_refs(denoiser.network).items()}
    plain, divided = SelectedWeights(refs, [denoiser.network]), ShardedWeights(refs, denoiser.network, mesh)
    inputs = torch.ones(1, 4, 8, 8), torch.ones(1), Conditioning(torch.ones(1, 8, 32))
    for trainable in (plain, divided):
        with trainable.attach():
            denoiser.predict(*inputs).square().mean().backward()
    assert len(divided) == len(plain) and divided.parameters.keys() == plain.parameters.keys()
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(divided.parameters[name].grad, parameter.grad, rtol=1e-5, atol=1e-7)
    others = {name: value * 1.1 for name, value in plain.values().items()}
    divided.load(others)
    with torch.no_grad():
        with plain.attach(others):
            expected = denoiser.predict(*inputs)
        base = denoiser.predict(*inputs)
        with divided.attach(others):
            assert torch.equal(denoiser.predict(*inputs), expected)
            with divided.disabled():
                assert torch.equal(denoiser.predict(*inputs), base)
        with divided.attach():
            assert torch.equal(denoiser.predict(*inputs), expected)
            with divided.disabled():
                assert torch.equal(denoiser.predict(*inputs), base)


def test_the_estimate_counts_a_process_share(tiny_model, mesh):
    """Divided masters and gradients are this process's; whole weights of some blocks come to the activations."""
    denoiser = tiny_model.denoiser
    refs = {denoiser.canonical_name(name): ref for name, ref in parameter_refs(denoiser.network).items()}
    found = {}
    for trainable in (SelectedWeights(refs, [denoiser.network]), ShardedWeights(refs, denoiser.network, mesh)):
        settings = TrainingSettings()
        objective = DenoisingObjective(
            denoiser,
            settings,
            0,
            latent_of=lambda slot: torch.ones(4, 8, 8),
            text_of=lambda text: Conditioning(torch.ones(1, 8, 32)),
            project=lambda states, time: states,
        )
        options = {"batch_size": 1, "learning_rate": 1.0, "settings": settings, "samples": SamplePrompts()}
        step = GradientStep(trainable, objective, None, LoopConfig(steps=1, **options), torch.device("cpu"))
        sample = TrainingSample("", torch.ones(4, 8, 8))
        found[type(trainable)] = estimate_memory(step, denoiser.network.parameters(), sample, 1, {})
    plain, divided = found.values()
    size = 4 * sum(parameter.numel() for parameter in denoiser.network.parameters())
    assert (divided.masters, divided.gradients, divided.optimizer) == (size, size, plain.optimizer)
    assert 0 < trainable.gathered_bytes < 3 * size
    own = divided.activations - trainable.gathered_bytes
    assert plain.activations / 2 < own <= plain.activations


def config(kind=TrainModelConfig, **settings):
    return kind(run_name="r", settings=TrainingSettings(shard_weights=True, **settings))


def test_what_cannot_be_divided_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="shard_weights is on with one process, as ComfyUI always has"):
        check_sharding(config())
    monkeypatch.setattr("retune.training.loop.sharding.world", lambda: type("Two", (), {"size": 2}))
    check_sharding(config())
    with pytest.raises(ValueError, match="expected it for `train`"):
        check_sharding(config(LoraConfig))
    with pytest.raises(ValueError, match="optimizer Adafactor; expected one of AdamW, SGD, Lion"):
        check_sharding(config(optimizer="Adafactor"))
    with pytest.raises(ValueError, match="precision fp16"):
        check_sharding(config(precision="fp16"))
    with pytest.raises(ValueError, match="block_swap 3; expected 0"):
        check_sharding(config(block_swap=3))


@pytest.mark.slow
def test_the_command_line_refuses_one_process_before_anything_is_loaded(tmp_path):
    flags = ["train", "--model", "nowhere", "--folder", "nowhere", "--run-name", "r", "--shard-weights"]
    codes, (output,) = start(1, "-m", "retune.training", *flags, "--output", tmp_path)
    assert codes != [0]
    assert "shard_weights is on with one process" in output
