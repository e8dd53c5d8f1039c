"""Precision "auto", and frozen weights in the dtype of the arithmetic."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands import train
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.commands.train import trained_weights
from retune.training.common.foreign import read_tensors
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig, former_identity, identity
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.precision import autocast, default_precision, loss_scaler
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.recipes.checks import check_precision, with_precision
from retune.training.recipes.lora import unet_layers
from retune.training.runs.folder import RunFolder
from retune.training.trainables.lora import Adapters, select_layers
from torch import nn

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Sets the compute capability that torch tells of a CUDA device."""

    def set_capability(major):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    monkeypatch.setattr(torch.version, "hip", None)
    return set_capability


@pytest.mark.parametrize(("major", "plain", "reward"), [(9, "bf16", "bf16"), (8, "bf16", "bf16"), (7, "fp16", "fp32")])
def test_auto_goes_by_the_card_alone(card, major, plain, reward):
    card(major)
    assert (default_precision(CUDA), default_precision(CUDA, scaled=False)) == (plain, reward)


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_auto_is_fp32_without_such_a_card(kind):
    assert default_precision(torch.device(kind)) == "fp32"


def test_auto_on_a_cpu_neither_casts_nor_scales():
    with autocast("auto", CPU):
        assert not torch.is_autocast_enabled("cpu")
    assert not loss_scaler("auto", CPU).is_enabled()


def test_auto_is_the_default_and_the_last_choice():
    assert TrainingSettings().precision == "auto"
    assert former_identity(TrainModelConfig(run_name="r"))["settings"]["precision"] == "fp32"


def config_of(kind=TrainModelConfig, precision="auto", **values):
    return kind(run_name="r", settings=TrainingSettings(precision=precision), **values)


def begin(root, precision):
    """A run's folder with its settings; without a precision for None."""
    entries = identity(config_of(precision=precision or "fp32"))
    if precision is None:
        del entries["settings"]["precision"]
    (root / "r").mkdir(parents=True)
    (root / "r" / "config.json").write_text(json.dumps({"identity": {"kind": "model", **entries}, "config": {}}))


@pytest.mark.parametrize(("begun", "expected"), [("bf16", "bf16"), ("fp32", "fp32"), (None, "fp32")])
def test_a_run_that_goes_on_keeps_what_auto_was(card, tmp_path, begun, expected, caplog):
    """Also one from before there was a choice, on a card that would have another default."""
    card(7)
    begin(tmp_path, begun)
    assert with_precision(config_of(), CUDA, tmp_path).settings.precision == expected
    assert with_precision(config_of(resume="restart"), CUDA, tmp_path).settings.precision == "fp16"
    assert with_precision(config_of(precision="bf16"), CUDA, tmp_path).settings.precision == "bf16"


def test_a_new_run_takes_the_devices_and_says_so_once(card, tmp_path, caplog):
    card(7)
    caplog.set_level("INFO")
    assert with_precision(config_of(), CUDA, tmp_path).settings.precision == "fp16"
    assert [r.message for r in caplog.records] == ["precision auto is fp16, by the device (cuda)"]
    assert with_precision(config_of(RewardTuneConfig), CUDA, tmp_path).settings.precision == "fp32"
    fused = TrainModelConfig(run_name="r", settings=TrainingSettings(fused_backward=True))  # refuses fp16
    assert with_precision(fused, CUDA, tmp_path).settings.precision == "fp32"
    assert with_precision(config_of(), CPU, tmp_path).settings.precision == "fp32"
    caplog.clear()
    resolved = with_precision(config_of(precision="fp32"), CUDA, tmp_path)
    assert resolved.settings.precision == "fp32" and not caplog.records


def test_bf16_on_a_card_without_it_is_slow_and_fp16_without_cuda_an_error(card, caplog):
    card(7)
    check_precision("bf16", CUDA)
    assert "slow" in caplog.text
    with pytest.raises(ValueError, match="precision is 'fp16' without a CUDA device"):
        check_precision("fp16", CPU)


@pytest.fixture(scope="module")
def exact():
    return build_model(ModelConfig(model="demo"))


def predict(model, precision):
    random = torch.Generator().manual_seed(0)
    noisy, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 6, 128, generator=random)
    with torch.no_grad(), autocast(precision, CPU):
        return model.denoiser.predict(noisy, torch.tensor([1.0, 3.0]), Conditioning(words))


def test_weights_held_in_bf16_give_the_bits_of_autocast(exact):
    """So that a run of an earlier version, which cast fp32 weights in every step, goes on with the same bits."""
    held = build_model(ModelConfig(model="demo"), torch.bfloat16)
    assert torch.equal(predict(held, "bf16"), predict(exact, "bf16"))
    assert held.denoiser.fingerprint == exact.denoiser.fingerprint
    bytes_of = [sum(p.nbytes for p in m.denoiser.network.parameters()) for m in (held, exact)]
    assert bytes_of[0] < 0.52 * bytes_of[1]
    linear = [m for m in held.denoiser.network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert {m.weight.dtype for m in linear} == {torch.bfloat16}
    norms = [m for m in held.denoiser.network.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    assert {m.weight.dtype for m in norms} == {torch.float32}
    assert {p.dtype for p in held.text_encoder.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(("config", "count"), [(config_of(train="cross-attention K/V"), 2), (config_of(LoraConfig), 0)])
def test_what_trains_begins_with_all_its_digits(exact, config, count):
    held = build_model(ModelConfig(model="demo"), torch.bfloat16, trained_weights(config))
    whole = parameter_refs(exact.denoiser.network)
    found = parameter_refs(held.denoiser.network)
    kept = {n for n, ref in found.items() if ref.tensor.dtype != torch.bfloat16 and "norm" not in n}
    assert all(torch.equal(found[name].tensor.float(), whole[name].tensor) for name in kept)
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in kept) and bool(kept) == bool(count)


def test_all_of_a_unet_that_is_tuned_by_rewards_stays_exact():
    tuned = trained_weights(config_of(RewardTuneConfig, train="UNet"))
    assert tuned("out.2.weight") and not trained_weights(config_of(RewardTuneConfig, train="UNet LoRA"))("out.2.weight")


def test_no_frozen_weight_is_cast_in_a_step_where_it_has_the_arithmetics_dtype():
    held = build_model(ModelConfig(model="demo"), torch.bfloat16)
    config = LoraConfig(run_name="r", rank=2, targets="attention + feed-forward")
    network = held.denoiser.network
    adapters = Adapters(select_layers(unet_layers(held.denoiser), config), [network], config, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    casts = CastsOf(network)
    noisy, words = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 128)
    with adapters.attach(), autocast("bf16", CPU), casts:
        held.denoiser.predict(noisy, torch.tensor([1.0]), Conditioning(words)).square().mean().backward()
    assert casts.bytes == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class CastsOf(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of a network's linear and convolution weights that are cast."""

    def __init__(self, network):
        super().__init__()
        self.bytes, weights = 0, [p for p in network.parameters() if p.ndim > 1]
        self.storages = {p.untyped_storage().data_ptr() for p in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.storages:
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_the_identity_of_a_run_holds_what_auto_became(tmp_path):
    config = with_precision(config_of(), CPU, tmp_path)
    assert identity(config)["settings"]["precision"] == "fp32"
    assert RunFolder(tmp_path / "r").config() is None
    assert identity(replace(config, settings=replace(config.settings, precision="bf16"))) != identity(config)


@pytest.mark.parametrize(("kind", "result"), [("lora", "lora.safetensors"), ("train", "model.safetensors")])
def test_a_bf16_run_on_held_weights_has_the_bits_of_one_on_fp32_weights(tmp_path, monkeypatch, kind, result):
    """The latter is what earlier versions trained on: a weight cast in every step, here without a copy kept."""
    words = json.loads((FIXTURES / "runs" / kind / "arguments.json").read_bytes())
    results = []
    for name in ("held", "cast"):
        flags = [word.replace("{here}", str(FIXTURES)).replace("{output}", str(tmp_path / name)) for word in words]
        assert main([*flags, "--precision", "bf16", "--steps", "2", "--warmup-steps", "1"]) == 0
        results.append(read_tensors(tmp_path / name / "r" / result)[0])
        monkeypatch.setattr(train, "build_model", lambda config, *dtype, **more: build_model(config))
    config = json.loads((tmp_path / "held" / "r" / "config.json").read_bytes())
    assert config == json.loads((tmp_path / "cast" / "r" / "config.json").read_bytes())
    assert config["identity"]["settings"]["precision"] == "bf16"
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
