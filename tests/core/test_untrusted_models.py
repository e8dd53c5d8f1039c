"""What files of text encoders, projections, tokenizers and rewards say is checked against what they hold."""

import json
import os
from dataclasses import replace

import pytest
import torch
from retune.training.__main__ import VERBS, main
from retune.training.common.files import write_tensors
from retune.training.formats.lora import read_lora
from retune.training.rewards.combined import Term
from retune.training.rewards.load import RewardConfig, load_reward, read_state
from retune.training.text_encoder.file import SavedTextEncoder, read_text_encoder, save_text_encoder
from retune.training.text_encoder.projection import Projection, read_projection, save_projection
from retune.training.text_encoder.t5 import Padding
from retune.training.text_encoder.t5_config import expected_names, t5_config
from retune.training.text_encoder.t5_file import read_t5, weight_files
from retune.training.text_encoder.tokenizers import load_tokenizer
from safetensors.torch import load_file, save_file


def t5_tensors(layers=2):
    """A tiny T5 v1.1 by hand: width 8, 2 heads of 3, hidden 10, 12 words."""
    sizes = {"o": (8, 6), "wo": (8, 10), "shared": (12, 8), "relative_attention_bias": (32, 2)}
    sizes |= {part: (6, 8) for part in "qkv"} | {part: (10, 8) for part in ("wi_0", "wi_1")}
    shapes = {name: sizes.get(name.split(".")[-2], (8,)) for name in expected_names(layers, True, False)}
    return {name: torch.full(shape, 0.1) for name, shape in shapes.items()}


def refused(reader, path, words):
    """Whether a reader names the file and says these words."""
    with pytest.raises(ValueError) as error:
        reader(path)
    assert path.name in str(error.value) and words in str(error.value), str(error.value)


def test_a_whole_t5_is_read(tmp_path):
    save_file(t5_tensors(), tmp_path / "t5.safetensors")
    read = read_t5(tmp_path / "t5.safetensors")
    assert read.config["num_layers"] == 2 and read.config["d_kv"] == 3 and len(read.state_dict) == 21


@pytest.mark.parametrize("number", ["999999999", "1" * 5000, "600"])
def test_blocks_of_a_t5_are_counted_by_what_exists(tmp_path, number):
    tensors = t5_tensors() | {f"encoder.block.{number}.layer.0.SelfAttention.q.weight": torch.zeros(6, 8)}
    save_file(tensors, tmp_path / "t5.safetensors")
    refused(read_t5, tmp_path / "t5.safetensors", f"the largest number after encoder.block. is {number[:20]}")


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("shared.weight", (96,), "shared.weight has shape (96,); expected two sizes"),
        ("shared.weight", (0, 8), "expected two sizes of at least 1"),
        ("encoder.block.1.layer.0.SelfAttention.k.weight", (8, 6), "has shape (8, 6); expected (6, 8)"),
        ("encoder.block.1.layer.1.DenseReluDense.wo.weight", (10, 8), "has shape (10, 8); expected (8, 10)"),
        ("encoder.final_layer_norm.weight", (9,), "has shape (9,); expected (8,)"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (2, 2), "at least 4 buckets"),
    ],
)
def test_shapes_of_a_t5_are_compared_before_it_is_built(tmp_path, name, shape, words):
    save_file(t5_tensors() | {name: torch.zeros(shape)}, tmp_path / "t5.safetensors")
    refused(read_t5, tmp_path / "t5.safetensors", words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_t5_that_is_not_finite_is_refused(tmp_path, value):
    tensors = t5_tensors()
    tensors["encoder.block.1.layer.0.SelfAttention.v.weight"][2, 3] = value
    save_file(tensors, tmp_path / "t5.safetensors")
    refused(read_t5, tmp_path / "t5.safetensors", "block.1.layer.0.SelfAttention.v.weight holds NaN or infinity")


@pytest.mark.parametrize(
    "more, kind",
    [
        ({"encoder.block.0.layer.0.SelfAttention.q.weight.absmax": torch.zeros(3)}, "bitsandbytes"),
        ({"encoder.block.0.layer.0.SelfAttention.q.SCB": torch.zeros(6)}, "bitsandbytes"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight._data": torch.zeros(6)}, "optimum-quanto"),
        ({"encoder.block.0.layer.0.SelfAttention.q.qweight": torch.zeros(6)}, "GPTQ or AWQ"),
    ],
)
def test_quantised_t5s_say_by_what(tmp_path, more, kind):
    tensors = t5_tensors()
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors | more, tmp_path / "t5.safetensors")
    refused(
        read_t5, tmp_path / "t5.safetensors", f"it is quantised by {kind}; expected fp32, fp16, bf16 or fp8 weights"
    )


def test_a_t5_of_whole_numbers_is_refused(tmp_path):
    tensors = t5_tensors() | {"shared.weight": torch.ones(12, 8, dtype=torch.int8)}
    save_file(tensors, tmp_path / "t5.safetensors")
    refused(read_t5, tmp_path / "t5.safetensors", "shared.weight is stored as int8; expected fp32")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors", "", 5, None])
def test_an_index_names_only_files_beside_it(tmp_path, shard):
    save_file(t5_tensors(), tmp_path / "outside.safetensors")
    (tmp_path / "t5").mkdir()
    index = tmp_path / "t5" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": shard}}), encoding="utf-8")
    with pytest.raises(
        ValueError, match="t5/model.safetensors.index.json.* a shard is .*; expected the name of a file"
    ):
        weight_files(tmp_path / "t5")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', "[", '{"weight_map": {}}', "[" * 10**5])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=tmp_path.name):
        read_t5(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in the file system")
def test_pipes_are_no_models(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(read_t5, tmp_path / "model.safetensors", "is a pipe or a device")
    os.mkfifo(tmp_path / "tokenizer.json")
    refused(load_tokenizer, tmp_path / "tokenizer.json", "is a pipe or a device")
    os.mkfifo(tmp_path / "head.pth")
    with pytest.raises(ValueError, match="head.pth is a pipe or a device.*improved-aesthetic-predictor"):
        load_reward(RewardConfig(kind="aesthetic", file=tmp_path / "head.pth"))


def described(path, tensors=None, **changes):
    """A saved projection whose description or tensors are changed."""
    save_projection(path, Projection(8, 6, "resampler", tokens=3, layers=2))
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        about = json.loads(file.metadata()["retune.projection"])
    write_tensors(path, load_file(path) | (tensors or {}), {"retune.projection": json.dumps(about | changes)})
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 10**9}, "width is 1000000000; expected a whole number from 1"),
        ({"width": 2**19}, "expected (524288"),
        ({"layers": 10**9}, "layers is 1000000000"),
        ({"layers": 3}, "layers is 3; expected 2"),
        ({"tokens": 10**6}, "queries has shape (3, "),
        ({"in_width": "8"}, "in_width is '8'; expected a whole number"),
        ({"bands": 5, "kind": "timestep resampler"}, "is missing; expected equal names"),
        ({"kind": "nonsense"}, "projection is 'nonsense'"),
    ],
)
def test_a_projections_described_sizes_are_compared_before_it_is_built(tmp_path, changes, words):
    refused(read_projection, described(tmp_path / "p.safetensors", **changes), words)


def test_a_projection_that_is_not_finite_is_refused_and_a_sound_one_is_read(tmp_path):
    sound = described(tmp_path / "sound.safetensors")
    assert torch.equal(read_projection(sound).linear.weight, load_file(sound)["linear.weight"])
    weight = load_file(sound)["linear.weight"]
    weight[0, 0] = float("nan")
    path = described(tmp_path / "nan.safetensors", {"linear.weight": weight})
    refused(read_projection, path, "linear.weight holds NaN")


def saved(folder, **changes):
    fields = {"projection": Projection(8, 6), "padding": Padding(), "t5_file": "t5", "t5_sha256": "0", "t5_config": {}}
    save_text_encoder(folder / "te.safetensors", SavedTextEncoder(**fields | changes))
    return folder / "te.safetensors"


def test_a_saved_text_encoder_may_not_ask_for_a_million_tokens(tmp_path):
    refused(read_text_encoder, saved(tmp_path, padding=Padding(max_tokens=10**6)), "max_tokens is 1000000; expected")
    refused(read_text_encoder, saved(tmp_path, target_std=float("nan")), "target_std is nan; expected a finite number")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_that_lead_in_circles_are_searched_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for other in ("a", "b"):
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other, target_is_directory=True)
    (tmp_path / "b" / "here").write_bytes(b"")
    encoder = read_text_encoder(saved(tmp_path, t5_file="here"))
    with pytest.raises(ValueError, match="here is not the T5 that text encoder te.safetensors was made with"):
        encoder.find_t5([tmp_path])


UNIGRAM = {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}


def test_a_tokenizer_that_gives_no_ids_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(UNIGRAM), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a") != []
    with pytest.raises(ValueError, match="tokenizer.json is damaged or of another model"):
        tokenizer.encode("c")
    with pytest.raises(ValueError, match="a prompt .*half a character"):
        tokenizer.encode("a \ud83d")


@pytest.mark.parametrize("change", [{"model": None}, {"model": {"type": "BPE"}}, {"added_tokens": 5}, {"version": "9"}])
def test_a_damaged_tokenizer_is_named(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(UNIGRAM | change), encoding="utf-8")
    refused(load_tokenizer, path, "is damaged or no tokenizer.json")
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff" * 40)
    refused(load_tokenizer, tmp_path / "spiece.model", "is damaged or no sentencepiece model")


@pytest.mark.parametrize("field", ["weight", "target"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rewards_weight_and_target_are_numbers(field, value):
    reward = load_reward(RewardConfig(kind="demo aesthetic"))
    with pytest.raises(ValueError, match=f"{field} of a reward is {value}; expected a finite number"):
        Term(reward=reward, **{field: value})


HEAD = {"weight": torch.ones(1, 24), "bias": torch.ones(1)}


@pytest.mark.parametrize(
    "head, words",
    [
        ({"weight": torch.full((1, 24), float("nan"))}, "its head holds NaN"),
        ({"weight": torch.ones(1, 24, dtype=torch.int64)}, "its head holds NaN, infinity or whole numbers"),
        ({"weight": torch.ones(24)}, "expected a matrix and a value for each"),
        ({"bias": torch.ones(2)}, "shapes (1, 24) and (2,)"),
        ({"weight": torch.ones(3, 24), "bias": torch.ones(3)}, "its head gives 3 values an image"),
    ],
)
def test_an_aesthetic_head_of_other_values_is_named_with_its_source(tmp_path, head, words):
    path = tmp_path / "head.safetensors"
    save_file(HEAD | head, path)
    with pytest.raises(ValueError) as error:
        load_reward(RewardConfig(kind="aesthetic", file=path))
    assert all(word in str(error.value) for word in (path.name, words, "improved-aesthetic-predictor"))


def test_a_logit_scale_is_one_number(tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file({"logit_scale": torch.ones(2), "text_model.x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="clip.safetensors: its logit_scale has 2 values; expected one.*yuvalkirstain"):
        load_reward(RewardConfig(kind="PickScore", file=path))


def test_a_rewards_pickle_may_contain_itself_and_other_keys(tmp_path):
    content = {"weight": torch.ones(1), 5: torch.ones(1), "epoch": 3}
    torch.save({"state_dict": content}, tmp_path / "good.pt")
    assert list(read_state(tmp_path / "good.pt")) == ["weight"]
    content["state_dict"] = content
    torch.save(content, tmp_path / "endless.pt")
    refused(read_state, tmp_path / "endless.pt", "its content contains itself")


def test_an_unforeseen_error_names_the_run_and_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "r").mkdir()
    monkeypatch.setitem(VERBS, "train", replace(VERBS["train"], run=lambda arguments: {}["missing"]))
    flags = ["--model", "demo", "--folder", str(tmp_path), "--run-name", "r", "--output", str(tmp_path)]
    assert main(["train", *flags]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: run r failed: it has no entry 'missing' (KeyError), which no check foresaw.")
    assert printed.count("\n") == 1 and "Traceback" not in printed
    assert "KeyError: 'missing'" in (tmp_path / "r" / "error.log").read_text(encoding="utf-8")


def test_t5_config_alone_counts_too():
    shapes = {name: tensor.shape for name, tensor in t5_tensors(3).items()}
    assert t5_config(shapes)["num_layers"] == 3


@pytest.mark.parametrize("text", ["[1]", "{", '{"peft_type": "LORA", "r": "x"}'])
def test_damaged_settings_of_peft_are_named_by_their_own_file(tmp_path, text):
    layer = "base_model.model.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="adapter_config.json"):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_a_reward_that_gives_nan_names_its_files():
    reward = load_reward(RewardConfig(kind="demo aesthetic"))
    reward.files = ("head.pth",)
    next(reward.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="demo aesthetic of head.pth gives NaN or infinity for 1 of 1 images"):
        reward.scores(torch.rand(1, 3, 32, 32), [""])
