"""bf16 masters: rounding that is right on average, runs that move as in fp32, resume to the bit, what is refused."""

import dataclasses

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.common.foreign import read_tensors
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop import rounding
from retune.training.loop.estimate import _state_bytes
from retune.training.loop.memory import memory_hints
from retune.training.loop.rounding import RoundedMasters, check_master_weights, stochastic_round
from retune.training.models.parameters import parameter_refs
from retune.training.recipes.unet import train_model
from retune.training.trainables.weights import SelectedWeights
from torch import nn

BITS = {"master_weights": "bf16"}
QUIET = {"warmup_steps": 0, "lr_schedule": "constant", "caption_dropout": 0.0, "max_grad_norm": 0.0}


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0, 1.0 + 2**-10, -3.14159, 1e-3, -7.7e-21, 6e30, 0.0])
def test_the_mean_of_many_roundings_is_the_number(value):
    """Within five standard errors of a choice between two neighbours; only these two come out."""
    exact = torch.full((40_000,), value)
    rounded = stochastic_round(exact, random())
    assert rounded.dtype == torch.bfloat16
    found, number = rounded.double(), exact[0].double()
    low, high = found.min(), found.max()
    assert low <= number <= high and len(found.unique()) == 1 + (low != high)
    share = 0.0 if low == high else float((number - low) / (high - low))
    assert float((high - low).abs()) <= 2**-7 * abs(value) * 1.001
    spread = float(high - low) * (share * (1 - share) / len(exact)) ** 0.5
    assert abs(float(found.mean() - number)) <= 5 * spread + 1e-12 * abs(value)


def test_numbers_of_bf16_and_those_that_are_not_finite_stay():
    same = torch.randn(1000, generator=random()).bfloat16()
    assert torch.equal(stochastic_round(same.float(), random()), same)
    canonical = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's own NaN
    odd = torch.cat([torch.tensor([float("inf"), -float("inf"), float("nan")]), canonical])
    rounded = stochastic_round(odd, random())
    assert rounded[:2].tolist() == [float("inf"), -float("inf")] and rounded[2:].isnan().all()


def test_updates_below_the_last_digit_count_on_average():
    """400 updates of 2e-5 on ones, whose neighbour below is 2^-8 = 4e-3 away: rounded to nearest they do nothing."""
    weight = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    nearest = weight.detach().clone()
    rounded = RoundedMasters(torch.optim.SGD([weight], lr=2e-5), {"w": weight}, 0)
    for step in range(400):
        weight.grad = torch.ones_like(weight)
        rounded.step(step)
        nearest -= 2e-5
    assert torch.equal(nearest, torch.ones_like(nearest))
    spread = (2**-8 * 8e-3 / weight.numel()) ** 0.5  # of a sum of choices, each with the variance p (1 - p) 2^-16
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 8e-3, abs=5 * spread)


def config(name="r", **settings):
    run = {"run_name": name, "steps": 6, "batch_size": 2, "learning_rate": 1e-4, "train": "whole UNet"}
    return TrainModelConfig(**run, settings=TrainingSettings(**(QUIET | {"save_every": 3} | settings)))


def base_of(model):
    names = model.denoiser.canonical_name
    return {names(name): value.detach().clone() for name, value in model.denoiser.network.named_parameters()}


def test_a_run_moves_as_in_fp32_and_leaves_the_base_alone(tiny_model, pictures, tmp_path):
    """Updates are 1e-5 a step, weights about 0.1, whose neighbours in bf16 are 5e-4 apart."""
    base = base_of(tiny_model)
    rates = {"learning_rate": 1e-5}
    exact = train_model(tiny_model, pictures, dataclasses.replace(config("fp32"), **rates), tmp_path).unet
    found = train_model(tiny_model, pictures, dataclasses.replace(config("bf16", **BITS), **rates), tmp_path).unet
    assert all(torch.equal(value, base[name]) for name, value in base_of(tiny_model).items())
    along, squares = 0.0, 0.0
    for name, value in base.items():
        assert found[name].dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32)
        if value.ndim > 1:
            moved = exact[name].double() - value.double()
            along += float(((found[name].double() - value.bfloat16().double()) * moved).sum())
            squares += float(moved.square().sum())
    assert along / squares == pytest.approx(1, abs=0.15)


class StopAfter(Callbacks):
    def __init__(self, step):
        self._last = step

    def before_step(self, step):
        if step > self._last:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "AdamW"},
        {"optimizer": "Adafactor", "fused_backward": True, "gradient_checkpointing": True},
        {"optimizer": "SGD", "precision": "bf16", "gradient_accumulation": 2},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_a_stopped_run_resumes_to_the_same_bits(tiny_model, pictures, tmp_path, settings):
    expected = train_model(tiny_model, pictures, config(**BITS, **settings), tmp_path / "whole").unet
    with pytest.raises(KeyboardInterrupt):
        train_model(tiny_model, pictures, config(**BITS, **settings), tmp_path / "stopped", StopAfter(4))
    state, _ = read_tensors(tmp_path / "stopped" / "r" / "state" / "latest.safetensors")
    kinds = {value.dtype for name, value in state.items() if name.startswith("optimizer.")}
    assert torch.bfloat16 not in kinds and torch.bfloat16 in {state[n].dtype for n in state if n.startswith("master.")}
    found = train_model(tiny_model, pictures, config(**BITS, **settings), tmp_path / "stopped").unet
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_fused_backward_rounds_alike(tiny_model, pictures, tmp_path):
    runs = [
        train_model(tiny_model, pictures, config(f"{fused}", fused_backward=fused, **BITS), tmp_path).unet
        for fused in (False, True)
    ]
    assert all(torch.equal(runs[1][name], value) for name, value in runs[0].items())


def test_masters_take_two_bytes_and_states_what_they_take_in_fp32(tiny_model):
    network = tiny_model.denoiser.network
    refs = parameter_refs(network)
    masters = SelectedWeights(refs, [network], refs).parameters
    for name, value in masters.items():
        size = refs[name].tensor.numel()
        assert value.nbytes == (2 if value.ndim > 1 else 4) * size
        states, _ = _state_bytes(tuple(value.shape), value, TrainingSettings(**BITS))
        assert states == pytest.approx(8 * size, abs=8)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"optimizer": "Prodigy"}, "with optimizer Prodigy; expected AdamW, Adafactor, SGD, AdamW8bit"),
        ({"ema_decay": 0.99}, "with ema_decay 0.99; expected .* no average"),
        ({"precision": "fp16"}, "with precision fp16; expected .* precision bf16 or fp32"),
        ({"shard_weights": True}, "with shard_weights on; expected .* whole weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"master_weights is 'bf16' {said}"):
        TrainingSettings(**BITS, **settings)


@pytest.mark.parametrize("kind", [LoraConfig, EmbeddingConfig, RewardTuneConfig])
def test_other_trainings_are_refused(kind):
    more = {"token": "<it>"} if kind is EmbeddingConfig else {}
    with pytest.raises(ValueError, match="master_weights is 'bf16' in a training of something small, or by rewards"):
        check_master_weights(kind(run_name="r", settings=TrainingSettings(**BITS), **more))


def test_a_run_out_of_memory_hears_of_it_where_it_applies():
    assert "master_weights bf16" in memory_hints(config(), (512, 512))
    for other in (config(**BITS), config(ema_decay=0.9), config(optimizer="Lion"), LoraConfig(run_name="r")):
        assert "master_weights" not in memory_hints(other, (512, 512))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(rounding, "world", lambda: dataclasses.make_dataclass("World", ["size"])(2))
    with pytest.raises(ValueError, match="with 2 processes; expected one"):
        check_master_weights(config(**BITS))
