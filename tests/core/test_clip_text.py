"""The CLIP text encoder against transformers' own tokenisation and forward pass, and windows beyond 75 tokens."""

import pytest
import torch
from retune.training.models.clip import ClipTextEncoder, clip_config

PROMPTS = ["a red circle on the left", "", "Two SMALL blue squares, white background"]


@pytest.fixture
def encoder(tiny_model):
    return tiny_model.text_encoder


def words(encoder, count):
    """A text of exactly `count` tokens."""
    text = " ".join(["a"] * count)
    assert len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) == count
    return text


@torch.no_grad()
def test_short_prompts_equal_transformers(encoder):
    theirs = encoder.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    tokens = encoder.tokenize(PROMPTS)
    assert [windows[0] for windows in tokens] == theirs["input_ids"].tolist()
    states = encoder.encode(tokens)
    assert states.mask is None and states.pooled is None and states.context.shape == (3, 77, 32)
    torch.testing.assert_close(states.context, encoder.network(input_ids=theirs["input_ids"]).last_hidden_state)


@torch.no_grad()
def test_75_tokens_fit_one_window_and_more_make_another(encoder):
    tokens = encoder.tokenize([words(encoder, 75), words(encoder, 76), words(encoder, 160)])
    assert [len(windows) for windows in tokens] == [1, 2, 3]
    assert all(len(window) == 77 for windows in tokens for window in windows)
    begin, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    word = encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokens[1][1] == [begin, *word, end] + [encoder.tokenizer.pad_token_id] * 74
    states = encoder.encode(tokens)
    assert states.context.shape == (3, 3 * 77, 32)
    assert states.mask.sum(1).tolist() == [77, 154, 231]
    for row, windows in enumerate(tokens):
        for i, window in enumerate(windows):
            alone = encoder.network(input_ids=torch.tensor([window])).last_hidden_state[0]
            torch.testing.assert_close(states.context[row, 77 * i : 77 * (i + 1)], alone)


def test_real_tokens_are_words_and_the_first_end(encoder):
    real = encoder.real_tokens(encoder.tokenize([words(encoder, 3), words(encoder, 76), ""]))
    assert real.shape == (3, 154) and real.dtype == torch.bool
    assert real[0].nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert real[1].sum() == 76 + 1 + 1 and not real[1, 0] and not real[1, 77] and real[1, 78:80].all()
    assert real[2].nonzero().flatten().tolist() == [1]


def test_from_state_takes_both_name_layouts_and_gives_the_same_states(encoder, tmp_path):
    config = encoder.network.config.to_dict()
    state = {name.removeprefix("text_model."): t for name, t in encoder.network.state_dict().items()}
    tokens = encoder.tokenize(PROMPTS)
    for prefix in ("", "text_model."):
        named = {prefix + name: tensor.half() for name, tensor in state.items()}
        named[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
        again = ClipTextEncoder.from_state(named, config, tmp_path / "clip_tokenizer")
        assert next(again.network.parameters()).dtype == torch.float32
        torch.testing.assert_close(again.encode(tokens).context, encoder.encode(tokens).context, rtol=0, atol=0.02)


def test_config_is_read_from_the_shapes_of_sd1():
    from transformers import CLIPTextConfig, CLIPTextModel

    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        state = CLIPTextModel(CLIPTextConfig(**large)).state_dict()
    names = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    assert len(names) == 196
    found = clip_config(names)
    assert {key: found[key] for key in large} == large
    assert (found["vocab_size"], found["max_position_embeddings"], found["hidden_act"]) == (49408, 77, "quick_gelu")


def test_missing_parts_are_named(encoder, tmp_path):
    state = {name.removeprefix("text_model."): t for name, t in encoder.network.state_dict().items()}
    config, folder = encoder.network.config.to_dict(), tmp_path / "clip_tokenizer"
    with pytest.raises(ValueError, match="no CLIP text encoder"):
        ClipTextEncoder.from_state({}, config, folder)
    with pytest.raises(ValueError, match="no CLIP tokenizer is given"):
        ClipTextEncoder.from_state(state, config, None)
    with pytest.raises(ValueError, match="without vocab.json"):
        ClipTextEncoder.from_state(state, config, tmp_path)
    gone = {name: tensor for name, tensor in state.items() if "final_layer_norm" not in name}
    with pytest.raises(ValueError, match="lacks 2 tensors such as 'final_layer_norm.bias'"):
        ClipTextEncoder.from_state(gone, config, folder)


def test_fingerprint_follows_weights_and_words(encoder, tmp_path):
    folder = tmp_path / "clip_tokenizer"
    assert ClipTextEncoder(encoder.network, folder).fingerprint == encoder.fingerprint
    merges = folder / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines(keepends=True)
    merges.write_text("".join(lines[:-1]), encoding="utf-8")
    other = ClipTextEncoder(encoder.network, folder).fingerprint
    assert other != encoder.fingerprint
    with torch.no_grad():
        encoder.network.get_input_embeddings().weight.mul_(1.001)
    assert ClipTextEncoder(encoder.network, folder).fingerprint not in (other, encoder.fingerprint)
