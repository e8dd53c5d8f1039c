"""Results of earlier runs put into a model: exactly what their files hold, in order, and what does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.config.lora import ALGORITHMS, LoraConfig
from retune.training.formats.lora_metadata import LoraDescription
from retune.training.formats.lora_save import save_lora
from retune.training.models import ldm
from retune.training.recipes.apply_results import TunedFile, model_weights, tuned_file, tuned_identity, with_tuned
from retune.training.recipes.lora import networks_of, trainable_layers
from retune.training.text_encoder.projection import Projection
from retune.training.trainables.lora import Adapters, select_layers

UNET, TEXT = "diffusion_model.", "text_encoders."


@pytest.fixture
def tiny(single_file):
    """files put in -> the tiny model as the command line opens it."""

    def build(*tuned):
        tokenizer = single_file.parent / "clip_tokenizer"
        return build_model(ModelConfig(model=str(single_file), tokenizer=tokenizer, tuned=tuple(map(str, tuned))))

    return build


def copied(model):
    return {name: value.detach().clone() for name, value in model_weights(model).items()}


def moved(weights, seed, part):
    """Random weights for one part of a model, under the names of a run's file."""
    random = torch.Generator().manual_seed(seed)
    own = {name: value for name, value in weights.items() if name.startswith(part)}
    shifted = {name: value + 0.1 * torch.randn(value.shape, generator=random) for name, value in own.items()}
    return {name.replace(UNET, ldm.UNET_PREFIX, 1): value for name, value in shifted.items()}


def fingerprints(model):
    return model.denoiser.fingerprint, model.text_encoder.fingerprint


def test_weights_in_effect_are_the_files_in_their_order(tiny, tmp_path):
    base = tiny()
    weights = copied(base)
    text, unet, other = moved(weights, 0, TEXT), moved(weights, 1, UNET), moved(weights, 2, UNET)
    for name, tensors in (("text", text), ("unet", unet), ("other", other)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "tuned.safetensors", tensors)
    before = (tmp_path / "text" / "tuned.safetensors").read_bytes()
    model = tiny(tmp_path / "other", tmp_path / "text", tmp_path / "unet" / "tuned.safetensors")
    wanted = text | {name.replace(ldm.UNET_PREFIX, UNET, 1): value for name, value in unet.items()}
    assert all(torch.equal(value, wanted[name]) for name, value in model_weights(model).items())
    assert (tmp_path / "text" / "tuned.safetensors").read_bytes() == before
    changed = [fingerprints(tiny(tmp_path / name)) for name in ("text", "unet")]
    first, second = fingerprints(base)
    assert [a == first for a, _ in changed] == [True, False] and [b == second for _, b in changed] == [False, True]
    half = copied(tiny(f"{tmp_path / 'text'}:0.25"))
    for name, value in text.items():
        torch.testing.assert_close(half[name], 0.75 * weights[name] + 0.25 * value, rtol=0, atol=1e-7)
    assert all(torch.equal(half[name], value) for name, value in weights.items() if name.startswith(UNET))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_lora_adds_what_its_adapters_do(tiny, tmp_path, algorithm):
    base, strength = tiny(), 1.0 if algorithm == "DoRA" else 0.5
    text = "text_encoder_learning_rate"
    chosen = LoraConfig(run_name="r", rank=3, alpha=2.0, algorithm=algorithm, targets="all", **{text: 1e-3})
    layers = select_layers(trainable_layers(base, chosen), chosen)
    adapters = Adapters(layers, networks_of(base, layers), chosen, 0)
    random = torch.Generator().manual_seed(0)
    values = {n: v + 0.2 * torch.randn(v.shape, generator=random) for n, v in adapters.values().items()}
    write_tensors(tmp_path / "lora.safetensors", adapters.lora_model(values))
    about = LoraDescription(run={"unet": dict(base.denoiser.network.config)})
    if algorithm != "DoRA":
        save_lora(tmp_path / "kohya.safetensors", adapters.lora_model(values), description=about)
    tokens, random = base.text_encoder.tokenize(["a red circle"]), torch.Generator().manual_seed(1)
    noisy, sigma = torch.randn(1, 4, 16, 16, generator=random), torch.tensor([2.0])

    def seen(model):
        with torch.no_grad():
            words = model.text_encoder.encode(tokens)
            return words.context, model.denoiser.predict(noisy, sigma, words)

    with adapters.attach(values):
        wanted = seen(base)
    plain = seen(base)
    for file in tmp_path.glob("*a.safetensors"):
        for one, found, without in zip(wanted, seen(tiny(file)), plain, strict=True):
            assert (one - without).abs().max() > 1e-2 * one.abs().max()
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    whole, half = (copied(tiny(f"{tmp_path / 'lora.safetensors'}:{s}")) for s in (1, strength))
    weights = copied(base)
    for name, value in whole.items():
        torch.testing.assert_close(half[name] - weights[name], strength * (value - weights[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_run_in_half_precision_holds_what_was_put_in_as_few_bytes(single_file, tmp_path, live_bytes, strength):
    """The values of fp32 weights, rounded at the end; loading takes the files' memory more."""
    tensors, metadata = read_tensors(single_file)
    write_tensors(single_file, {name: value.half() for name, value in tensors.items()}, metadata)
    base = ModelConfig(model=str(single_file), tokenizer=tmp_path / "clip_tokenizer")
    weights = copied(build_model(base))
    write_tensors(tmp_path / "unet.safetensors", moved(weights, 0, UNET))
    name = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    write_tensors(tmp_path / "text.safetensors", moved(weights, 1, TEXT) | {name: weights[name] + 1})
    tuned = tuple(f"{tmp_path / file}.safetensors:{strength}" for file in ("text", "unet"))
    config = replace(base, reset="cross-attention", tuned=tuned)

    def trains(layer):
        return "attn1" in layer

    exact = build_model(config)
    words = exact.text_encoder.encode(exact.text_encoder.tokenize(["a red circle"])).context
    fingerprint = exact.denoiser.fingerprint
    exact.denoiser.store_in(torch.bfloat16, trains)
    with live_bytes() as live:
        held = build_model(config, torch.bfloat16, trains, text_trains=False)
    with live_bytes() as plain:
        build_model(base, torch.bfloat16, trains, text_trains=False)
    expected, found = (dict(model.denoiser.network.named_parameters()) for model in (exact, held))
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())
    assert {value.dtype for value in found.values()} == {torch.bfloat16, torch.float32}
    assert held.denoiser.fingerprint == fingerprint
    assert torch.equal(held.text_encoder.encode(held.text_encoder.tokenize(["a red circle"])).context, words)
    files = sum(Path(text.rpartition(":")[0]).stat().st_size for text in tuned)
    assert live.peak <= plain.peak + 1.5 * files  # which are read whole, and then kept in half of their bytes


def test_runs_are_put_in_by_their_folders_and_count_for_the_next(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("two small red circles\n", encoding="utf-8")
    sizes = "--steps 1 --batch-size 1 --gradient-steps 1 --sampling-steps 2 --width 64 --height 64 --lora-rank 2"
    shared = ["reward", "--model", "demo", "--t5", "demo", "--prompts", str(tmp_path / "p.txt"), *sizes.split()]
    shared += ["--rewards", "demo aesthetic", "--learning-rate", "0.01", "--warmup-steps", "0", "--output"]
    shared += [str(tmp_path)]

    def run(name, train, *more):
        return main([*shared, "--run-name", name, "--train", train, *more])

    assert run("words", "projection") == 0
    assert run("picture", "UNet LoRA", "--tuned", str(tmp_path / "words")) == 0
    swapped = {"model": "demo", "t5": "demo"}
    plain = build_model(ModelConfig(**swapped))
    staged = build_model(ModelConfig(**swapped, tuned=(str(tmp_path / "words"), str(tmp_path / "picture"))))
    trained, _ = read_tensors(tmp_path / "words" / "tuned.safetensors")
    found = staged.text_encoder.projection.state_dict()
    assert {f"projection.{name}" for name in found} == trained.keys()
    assert all(torch.equal(value, trained[f"projection.{name}"]) for name, value in found.items())
    assert not torch.equal(found["linear.weight"], plain.text_encoder.projection.linear.weight)
    before, after = copied(plain), copied(staged)
    parts = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert parts and all(name.startswith(UNET) and ".attn" in name for name in parts)
    half = build_model(ModelConfig(**swapped, tuned=(f"{tmp_path / 'words'}:0.5",))).text_encoder
    tokens = half.tokenize(["a red circle"])
    with torch.no_grad():
        ends = [one.text_encoder.encode(tokens).context for one in (plain, staged)]
        torch.testing.assert_close(half.encode(tokens).context, sum(ends) / 2, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert run("picture", "UNet LoRA") == 2 and "scale differs from the one" in capsys.readouterr().err


def test_a_retrained_model_brings_its_own_projection(tmp_path):
    swapped = {"model": "demo", "t5": "demo"}
    plain = build_model(ModelConfig(**swapped))
    own = plain.text_encoder.projection
    other = Projection(own.in_width, own.width, "mlp", seed=5)
    name, value = next(item for item in model_weights(plain).items() if ".attn2." in item[0])
    tensors = {f"projection.{key}": tensor for key, tensor in other.state_dict().items()}
    tensors[name.replace(UNET, ldm.UNET_PREFIX, 1)] = value + 1
    (tmp_path / "run").mkdir()
    about = {"retune.run": json.dumps({"projection": other.config()})}
    write_tensors(tmp_path / "run" / "model.safetensors", tensors, about)
    tuned = build_model(ModelConfig(**swapped, tuned=(str(tmp_path / "run"),)))
    assert tuned.text_encoder.projection.config() == other.config()
    found = tuned.text_encoder.projection.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in other.state_dict().items())
    assert torch.equal(model_weights(tuned)[name], value + 1)
    assert tuned.text_encoder.fingerprint == plain.text_encoder.fingerprint  # of what is before the projection
    with pytest.raises(ValueError, match="expected one kind to go a part of the way"):
        with_tuned(plain, [f"{tmp_path / 'run'}:0.5"])
    narrow = Projection(own.in_width, own.width // 2)
    write_tensors(tmp_path / "a.safetensors", {f"projection.{k}": v for k, v in narrow.state_dict().items()})
    with pytest.raises(ValueError, match=r"a\.safetensors: the projection's tensors do not fit"):
        with_tuned(plain, [str(tmp_path / "a.safetensors")])


def test_what_cannot_be_put_in_is_named(tiny, tmp_path):
    weights = copied(tiny())
    assert tuned_file("a/b:0.5") == TunedFile(tuned_file("a/b").path, 0.5)
    assert str(tuned_file("C:model").path) == "C:model"
    with pytest.raises(ValueError, match="strength of a is nan"):
        tuned_file("a:nan")
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        tiny(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "interrupted", "step": 3}))
    with pytest.raises(ValueError, match="run holds no result .*; its run is interrupted"):
        tiny(tmp_path / "run")
    name = next(name for name in weights if name.startswith(TEXT) and weights[name].ndim == 2)
    rows, columns = weights[f"{UNET}time_embed.0.weight"].shape
    huge = {"lora_down.weight": torch.full((1, columns), 1e30), "lora_up.weight": torch.full((rows, 1), 1e30)}
    for tensors, words in (
        ({}, "holds no tensors"),
        ({"first_stage_model.decoder.x": torch.ones(2)}, "has first_stage_model.decoder.x, which the model lacks"),
        ({name: torch.ones(2, 2)}, r"is \(2, 2\); expected"),
        ({"projection.linear.weight": torch.ones(2, 2)}, "Use --t5"),
        (
            {f"{UNET}nothing.lora_down.weight": torch.ones(2, 4), f"{UNET}nothing.lora_up.weight": torch.ones(4, 2)},
            "no",
        ),
        ({name: torch.full_like(weights[name], torch.nan)}, "bad.safetensors makes .* NaN, infinite or too large"),
        ({f"{UNET}time_embed.0.{role}": value for role, value in huge.items()}, "makes .*time_embed.0.weight NaN"),
        ({f"{UNET}time_embed.0.oft_blocks": torch.ones(2, 4, 4)}, "time_embed.0 is OFT"),
    ):
        write_tensors(tmp_path / "bad.safetensors", tensors, {"about": "it"})
        model = tiny()
        with pytest.raises(ValueError, match=words):
            with_tuned(model, [str(tmp_path / "bad.safetensors")])
        assert all(torch.equal(value, weights[name]) for name, value in model_weights(model).items())
    write_tensors(tmp_path / "a.safetensors", {name: torch.zeros(2)})
    one = tuned_identity([str(tmp_path / "a.safetensors")])
    write_tensors(tmp_path / "a.safetensors", {name: torch.ones(2)})
    assert one != tuned_identity([str(tmp_path / "a.safetensors")])
