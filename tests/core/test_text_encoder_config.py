"""A T5's configuration from shapes: every family, every prefix, and clear refusals of everything else."""

import json

import pytest
import torch
from retune.training.text_encoder.t5 import t5_model
from retune.training.text_encoder.t5_config import expected_names, t5_config
from retune.training.text_encoder.t5_file import embedded_sentencepiece, file_hash, read_t5, read_t5_config
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, UMT5Config, UMT5EncoderModel

TINY = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}
IDS = torch.tensor([[5, 9, 33, 1]])


def tiny_t5(gated=True, umt5=False, full=False, **changes):
    torch.manual_seed(0)
    feed_forward = {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    config = (UMT5Config if umt5 else T5Config)(**TINY | feed_forward | changes)
    kind = UMT5EncoderModel if umt5 else T5ForConditionalGeneration if full else T5EncoderModel
    return kind(config).eval().requires_grad_(False)


def tensors_of(model, prefix=""):
    state = {k: v.clone() for k, v in model.state_dict().items() if k not in ("lm_head.weight",)}
    return {prefix + k: v for k, v in state.items() if not k.endswith("embed_tokens.weight")}


def shapes_of(tensors):
    return {key: value.shape for key, value in tensors.items()}


# d_model, d_ff, d_kv, heads, gated, bias in every layer, vocabulary: published configurations
FAMILIES = {
    "t5-small": (512, 2048, 64, 8, False, False, 32128),
    "t5-11b": (1024, 65536, 128, 128, False, False, 32128),
    "t5-v1_1-small": (512, 1024, 64, 6, True, False, 32128),
    "t5-v1_1-base": (768, 2048, 64, 12, True, False, 32128),
    "flan-t5-large": (1024, 2816, 64, 16, True, False, 32128),
    "flan-t5-xl": (2048, 5120, 64, 32, True, False, 32128),
    "t5-v1_1-xxl": (4096, 10240, 64, 64, True, False, 32128),
    "mt5-xl": (2048, 5120, 64, 32, True, False, 250112),
    "byt5-small": (1472, 3584, 64, 6, True, False, 384),
    "umt5-base": (768, 2048, 64, 12, True, True, 256384),
    "pile-t5-xl": (2048, 5120, 64, 32, True, True, 32128),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_from_shapes(family):
    d_model, d_ff, d_kv, heads, gated, own_bias, vocabulary = FAMILIES[family]
    inner, shapes = d_kv * heads, {}
    for name in expected_names(3, gated, own_bias):
        rows = {"o": (d_model, inner), "wo": (d_model, d_ff), "shared": (vocabulary, d_model)}
        rows |= {part: (inner, d_model) for part in "qkv"} | {wi: (d_ff, d_model) for wi in ("wi", "wi_0", "wi_1")}
        rows |= {"relative_attention_bias": (32, heads), "layer_norm": (d_model,), "final_layer_norm": (d_model,)}
        shapes[name] = rows[name.split(".")[-2]]
    config = t5_config(shapes)
    kind = ("umt5" if own_bias else "t5", "gelu_pytorch_tanh" if gated else "relu")
    sizes = (config["d_model"], config["d_ff"], config["d_kv"], config["num_heads"], config["num_layers"])
    assert sizes == (d_model, d_ff, d_kv, heads, 3)
    assert (config["model_type"], config["dense_act_fn"]) == kind
    assert (config["eos_token_id"], config["pad_token_id"]) == ((2, 1) if family.startswith("pile") else (1, 0))


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "transformer."])
@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prefixes_embedding_names_and_dtypes(tmp_path, prefix, embedding, dtype):
    model = tiny_t5().to(dtype).float()  # rounded, so that the file loses nothing
    tensors = tensors_of(model, prefix)
    tensors[prefix + embedding] = tensors.pop(prefix + "shared.weight")
    save_file({k: v.to(dtype) for k, v in tensors.items()}, tmp_path / "t5.safetensors")
    weights = read_t5(tmp_path / "t5.safetensors")
    assert weights.config == t5_config(shapes_of(tensors_of(model)))
    loaded = t5_model(weights)
    assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)


@pytest.mark.parametrize("kind", [{"gated": False}, {"umt5": True}, {"num_layers": 1}, {"d_kv": 16}])
def test_kinds_compute_what_transformers_computes(tmp_path, kind):
    model = tiny_t5(**kind)
    save_file(tensors_of(model), tmp_path / "t5.safetensors")
    loaded = t5_model(read_t5(tmp_path / "t5.safetensors"))
    assert (loaded(IDS).last_hidden_state - model(IDS).last_hidden_state).abs().max() < 1e-5


def test_full_model_and_its_sharded_folder_give_the_encoder(tmp_path):
    model = tiny_t5(full=True)
    expected = model.encoder(IDS).last_hidden_state
    save_file(tensors_of(model), tmp_path / "full.safetensors")
    model.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), tmp_path / "t5.bin")
    for path in ("full.safetensors", "folder", "shards", "t5.bin"):
        weights = read_t5(tmp_path / path)
        assert not any("decoder" in name for name in weights.state_dict)
        assert (t5_model(weights)(IDS).last_hidden_state - expected).abs().max() < 1e-5, path


def test_missing_shard_is_named(tmp_path):
    tiny_t5().save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=victim.name):
        read_t5(tmp_path)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_multiplied_out(tmp_path, ending):
    model, tensors = tiny_t5(), {}
    for name, weight in tensors_of(model).items():
        if weight.dim() == 2 and ".block." in name:
            scale = weight.abs().max() / 448
            quantised = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name] = quantised
            tensors[name.removesuffix("weight") + ending] = scale
            model.get_parameter(name).data = quantised.float() * scale
        else:
            tensors[name] = weight
    tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "t5.safetensors")
    loaded = t5_model(read_t5(tmp_path / "t5.safetensors"))
    assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_other_quantisations_are_refused(tmp_path):
    tensors = tensors_of(tiny_t5())
    note = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    tensors["encoder.block.0.layer.0.SelfAttention.q.comfy_quant"] = note
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="t5.safetensors: it is quantised as .nvfp4."):
        read_t5(tmp_path / "t5.safetensors")


def test_embedded_sentencepiece_bytes(tmp_path):
    tensors = tensors_of(tiny_t5()) | {"spiece_model": torch.tensor(list(b"abc"), dtype=torch.uint8)}
    save_file(tensors, tmp_path / "t5.safetensors")
    assert embedded_sentencepiece(tmp_path / "t5.safetensors") == b"abc"
    assert read_t5_config(tmp_path / "t5.safetensors")["num_layers"] == 2


REFUSED = {
    "decoder-only language model": ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"],
    "CLIP": ["text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"],
    "image-text": ["visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"],
    "decoder half of a T5": ["decoder.block.0.layer.0.SelfAttention.q.weight", "decoder.final_layer_norm.weight"],
    "image model's checkpoint": ["model.diffusion_model.input_blocks.0.0.weight"],
    "no tensors": [],
}


@pytest.mark.parametrize("message", REFUSED)
def test_files_of_other_kinds_are_named(tmp_path, message):
    save_file({key: torch.zeros(2, 2) for key in REFUSED[message]}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=f"wrong.safetensors: .*{message}"):
        read_t5(tmp_path / "wrong.safetensors")


def test_gguf_by_magic_and_by_name(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "b.gguf").write_bytes(bytes(100))
    for name in ("a.safetensors", "b.gguf"):
        with pytest.raises(ValueError, match=f"{name} is a GGUF file"):
            read_t5(tmp_path / name)


def test_missing_blocks_and_tensors_are_named(tmp_path):
    tensors = tensors_of(tiny_t5(num_layers=3))
    without_block = {k: v for k, v in tensors.items() if ".block.1." not in k}
    with pytest.raises(ValueError, match=r"lacks encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight.* and 5 more"):
        t5_config(shapes_of(without_block))
    without_first = {k: v for k, v in tensors.items() if ".block.0." not in k}
    with pytest.raises(ValueError, match=r"lacks encoder\.block\.0"):
        t5_config(shapes_of(without_first))
    with pytest.raises(ValueError, match=r"lacks shared\.weight"):
        t5_config(shapes_of({k: v for k, v in tensors.items() if k != "shared.weight"}))


def test_sparse_relatives_are_refused():
    shapes = shapes_of(tensors_of(tiny_t5()))
    shapes["encoder.block.0.layer.1.mlp.experts.expert_0.wi.weight"] = (48, 32)
    with pytest.raises(ValueError, match="experts.*which no T5 encoder has"):
        t5_config(shapes)


def test_damaged_files(tmp_path):
    save_file(tensors_of(tiny_t5()), tmp_path / "t5.safetensors")
    content = (tmp_path / "t5.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.bin").write_bytes(b"not a pickle")
    for name in ("cut.safetensors", "cut.bin"):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_t5(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_t5(tmp_path / "absent.safetensors")


def test_hash_follows_the_content(tmp_path):
    import hashlib

    tensors = tensors_of(tiny_t5())
    save_file(tensors, tmp_path / "a.safetensors")
    first = file_hash(tmp_path / "a.safetensors")
    assert first == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    tensors["shared.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "b.safetensors")
    assert file_hash(tmp_path / "b.safetensors") != first
