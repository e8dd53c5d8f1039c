"""Weights divided among processes (FSDP2, gloo): gradient, weights, states and result of one process; refusals."""

import json
import math

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
from .in_sharded import train
from .test_several_processes import masters, run_in_two, start, steps_of

SHARDED = {"shard_weights": True}
ALL = {"optimizer": "SGD", "ema_decay": 0.9, "gradient_accumulation": 2, "max_grad_norm": 0.05}
ALL |= {"gradient_checkpointing": True, "lr_self_attention": 2.0, "unfreeze_rest": 2}
"""SGD: AdamW makes whole steps of what rounding left of gradients near zero."""
WHOLE = "whole UNet"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs: those of one process here, those of two in one start and, resumed, in another."""
    root = tmp_path_factory.mktemp("sharded")

    def job(name, steps, layers=WHOLE, **options):
        return ["in_sharded.train", [UNET, str(root), name, steps, layers, options]]

    def run_here(*arguments, **options):
        train(*job(*arguments, **options)[1])

    for layers in (WHOLE, "cross-attention"):
        run_here(f"one {layers}", 4, layers, **ALL)
    run_here("one then two", 2)
    run_in_two(
        *(job(f"two {layers}", 4, layers, **ALL, **SHARDED) for layers in (WHOLE, "cross-attention")),
        job("whole", 4, **SHARDED),
        *(job(name, 2, **SHARDED) for name in ("two then two", "two then one")),
        *(["in_sharded.count", [UNET, str(root / f"sent {bool(o)}.json"), o]] for o in ({}, SHARDED)),
    )
    run_in_two(*(job(name, 4, **SHARDED) for name in ("two then two", "one then two")))
    run_here("two then one", 4)
    return root


def results(root, name):
    return read_tensors(root / name / "model.safetensors")[0], masters(root / name)


def expect_equal(found, expected, tolerance):
    """Equal names, and values to a share of the largest change that a run makes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.is_floating_point():
            assert (found[name] - value).abs().max() <= tolerance * max(1.0, value.abs().max()), name


@pytest.mark.slow
def test_what_a_step_sends_is_what_the_documentation_says(runs):
    """docs/several_gpus.md, to the byte: P numbers summed once a step; or, divided, gathered twice and summed in each
    of two batches, rows rounded up to the number of processes, what lies in no block gathered once."""
    plain, found = (json.loads((runs / f"sent {divided}.json").read_text()) for divided in (False, True))
    sizes = [math.prod(shape) for shape in plain["shapes"].values()]
    beside = 2 + len(sizes)  # two losses, and whether each parameter has a gradient
    assert plain["bytes"] == {"allreduce_": 4 * (sum(sizes) + beside)}
    assert plain["messages"] == {"allreduce_": 1}
    padded = {name: math.prod([-(-shape[0] // 2) * 2, *shape[1:]]) for name, shape in found["shapes"].items()}
    in_blocks = sum(size for name, size in padded.items() if ".resnets." in name or ".attentions." in name)
    whole = sum(padded.values())
    assert found["bytes"].pop("allreduce_") == 4 * (beside + 1)  # and the square of the norm
    assert found["bytes"] == {"_allgather_base_": 2 * 4 * (whole + in_blocks), "_reduce_scatter_base_": 2 * 4 * whole}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [WHOLE, "cross-attention"])
def test_the_run_is_that_of_one_process(runs, layers):
    """Result, masters, average and metrics, with clipping, accumulation, recomputed activations and a projection."""
    names = [f"{count} {layers}" for count in ("one", "two")]
    for expected, found in zip(*(results(runs, name) for name in names), strict=True):
        expect_equal(found, expected, 1e-5)
    for single, divided in zip(*(steps_of(runs / name) for name in names), strict=True):
        for key, value in single.items():
            floats = value if isinstance(value, list) else [value]
            close = all(isinstance(number, float) for number in floats)
            assert divided[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if close else value), key


@pytest.mark.slow
def test_a_run_resumes_with_the_same_bits_and_with_another_number_of_processes(runs):
    """From two processes to two (all bits), from two to one, and from one to two."""
    whole = results(runs, "whole")
    for found, expected in zip(results(runs, "two then two"), whole, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name in ("two then one", "one then two"):
        for found, expected in zip(results(runs, name), whole, strict=True):
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
