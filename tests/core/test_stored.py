"""Weights held as their file has them, fp16, fp8 or int8: the numbers that they stand for, and no more bytes."""

import json

import pytest
import torch
from retune.training.commands.open_model import build_model
from retune.training.commands.train import holding, trained_weights
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.model import ModelConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.precision import autocast
from retune.training.models import ldm
from retune.training.models.diffusers import load_model
from retune.training.models.protocols import Conditioning
from retune.training.models.quantised import scaled, unfolded
from retune.training.models.recast import hold, is_quantised
from retune.training.models.stored import StoredTensor, exact, hadamard, rotated_back
from retune.training.recipes.lora import train_lora
from retune.training.recipes.textual_inversion import train_embedding
from retune.training.recipes.unet import train_model
from retune.training.text_encoder.projection import Projection
from retune.training.text_encoder.t5 import load_t5
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

CPU, GROUP = torch.device("cpu"), 16
FORMATS = {
    "fp8": ({"format": "float8_e4m3fn"}, torch.float8_e4m3fn, 448),
    "int8": ({"format": "int8_tensorwise"}, torch.int8, 127),
    "int8, rows": ({"format": "int8_tensorwise"}, torch.int8, 127),
    "int8, convrot": ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}, torch.int8, 127),
}


def quantised(value, kind):
    """A weight and its scale in one of ComfyUI's formats."""
    _, dtype, largest = FORMATS[kind]
    value = rotated_back(value, GROUP) if kind == "int8, convrot" else value  # its own inverse
    scale = value.abs().max() if kind in ("fp8", "int8") else value.abs().amax(1, keepdim=True)
    scale = (scale / largest).clone()
    return (value / scale).round().to(dtype) if dtype == torch.int8 else (value / scale).to(dtype), scale


def quantise_file(path, kind):
    """Rewrites a checkpoint with the linear layers of its UNet's transformers as ComfyUI saves quantised ones, and all
    else in fp16."""
    tensors, metadata = read_tensors(path)
    result = {}
    for name, value in tensors.items():
        result[name] = value.half() if value.is_floating_point() else value
        if name.startswith(ldm.UNET_PREFIX) and "transformer_blocks" in name and value.ndim == 2:
            layer = name.removesuffix(".weight")
            result[name], result[f"{layer}.weight_scale"] = quantised(value, kind)
            about = json.dumps(FORMATS[kind][0]).encode()
            result[f"{layer}.comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
    write_tensors(path, result, metadata)
    return path


def gradient(model, dtype="bf16"):
    """Of the UNet's output with respect to its inputs, which passes through all of its weights."""
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=random).requires_grad_()
    words = torch.randn(2, 6, 32, generator=random).requires_grad_()
    with autocast(dtype, CPU):
        output = model.denoiser.predict(noisy, torch.tensor([1.0, 3.0]), Conditioning(words))
    output.float().square().sum().backward()
    return torch.cat([noisy.grad.flatten(), words.grad.flatten()])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_trains_on_a_quantised_base_which_stays_as_it_is(single_file, pictures, tmp_path, kind):
    path, tokenizer = quantise_file(single_file, kind), tmp_path / "clip_tokenizer"
    config = ModelConfig(model=str(path), tokenizer=tokenizer)
    plain, held = load_model(path, tokenizer=tokenizer), build_model(config, torch.bfloat16, text_trains=False)
    weights = dict(held.denoiser.network.named_parameters())
    stored = {name: value for name, value in weights.items() if is_quantised(value)}
    assert len(stored) > 10 and {value.stored.dtype for value in stored.values()} == {FORMATS[kind][1]}
    exactly = dict(plain.denoiser.network.named_parameters())
    assert all(torch.equal(value.dequantize(), exactly[name]) for name, value in stored.items())
    assert sum(v.nbytes for v in stored.values()) < 0.35 * sum(exactly[name].nbytes for name in stored)
    assert held.denoiser.fingerprint == plain.denoiser.fingerprint
    settings = TrainingSettings(warmup_steps=0, precision="bf16", caption_dropout=0.0)
    chosen = LoraConfig(run_name="r", steps=1, batch_size=2, rank=2, settings=settings, learning_rate=1e-2)
    before = {name: value.stored.float() for name, value in stored.items()}
    trained = train_lora(held, pictures, chosen, tmp_path / "runs")
    assert any(value.any() for name, value in read_tensors(trained.path)[0].items() if "lora_up" in name)
    after = dict(held.denoiser.network.named_parameters())
    assert all(torch.equal(after[name].stored.float(), value) for name, value in before.items())
    assert not any("forward" in vars(module) for module in held.denoiser.network.modules())


@pytest.mark.parametrize("kind", FORMATS)
def test_the_gradient_is_that_of_the_base_that_the_weights_stand_for(single_file, tmp_path, kind):
    from retune.training.models.recast import recastable, recasting

    path, tokenizer = quantise_file(single_file, kind), tmp_path / "clip_tokenizer"
    expected = gradient(load_model(path, tokenizer=tokenizer), "fp32")
    held = build_model(ModelConfig(model=str(path), tokenizer=tokenizer), torch.bfloat16)
    with recasting(recastable(held.denoiser.network)):
        assert F.cosine_similarity(gradient(held), expected, dim=0) > 0.99


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"per_channel": True, "convrot": True}])
def test_int8_is_what_comfyui_reads(options):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    options |= {"convrot_groupsize": GROUP} if "convrot" in options else {}
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    tensor = kitchen.QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", **options)
    about = {"format": "int8_tensorwise"} | {key: value for key, value in options.items() if "convrot" in key}
    state = {f"a.{name}": value for name, value in tensor.state_dict("weight").items()}
    state["a.comfy_quant"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    torch.testing.assert_close(unfolded(state, {})["a.weight"], tensor.dequantize())
    torch.testing.assert_close(unfolded(state, {})["a.weight"], weight, rtol=0, atol=0.05)


def test_int8_without_its_format_and_groups_that_do_not_fit_are_refused():
    layer = {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(())}

    def about(**values):
        text = json.dumps({"format": "int8_tensorwise", **values}).encode()
        return {"a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}

    with pytest.raises(ValueError, match="a.weight is torch.int8, and its format None"):
        scaled(layer, {})
    with pytest.raises(ValueError, match="expected rows of a multiple of 16"):
        scaled(layer | about(convrot=True, convrot_groupsize=16), {})
    with pytest.raises(ValueError, match="convrot_groupsize is 8; expected a power of 4"):
        scaled(layer | about(convrot=True, convrot_groupsize=8), {})
    with pytest.raises(ValueError, match="a.weight is torch.float32, and its format 'int8_tensorwise'"):
        scaled(layer | about() | {"a.weight": torch.zeros(4, 8)}, {})
    assert torch.allclose(hadamard(16) @ hadamard(16), torch.eye(16))


@torch.no_grad()
def encodings(model):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = model.text_encoder.encode(model.text_encoder.tokenize(["a red circle", "two small blue squares"]))
    latent = model.autoencoder.encode(image)
    return words.context, latent, model.autoencoder.decode(latent)


def test_text_encoder_and_vae_of_an_fp16_file_keep_its_bytes_and_fp32s_bits(single_file, tmp_path):
    tensors, metadata = read_tensors(single_file)
    write_tensors(single_file, {name: value.half() for name, value in tensors.items()}, metadata)
    options = {"tokenizer": tmp_path / "clip_tokenizer"}
    plain = load_model(single_file, **options)
    held = build_model(ModelConfig(model=str(single_file), **options), torch.bfloat16, text_trains=False)
    assert all(torch.equal(*pair) for pair in zip(encodings(held), encodings(plain), strict=True))
    assert held.text_encoder.fingerprint == plain.text_encoder.fingerprint
    assert held.autoencoder.fingerprint == plain.autoencoder.fingerprint
    for part in ("text_encoder", "autoencoder"):
        layers = [m for m in getattr(held, part).network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert {layer.weight.stored.dtype for layer in layers} == {torch.float16}
        others = [p for p in getattr(held, part).network.parameters() if not is_quantised(p)]
        assert {p.dtype for p in others} == {torch.float32}
    single_file.write_bytes(b"")  # nothing of it is mapped any more
    assert all(torch.equal(*pair) for pair in zip(encodings(held), encodings(plain), strict=True))


@pytest.mark.parametrize("train", ["QK", "whole UNet"])
def test_retraining_in_fp32_keeps_the_bytes_of_an_fp16_file_beside_its_masters(single_file, pictures, tmp_path, train):
    """With the bits of a run on fp32 weights, samples and validation too; what does not train computes in fp32."""
    tensors, metadata = read_tensors(single_file)
    write_tensors(single_file, {name: value.half() for name, value in tensors.items()}, metadata)
    settings = TrainingSettings(warmup_steps=0, precision="fp32", validation_fraction=0.3, validate_every=1)
    samples = SamplePrompts(prompts=("a red circle",), every=1, steps=2, cfg=2.0, width=32, height=32)
    config = TrainModelConfig(run_name="r", steps=2, batch_size=2, train=train, settings=settings, samples=samples)
    options = ModelConfig(model=str(single_file), tokenizer=tmp_path / "clip_tokenizer")
    held, exact = build_model(options, **holding(config)), build_model(options)
    weights = dict(held.denoiser.network.named_parameters())
    before = {name: value.detach().clone() for name, value in weights.items()}
    halves = {name for name, value in before.items() if value.dtype == torch.float16}
    trains = trained_weights(config)
    assert halves and all(trains(held.denoiser.canonical_name(name)) for name in halves)
    found = [train_model(model, pictures, config, tmp_path / f"{i}") for i, model in enumerate((held, exact))]
    assert all(torch.equal(found[0].unet[name], value) for name, value in found[1].unet.items())
    for file in ("metrics.jsonl", "model.safetensors", "state/latest.safetensors", "samples/000002_00.png"):
        assert (tmp_path / "0" / "r" / file).read_bytes() == (tmp_path / "1" / "r" / file).read_bytes()
    after = dict(held.denoiser.network.named_parameters())
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


SETTINGS = TrainingSettings(warmup_steps=0, precision="bf16")
IN_TEXT = {
    "LoRA": (train_lora, LoraConfig(run_name="r", steps=2, rank=2, text_encoder_learning_rate=1e-2, settings=SETTINGS)),
    "DoRA": (
        train_lora,
        LoraConfig(run_name="r", steps=2, algorithm="DoRA", text_encoder_learning_rate=1e-2, settings=SETTINGS),
    ),
    "word": (
        train_embedding,
        EmbeddingConfig(run_name="r", steps=2, token="red", initial_text="blue", settings=SETTINGS),
    ),
}
"""What trains in a text encoder without changing its weights."""


@pytest.mark.parametrize("kind", IN_TEXT)
def test_a_text_encoder_beside_what_trains_in_it_keeps_its_files_bytes_and_fp32s_bits(
    single_file, pictures, tmp_path, kind
):
    tensors, metadata = read_tensors(single_file)
    write_tensors(single_file, {name: value.half() for name, value in tensors.items()}, metadata)
    train, config = IN_TEXT[kind]
    options = ModelConfig(model=str(single_file), tokenizer=tmp_path / "clip_tokenizer")
    held, exact = build_model(options, **holding(config)), build_model(options)
    exact.denoiser.store_in(torch.bfloat16)
    linear = [m for m in held.text_encoder.network.modules() if isinstance(m, nn.Linear)]
    assert {layer.weight.stored.dtype for layer in linear} == {torch.float16}
    paths = [train(model, pictures, config, tmp_path / f"{i}").path for i, model in enumerate((held, exact))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    rows = [(path.parent / "metrics.jsonl").read_bytes() for path in paths]
    assert rows[0] == rows[1]


def test_a_folder_in_fp16_is_held_likewise(diffusers_folder):
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = diffusers_folder / part / f"{name}.safetensors"
        tensors, metadata = read_tensors(file)
        halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        write_tensors(file, halves, metadata or {"format": "pt"})
    plain = load_model(diffusers_folder)
    held = build_model(ModelConfig(model=str(diffusers_folder)), torch.bfloat16, text_trains=False)
    assert all(torch.equal(*pair) for pair in zip(encodings(held), encodings(plain), strict=True))
    for part in ("text_encoder", "autoencoder"):
        layers = [m for m in getattr(held, part).network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert {layer.weight.stored.dtype for layer in layers} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_t5_keeps_its_files_bytes_and_fp32s_bits(write_t5_folder, tmp_path, dtype):
    """Also in the layer to whose dtype T5 casts its activations, which overflow in fp16."""
    folder = write_t5_folder(tmp_path / "t5")
    tensors, metadata = read_tensors(folder / "model.safetensors")
    layers = {name for name, value in tensors.items() if value.ndim == 2 and "block" in name and "bias" not in name}
    stored = {name: value.to(dtype if name in layers else torch.float16) for name, value in tensors.items()}
    if dtype == torch.float8_e4m3fn:
        stored |= {f"{name}_scale": torch.tensor(0.5) for name in layers}
    write_tensors(folder / "model.safetensors", stored, metadata or {})
    plain, held = (load_t5(folder, Projection(64, 32, "orthogonal"), held=held) for held in (False, True))
    tokens = plain.tokenize(["a red circle", "two small blue squares"])
    with torch.no_grad():
        assert torch.equal(held.backbone(tokens).context, plain.backbone(tokens).context)
    assert held.fingerprint == plain.fingerprint
    linear = [layer for layer in held.model.modules() if isinstance(layer, nn.Linear)]
    assert linear and {layer.weight.stored.dtype for layer in linear} == {dtype}


def test_a_network_moves_with_its_stored_weights_also_after_a_rehearsal():
    network = hold(nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Conv1d(1, 1, 1)).half())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert network[0](torch.zeros(2, 8)).shape == (2, 4)
    moved = network.to("meta")
    assert isinstance(moved[0].weight, StoredTensor) and moved[0].weight.stored.device.type == "meta"
    assert moved[0].weight.device.type == "meta" and moved[2].weight.dtype == torch.float32
    value = StoredTensor(torch.ones(4, 2, dtype=torch.float16))
    assert value.nbytes == 16 and value.dtype == torch.float32 and torch.equal(exact(value), torch.ones(4, 2))
    assert isinstance(value.clone(), StoredTensor) and value.half().dtype == torch.float16
    assert torch.equal(value @ torch.ones(2, 1), torch.full((4, 1), 2.0))
