"""What a run takes of the memory: as computed before it and as its tensors are; refused where it cannot fit."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from retune.benchmarks import memory_use
from retune.training.common.callbacks import Callbacks
from retune.training.common.live_bytes import LiveBytes
from retune.training.config.lora import LoraConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop import estimate as module
from retune.training.loop import known_peaks
from retune.training.loop.estimate import MemoryEstimate, _state_bytes, check_memory, free_bytes
from retune.training.loop.known_peaks import key_of
from retune.training.loop.optimizers import PACKAGES
from retune.training.models.block_swap import freed_bytes
from retune.training.models.blocks import blocks_in_order
from retune.training.models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from retune.training.models.stored import StoredTensor
from retune.training.models.visitors import Visitors
from retune.training.recipes import run as recipe
from retune.training.recipes.lora import train_lora
from retune.training.recipes.reward import tune
from retune.training.recipes.unet import train_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .test_reward_tune import PROMPTS, reward
from .test_reward_tune import config as reward_config

pytestmark = pytest.mark.own_peaks
CPU = torch.device("cpu")


class Records(Callbacks):
    """Keeps the texts and the memory of the first two steps' tensors."""

    def __init__(self):
        self.texts, self.live = [], LiveBytes()

    def on_text(self, text):
        self.texts.append(text)


def counted(train, monkeypatch):
    """A training's estimate and the peak of what its steps' tensors take besides what was there before."""
    estimates, live, callbacks = [], LiveBytes(), Records()
    original, steps = recipe.expect_memory, recipe.Loop._train_step

    def expect_memory(*arguments):
        estimates.append(original(*arguments))
        return estimates[-1]

    def step(loop):
        with live:
            steps(loop)

    monkeypatch.setattr(recipe, "expect_memory", expect_memory)
    monkeypatch.setattr(recipe.Loop, "_train_step", step)
    train(callbacks)
    (estimate,) = estimates
    assert any(text.startswith("memory: at most about") and "are free" in text for text in callbacks.texts)
    return estimate, live.peak


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "AdamW"},
        {"optimizer": "SGD", "gradient_accumulation": 2, "precision": "bf16"},
        {"optimizer": "Adafactor", "gradient_checkpointing": True},
        {"optimizer": "AdamW", "fused_backward": True},
    ],
)
@pytest.mark.parametrize("kind", ["LoRA", "UNet"])
def test_an_estimate_is_what_real_steps_take(tiny_model, pictures, tmp_path, monkeypatch, kind, settings):
    settings = TrainingSettings(warmup_steps=1, caption_dropout=0.0, **settings)
    common = {"run_name": "r", "steps": 2, "batch_size": 3, "settings": settings}
    if kind == "LoRA":
        run = partial(train_lora, tiny_model, pictures, LoraConfig(**common, rank=2), tmp_path)
    else:
        run = partial(train_model, tiny_model, pictures, TrainModelConfig(**common, train="whole UNet"), tmp_path)
    estimate, peak = counted(lambda callbacks: run(callbacks=callbacks), monkeypatch)
    assert estimate.needed == pytest.approx(peak, rel=0.1)
    networks = (tiny_model.denoiser.network, tiny_model.autoencoder.network, tiny_model.text_encoder.network)
    assert estimate.weights == sum(parameter.nbytes for network in networks for parameter in network.parameters())
    if kind == "UNet":
        sizes = [parameter.nbytes for parameter in networks[0].parameters()]
        assert estimate.masters == sum(sizes)
        assert estimate.gradients == (max(sizes) if settings.fused_backward else sum(sizes))


def test_an_estimate_counts_block_swap(tiny_model, pictures, tmp_path, monkeypatch):
    """On a CPU the copies of two blocks are added; in this UNet they are not there with most of the activations."""
    blocks = blocks_in_order(tiny_model.denoiser)
    settings = TrainingSettings(warmup_steps=1, block_swap=len(blocks), gradient_checkpointing=True)
    config = LoraConfig(run_name="r", steps=2, batch_size=1, rank=2, settings=settings)
    run = partial(train_lora, tiny_model, pictures, config, tmp_path)
    estimate, peak = counted(lambda callbacks: run(callbacks=callbacks), monkeypatch)
    sizes = [sum(-(-p.nbytes // 256) * 256 for p in block.parameters()) for block in blocks]
    assert -estimate.swapped == max(one + other for one, other in zip(sizes, sizes[1:], strict=False))
    assert 0.9 * (estimate.needed + estimate.swapped) < peak < 1.1 * estimate.needed


def test_block_swap_frees_all_blocks_but_two_of_a_device(sd15_unet):
    unet = type(sd15_unet).from_config(sd15_unet.config).to("meta")
    denoiser = DiffusersDenoiser(unet)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks_in_order(denoiser)]
    pairs = [one + other for one, other in zip(sizes[-5:], [*sizes[-4:], 0], strict=True)]
    assert freed_bytes(denoiser, 5) == pytest.approx(sum(sizes[-5:]) - max(pairs), abs=2 * 256 * 40)
    assert freed_bytes(denoiser, 1) == pytest.approx(0, abs=256 * 40) and freed_bytes(denoiser, 0) == 0
    names = {denoiser.canonical_name(name) for name, _ in unet.named_parameters()}
    assert freed_bytes(denoiser, 5, names) == 0


def test_a_swapped_run_needs_less_than_what_leaves():
    swapped = estimate(weights=10, swapped=30)
    assert (swapped.present, swapped.peak, swapped.needed) == (41, 22, -19)
    check_memory(swapped, 0, CPU, "")


@pytest.mark.parametrize("changes", [{"train": "text encoder"}, {"train": "UNet LoRA", "stop_gradient": False}])
def test_an_estimate_of_reward_tuning(tiny_model, tmp_path, monkeypatch, changes):
    settings = TrainingSettings(warmup_steps=1)
    chosen = reward_config(steps=2, lora_rank=2, width=64, height=64, settings=settings, **changes)
    run = partial(tune, tiny_model, reward(), PROMPTS, chosen, tmp_path)
    estimate, peak = counted(lambda callbacks: run(callbacks=callbacks), monkeypatch)
    assert estimate.needed == pytest.approx(peak, rel=0.1) and estimate.decode > 0


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "SGD", *PACKAGES])
@pytest.mark.parametrize("shape", [(3000, 64), (70, 7), (400000,), (500, 20, 3, 3), ()])
def test_states_of_large_parameters_follow_from_small_ones(optimizer, shape):
    settings, weight = TrainingSettings(optimizer=optimizer), nn.Parameter(torch.zeros(shape))
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer][0])
    found, _ = _state_bytes(shape, weight, settings)
    weight.grad = torch.zeros_like(weight)
    real = module.build_optimizer({"": weight}, 1.0, settings)
    real.step()
    tensors = (value for value in real.state[weight].values() if isinstance(value, torch.Tensor))
    assert found == pytest.approx(sum(value.nbytes for value in tensors), rel=1e-3)  # 8-bit states are whole blocks


def estimate(**changes):
    parts = {"weights": 40, "masters": 1, "average": 0, "optimizer": 2, "update": 3, "gradients": 1, "activations": 9}
    return MemoryEstimate(**{"step": 9, **parts, **changes})


def test_the_parts_are_not_there_all_together():
    assert (estimate().present, estimate().peak, estimate().needed) == (41, 52, 11)
    assert estimate(accumulates=True).peak == 53  # gradients of the batch before
    assert estimate(decode=20).peak == 63 and estimate(decode=20, accumulates=True).peak == 64
    assert estimate(update=30).peak == 74
    text = estimate(weights=3_400_000_000, activations=2_000_000, step=0).text(8_000_000_000)
    assert text.startswith("memory: at most about 3.40 GB (weights 3.40 GB, ")
    assert "activations 2 MB" in text and text.endswith("8.00 GB are free")
    assert estimate().as_dict()["peak"] == 52


def test_what_cannot_fit_is_refused_with_what_to_lower(caplog, monkeypatch):
    monkeypatch.setattr(module, "_swap_bytes", lambda device: 0)
    check_memory(estimate(), 11, CPU, "Turn it off.")
    check_memory(estimate(), None, CPU, "")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_memory(estimate(step=105), 100, CPU, "Turn it off.")  # within the estimate's error
    assert "Turn it off." in caplog.text
    with pytest.raises(ValueError, match="memory that the run takes on cpu is about .*; expected at most .*Turn it"):
        check_memory(estimate(step=120), 100, CPU, "Turn it off.")


def test_a_run_that_cannot_fit_ends_before_its_first_step(tiny_model, pictures, tmp_path, monkeypatch):
    """With one sample encoded at most, and the name is free for other settings; those of a run that trained are not."""
    monkeypatch.setattr(module, "_swap_bytes", lambda device: 0)
    config = LoraConfig(run_name="r", steps=2, batch_size=2)
    with monkeypatch.context() as full:
        full.setattr(recipe, "free_bytes", lambda device: 1000)
        with pytest.raises(ValueError, match="expected at most .*which are free.* gradient_checkpointing on"):
            train_lora(tiny_model, pictures, config, tmp_path)
        assert cached(tmp_path, "latents") == 1 and cached(tmp_path, "text") <= 2
    assert not (tmp_path / "r" / "lora.safetensors").exists()
    train_lora(tiny_model, pictures, replace(config, rank=2), tmp_path)
    assert cached(tmp_path, "latents") == 6 and cached(tmp_path, "text") == 4  # with the empty caption
    with pytest.raises(ValueError, match="rank is 3; run 'r' was made with 2"):
        train_lora(tiny_model, pictures, replace(config, rank=3), tmp_path)


def cached(root, kind):
    return len(list((root / ".cache" / kind).rglob("*.safetensors")))


def test_a_reward_tuning_that_cannot_fit_encodes_nothing_in_advance(tiny_model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(module, "_swap_bytes", lambda device: 0)
    samples = SamplePrompts(prompts=("a red circle",), steps=1, width=32, height=32)
    config, callbacks = reward_config(method="direct", train="UNet LoRA", samples=samples), Records()
    with pytest.raises(ValueError, match="expected at most .*which are free"):
        tune(tiny_model, reward(), [], config, tmp_path, callbacks, dataset=pictures)
    assert cached(tmp_path, "latents") == 1
    assert not any("reading the sample prompts" in text for text in callbacks.texts)


def test_memory_of_models_that_are_unloaded_when_it_is_short_counts_as_free(
    tiny_model, pictures, tmp_path, monkeypatch
):
    class Manages(Records):
        def managed_bytes(self, device):
            return 10**9

    monkeypatch.setattr(recipe, "free_bytes", lambda device: 1000)
    callbacks = Manages()
    train_lora(tiny_model, pictures, LoraConfig(run_name="r", steps=1), tmp_path, callbacks)
    assert any("1.00 GB are free" in text for text in callbacks.texts)


def test_a_models_idle_parts_are_no_weights_of_the_run(tiny_model, pictures, tmp_path, monkeypatch):
    """What ComfyUI unloads for a step; a VAE among them comes back to decode samples."""
    vae, clip = tiny_model.autoencoder.network, tiny_model.text_encoder.network
    samples = SamplePrompts(prompts=("a red circle",), steps=1, width=32, height=32)
    estimates, original = [], recipe.expect_memory
    monkeypatch.setattr(recipe, "expect_memory", lambda *arguments: estimates.append(original(*arguments)))
    for number, idle in enumerate(((), (vae, clip))):
        callbacks = Records()
        callbacks.idle_networks = lambda idle=idle: idle
        config = LoraConfig(run_name=f"{number}", steps=1, samples=samples)
        train_lora(tiny_model, pictures, config, tmp_path, callbacks)
    sizes = [sum(parameter.nbytes for parameter in network.parameters()) for network in (vae, clip)]
    assert estimates[0].weights - estimates[1].weights == sum(sizes)
    assert estimates[1].decode - estimates[0].decode == sizes[0]
    assert estimates[1].activations == estimates[0].activations


def test_the_peaks_of_other_libraries_are_computed_anew(tiny_model, monkeypatch):
    networks, config = [tiny_model.denoiser.network], LoraConfig(run_name="r")
    assert key_of(config, networks, {}) == key_of(config, networks, {}, versions={})
    assert key_of(config, networks, {}, versions={"ComfyUI": "1"}) != key_of(
        config, networks, {}, versions={"ComfyUI": "2"}
    )
    keys = []
    for changed in (*known_peaks._LIBRARIES, None):
        monkeypatch.setattr(known_peaks, "version", lambda name, changed=changed: "2" if name == changed else "1")
        keys.append(key_of(config, networks, {}))
    assert len(set(keys)) == len(keys) == 4


def test_a_model_that_needs_values_trains_without_an_estimate(tiny_model, pictures, tmp_path, caplog):
    class Reads(type(tiny_model.denoiser)):
        def predict(self, noisy, sigma, conditioning):
            assert sigma[0].item() >= 0
            return super().predict(noisy, sigma, conditioning)

    denoiser = Reads(tiny_model.denoiser.network)
    model = replace(tiny_model, denoiser=denoiser)
    with caplog.at_level(logging.WARNING):
        train_lora(model, pictures, LoraConfig(run_name="r", steps=1), tmp_path)
    assert "the memory is not known" in caplog.text


def test_samples_larger_than_the_training_pictures_count(tiny_model, pictures, tmp_path, monkeypatch):
    samples = SamplePrompts(prompts=("a red circle",), steps=1, width=128, height=128)
    config = LoraConfig(run_name="r", steps=1, batch_size=1, samples=samples)
    estimate, _ = counted(partial(train_lora, tiny_model, pictures, config, tmp_path), monkeypatch)
    assert estimate.decode > estimate.activations


def test_a_vae_that_is_elsewhere_comes_to_decode_samples_without_being_moved(tiny_model):
    """By torch's rules for a device that need not be there; its weights count where they have to come."""
    samples = SamplePrompts(prompts=("a red circle",), width=64, height=64)
    config = LoraConfig(run_name="r", steps=1, samples=samples)
    vae, unet, peaks = tiny_model.autoencoder.network, tiny_model.denoiser.network, []
    Visitors(unet, ([vae],), torch.device("cpu"))
    for place in ("cpu", "cuda"):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            denoiser = DiffusersDenoiser(type(unet).from_config(unet.config))
            there = vae if place == "cpu" else type(vae).from_config(vae.config)
            model = replace(tiny_model, denoiser=denoiser, autoencoder=DiffusersAutoencoder(there))
            with LiveBytes() as live:
                recipe.sample_decoding(model, config)["samples"]()
        peaks.append(live.peak)
    assert peaks[0] - peaks[1] == sum(parameter.nbytes for parameter in vae.parameters())
    assert all(type(parameter.data) is torch.Tensor and parameter.device == CPU for parameter in vae.parameters())


def test_quantised_weights_count_as_they_are_stored():
    weight = StoredTensor(torch.zeros(6, 5, dtype=torch.int8), torch.ones(6))
    frozen = nn.Parameter(weight, requires_grad=False)
    assert module._bytes_on(CPU, [frozen, frozen, torch.zeros(3)]) == 6 * 5 + 6 * 4 + 3 * 4
    with LiveBytes() as live:
        copied = frozen.clone()
    assert live.now == 6 * 5 + 6 * 4 and type(copied.data) is StoredTensor


def test_a_step_of_known_sizes_is_not_computed_again(tiny_model, pictures, tmp_path, monkeypatch):
    """Whatever the run is called; but for another batch, and where the file is damaged."""
    computed, rehearse = [], module.rehearse
    monkeypatch.setattr(module, "rehearse", lambda *arguments: computed.append(1) or rehearse(*arguments))
    estimates, original = [], recipe.expect_memory
    monkeypatch.setattr(recipe, "expect_memory", lambda *arguments: estimates.append(original(*arguments)))
    for name, batch in (("a", 1), ("b", 1), ("c", 2)):
        train_lora(tiny_model, pictures, LoraConfig(run_name=name, steps=1, batch_size=batch, seed=batch), tmp_path)
    assert len(computed) == 2 and estimates[0] == estimates[1] != estimates[2]
    (tmp_path / ".cache" / "memory.json").write_text("{", encoding="utf-8")
    train_lora(tiny_model, pictures, LoraConfig(run_name="d", steps=1), tmp_path)
    assert len(computed) == 3 and estimates[3] == estimates[0]


def test_free_memory_of_a_cpu_is_known():
    assert 0 < free_bytes(CPU) < 2**50


def test_the_estimate_of_a_benchmark_is_what_a_step_takes():
    """Of a model whose frozen weights are held in bf16, as a run in bf16 holds them; what trains is not rounded."""
    settings = TrainingSettings(precision="bf16", gradient_checkpointing=True)
    config, kinds = memory_use.MemoryConfig(pixels=64, rank=2), memory_use.KINDS
    models = {name: memory_use.sized_model("demo", CPU, kind, settings) for name, kind in kinds.items()}
    stored = {name: {p.dtype for p in model.denoiser.network.parameters()} for name, model in models.items()}
    assert torch.bfloat16 in stored["LoRA"] and torch.bfloat16 not in stored["whole UNet"]
    step, more = memory_use.make_step(models["LoRA"], kinds["LoRA"], settings, config, 64, 2)
    estimate = memory_use.estimate_step(models["LoRA"], step, more)
    assert estimate.needed == pytest.approx(memory_use.measure_step(models["LoRA"], step, 0), rel=0.1)
    networks = (models["LoRA"].denoiser.network, models["LoRA"].autoencoder.network)
    assert estimate.weights == sum(p.nbytes for network in networks for p in network.parameters())


@pytest.mark.slow
def test_weights_without_values_are_held_as_real_ones(monkeypatch):
    """About half the bytes in bf16. Of each kind of block there is one: values take time by their number, not size."""
    small = {"cross_attention_dim": 8, "attention_head_dim": 4, "block_out_channels": (8, 8), "layers_per_block": 1}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    small |= {"norm_num_groups": 4, "down_block_types": down, "up_block_types": up}
    monkeypatch.setattr(memory_use, "SD15_UNET", small)
    vae = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    monkeypatch.setattr(memory_use, "SD1_VAE", vae | blocks)
    config = memory_use.MemoryConfig(pixels=32, rank=2)
    for kind in memory_use.KINDS:
        estimates = {name: memory_use.Row(kind, name, config, "sd15", 32, 1).estimate(CPU) for name in ("fp32", "bf16")}
        for name, estimate in estimates.items():
            model, step, more = memory_use.Row(kind, name, config, "sd15", 32, 1).step(CPU)
            real = memory_use.estimate_step(model, step, more)
            assert (real.weights, real.masters) == (estimate.weights, estimate.masters)
            assert real.peak == pytest.approx(estimate.peak, rel=0.05), (kind, name)
        assert kind != "LoRA" or 0.45 < estimates["bf16"].weights / estimates["fp32"].weights < 0.6


def sdxl_training():
    """SDXL's UNet without values and a LoRA of it, and a function that trains two steps by SGD with momentum."""
    model = memory_use.sized_model("sdxl", mode := FakeTensorMode(allow_non_fake_inputs=True))
    settings = TrainingSettings(optimizer="SGD")
    step, _ = memory_use.make_step(model, memory_use.KINDS["LoRA"], settings, memory_use.MemoryConfig(), 512, 1)

    def train():
        inputs, momentum = (torch.zeros(1, 4, 64, 64), torch.ones(1), model.text_encoder.encode([""])), []
        for _ in range(2):
            with step.trainable.attach():
                loss = model.denoiser.predict(*inputs).square().mean()
                gradients = torch.autograd.grad(loss, list(step.trainable.parameters.values()))
            if momentum:
                torch._foreach_lerp_(momentum, gradients, 0.1)
            else:
                momentum.extend(gradient.clone() for gradient in gradients)
            del loss, gradients

    return model, step, mode, train


@pytest.mark.slow
def test_the_estimate_of_sdxl_is_what_its_tensors_take():
    """Masters, gradients, momentum and activations are counted as they are made, weights by their shapes."""
    model, step, mode, train = sdxl_training()
    estimate = memory_use.estimate_step(model, step, [model.autoencoder.network])
    networks = (model.denoiser.network, model.autoencoder.network)
    weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    assert estimate.weights == weights and 2.5e9 * 4 < weights < 2.8e9 * 4
    with mode, LiveBytes() as live:
        train()
    masters = sum(parameter.nbytes for parameter in step.trainable.parameters.values())
    assert estimate.peak == pytest.approx(weights + masters + live.peak, rel=0.1)
    assert estimate.needed == pytest.approx(live.peak, rel=0.1)
