"""T5 with projection as the core's TextEncoder: tokens, masks, padding, scale, gradients, and the one file."""

import json
import logging
import os
import shutil

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.models.protocols import Conditioning
from retune.training.text_encoder.file import SavedTextEncoder, read_text_encoder, save_text_encoder
from retune.training.text_encoder.projection import Projection, detached_copy, read_projection, save_projection
from retune.training.text_encoder.scale import (
    PROMPTS,
    clip_real_tokens,
    scale_to,
    scale_to_reference,
    token_statistics,
    token_std,
)
from retune.training.text_encoder.t5 import Padding, load_t5
from retune.training.text_encoder.tokenizers import byte_tokenizer, find_tokenizer, load_tokenizer
from safetensors.torch import save_file
from torch import nn

TEXTS = ["a red circle", "two small blue squares on a green ground, and a star", ""]
CONFIG = {"vocab_size": 128, "eos_token_id": 1, "pad_token_id": 0, "model_type": "t5"}


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory, write_t5_folder):
    return write_t5_folder(tmp_path_factory.mktemp("t5"), d_model=48, d_kv=8, d_ff=64)


def encoder(folder, width=32, **padding):
    return load_t5(folder, Projection(48, width), padding=Padding(**padding))


def test_tokens_end_once_and_rows_equal_rows_alone(t5_folder):
    t5 = encoder(t5_folder)
    tokens = t5.tokenize([*TEXTS, "a </s> b <pad> c"])
    assert all(ids[-1] == 1 and ids.count(1) == 1 and 0 not in ids for ids in tokens)
    assert tokens[2] == [1]
    batch = t5.encode(tokens)
    assert batch.context.shape == (4, max(map(len, tokens)), 32) and batch.pooled is None
    assert batch.mask.sum(dim=1).tolist() == [len(ids) for ids in tokens]
    for row, ids in enumerate(tokens):
        alone = t5.encode([ids])
        assert alone.mask.all()
        assert torch.allclose(batch.context[row, : len(ids)], alone.context[0], atol=1e-5)


def test_padding_to_length_attends_pads_but_t5_does_not(t5_folder):
    tight, padded = encoder(t5_folder), encoder(t5_folder, max_tokens=60, pad="max_tokens")
    tokens = padded.tokenize(TEXTS)
    result = padded.encode(tokens)
    assert result.context.shape == (3, 60, 32) and result.mask is None
    for row, ids in enumerate(tokens):
        assert torch.allclose(result.context[row, : len(ids)], tight.encode([ids]).context[0], atol=1e-5)
    assert padded.real_tokens(tokens).sum(dim=1).tolist() == [len(ids) for ids in tokens]
    assert tight.fingerprint != padded.fingerprint


def test_fingerprint_leaves_out_the_projection(t5_folder):
    assert encoder(t5_folder).fingerprint == encoder(t5_folder, width=16).fingerprint
    assert encoder(t5_folder).fingerprint == encoder(t5_folder).scaled(3.0).fingerprint


def test_long_prompts_are_cut_with_a_warning(t5_folder, caplog):
    t5 = encoder(t5_folder, max_tokens=5)
    with caplog.at_level(logging.WARNING):
        (ids,) = t5.tokenize([TEXTS[1]])
    full = encoder(t5_folder).tokenize([TEXTS[1]])[0]
    assert ids == full[:4] + [1]
    assert f"{len(full)} tokens is cut to max_tokens = 5" in caplog.text


def test_encode_is_project_of_backbone_and_differentiable(t5_folder):
    t5 = encoder(t5_folder)
    tokens = t5.tokenize(TEXTS)
    t5.token_embedding.weight.requires_grad_(True)
    t5.projection.scale.fill_(2.0)
    states = t5.backbone(tokens)
    result = t5.encode(tokens)
    assert torch.equal(result.context, t5.project(states).context)
    assert torch.allclose(result.context, 2 * states.context @ t5.projection.linear.weight.T, atol=1e-6)
    result.context[result.mask].square().sum().backward()
    used = torch.unique(torch.tensor([token for ids in tokens for token in ids]))
    gradient = t5.token_embedding.weight.grad.abs().sum(dim=1)
    assert gradient[used].min() > 0 and gradient.count_nonzero() == len(used)
    assert t5.projection.linear.weight.grad.abs().sum() > 0


def test_projection_of_another_width_is_refused(t5_folder):
    with pytest.raises(ValueError, match="reads a width of 64; expected the T5's 48"):
        load_t5(t5_folder, Projection(64, 32))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_orthogonal_projection(shape):
    weight = Projection(*shape, seed=3).linear.weight.detach()
    square = weight @ weight.T if shape[0] >= shape[1] else weight.T @ weight
    assert torch.allclose(square, torch.eye(len(square)), atol=1e-5)
    assert torch.equal(weight, Projection(*shape, seed=3).linear.weight)
    assert not torch.equal(weight, Projection(*shape, seed=4).linear.weight)


def test_truncate_and_mlp_projections():
    states = torch.randn(2, 5, 8, generator=generator(0, "test"))
    narrow, wide = Projection(8, 6, "truncate")(states), Projection(8, 10, "truncate", bias=True)(states)
    assert torch.equal(narrow, states[..., :6])
    assert torch.equal(wide, nn.functional.pad(states, (0, 2)))
    mlp = Projection(8, 6, "mlp", seed=1)
    assert torch.allclose(mlp(states), Projection(8, 6, "orthogonal", seed=1)(states))
    mlp(states).square().sum().backward()
    assert mlp.output.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="projection is 'nonsense'"):
        Projection(8, 6, "nonsense")


@pytest.mark.parametrize("kind", ["orthogonal", "truncate", "mlp"])
def test_projection_file_round_trip(tmp_path, kind):
    projection = Projection(8, 6, kind, bias=True, seed=2).scaled(0.37)
    save_projection(tmp_path / "p.safetensors", projection)
    loaded = read_projection(tmp_path / "p.safetensors")
    assert loaded.config() == projection.config()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in projection.state_dict().items())
    assert not list(tmp_path.glob("*.tmp"))


def test_copies_of_inference_tensors_are_ordinary():
    with torch.inference_mode():
        made = Projection(8, 6)
        copied, scaled = detached_copy(made), made.scaled(2.0)
    for tensor in (*copied.parameters(), *copied.buffers(), *scaled.parameters(), *scaled.buffers()):
        assert not tensor.is_inference()
    copied(torch.ones(1, 8)).sum().backward()
    assert copied.linear.weight.grad is not None and scaled.scale == 2.0 and made.scale == 1.0


class FixedStates:
    """A text encoder whose states are known: token k of a prompt is k times ones and minus ones."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def tokenize(self, texts):
        return [[len(word) for word in text.split()] for text in texts]

    def encode(self, tokens):
        values = torch.tensor(tokens, dtype=torch.float32)[..., None] * torch.tensor([1.0, -1.0])
        return Conditioning(values * self.factor)

    def scaled(self, factor):
        return FixedStates(self.factor * factor)


def test_std_against_the_closed_form():
    prompts = ["a bb ccc", "dddd"]  # states +-1, +-2, +-3, +-4: mean 0, std sqrt((1 + 4 + 9 + 16) / 4)
    statistics = token_statistics(FixedStates(), prompts)
    assert statistics.std == pytest.approx(7.5**0.5)
    assert statistics.token_rms == pytest.approx((1, 2, 3, 4))
    assert statistics.prompt_std == pytest.approx(((14 / 3) ** 0.5, 4.0))
    scaled, report = scale_to(FixedStates(), 0.2, prompts)
    assert token_std(scaled, prompts) == pytest.approx(0.2)
    assert report.factor == pytest.approx(0.2 / 7.5**0.5) and report.after.std == pytest.approx(0.2)
    assert "0.2000" in report.text()
    without_first = token_statistics(FixedStates(), ["a bb ccc"], lambda tokens: torch.tensor([[False, True, True]]))
    assert without_first.std == pytest.approx(6.5**0.5)


@pytest.mark.parametrize("padding", [{}, {"pad": "max_tokens", "max_tokens": 80}])
def test_t5_is_scaled_over_real_tokens_only(t5_folder, padding):
    t5 = encoder(t5_folder, **padding)
    before = t5.projection.linear.weight.detach().clone()
    scaled, report = scale_to(t5, 0.9)
    assert report.after.std == pytest.approx(0.9, rel=1e-5)
    measured = token_statistics(scaled)
    for name, value in vars(report.after).items():
        assert getattr(measured, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    states = torch.cat([scaled.encode([ids]).context[0, : len(ids)] for ids in scaled.tokenize(list(PROMPTS))])
    assert states.std(unbiased=False).item() == pytest.approx(0.9, rel=1e-4)
    assert t5.projection.scale == 1.0 and torch.equal(t5.projection.linear.weight, before)
    assert scaled.model is t5.model


def test_matching_a_reference(t5_folder):
    t5, prompts = encoder(t5_folder), ["a bb ccc", "dddd"]
    matched, report = scale_to_reference(t5, FixedStates(), prompts)
    assert token_std(matched, prompts) == pytest.approx(7.5**0.5, rel=1e-5) == report.target


def test_measuring_refuses_what_cannot_be_scaled():
    with pytest.raises(ValueError, match="prompts is empty"):
        token_statistics(FixedStates(), [])
    with pytest.raises(ValueError, match="infinite or NaN"):
        token_statistics(FixedStates(float("inf")), ["a"])
    for target in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="target_std is"):
            scale_to(FixedStates(), target, ["a"])


def test_clip_tokens_that_count():
    ids = [[7, 3, 4, 9, 9], [7, 9, 9, 9, 9], [7, 3, 4, 5, 9]]
    assert clip_real_tokens(ids, 9).int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 1]]


def test_default_prompts_are_many_and_distinct():
    assert len(set(PROMPTS)) == len(PROMPTS) >= 40 and all(prompt == prompt.strip() for prompt in PROMPTS)


def test_tokenizers_are_found_in_order(tmp_path, t5_folder):
    source = (t5_folder / "tokenizer.json").read_text(encoding="utf-8")
    weights = {"spam": torch.zeros(1)}
    for place in ("beside", "beside/tokenizer", "named/t5_tokenizer", "pipe/tokenizer_3", "explicit"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "tokenizer.json").write_text(source, encoding="utf-8")
    (tmp_path / "beside" / "tokenizer.json").unlink()
    (tmp_path / "pipe" / "text_encoder_3").mkdir()
    (tmp_path / "lonely").mkdir()
    for place in ("beside", "named", "pipe/text_encoder_3", "lonely"):
        save_file(weights, tmp_path / place / "t5.safetensors")
    for place in ("beside/t5.safetensors", "beside", "named/t5.safetensors", "pipe/text_encoder_3"):
        assert find_tokenizer(tmp_path / place, CONFIG).encode("a") == load_tokenizer(t5_folder).encode("a")
    given = find_tokenizer(tmp_path / "lonely" / "t5.safetensors", CONFIG, path=tmp_path / "explicit")
    assert given.fingerprint == load_tokenizer(t5_folder).fingerprint
    with pytest.raises(FileNotFoundError, match="no tokenizer for t5.safetensors") as error:
        find_tokenizer(tmp_path / "lonely" / "t5.safetensors", CONFIG)
    assert str(tmp_path / "lonely" / "tokenizer") in str(error.value)


def test_tokenizer_of_another_model_is_refused(t5_folder):
    with pytest.raises(ValueError, match="expected at most the T5's 50"):
        find_tokenizer(t5_folder, CONFIG | {"vocab_size": 50})


def test_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json is damaged or no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_sentencepiece_models_give_ids_that_end(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    prefix = str(tmp_path / "spiece")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(PROMPTS), model_prefix=prefix, **options)
    tokenizer = load_tokenizer(tmp_path / "spiece.model")
    ids = tokenizer.encode("a red apple")
    assert ids[-1] == 1 and 1 not in ids[:-1] and tokenizer.decode(ids) == "a red apple" and tokenizer.size == 60
    embedded = {"spiece_model": torch.tensor(list((tmp_path / "spiece.model").read_bytes()), dtype=torch.uint8)}
    save_file(embedded, tmp_path / "umt5.safetensors")
    (tmp_path / "spiece.model").unlink()
    assert find_tokenizer(tmp_path / "umt5.safetensors", CONFIG).encode("a red apple") == ids


def test_byte_tokens():
    assert byte_tokenizer().encode("é") == [0xC3 + 3, 0xA9 + 3, 1]
    assert byte_tokenizer().decode(byte_tokenizer().encode("naïve")) == "naïve"


def saved_of(t5, folder, **changes):
    fields = {"t5_file": folder.name, "t5_sha256": t5.file_hash, "t5_config": {"d_model": 48}, "target_std": 0.9}
    fields |= {"projection": t5.projection, "padding": t5.padding, "tokenizer": t5.tokenizer.fingerprint}
    return SavedTextEncoder(**fields | changes)


def test_text_encoder_file_round_trip(tmp_path, t5_folder):
    t5 = encoder(t5_folder, max_tokens=33).scaled(1.7)
    save_text_encoder(tmp_path / "te.safetensors", saved_of(t5, t5_folder))
    saved = read_text_encoder(tmp_path / "te.safetensors")
    assert saved.padding == Padding(max_tokens=33) and saved.target_std == 0.9 and saved.width == 32
    path = tmp_path / "models" / "sub folder" / t5_folder.name
    shutil.copytree(t5_folder, path)
    (tmp_path / "models" / "another" / t5_folder.name).mkdir(parents=True)  # comes first and has no weights
    assert saved.find_t5([tmp_path / "absent", tmp_path / "models"]) == path
    if os.name == "posix":
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "shared").symlink_to(path.parent, target_is_directory=True)
        assert saved.find_t5([tmp_path / "linked"]).parent.name == "shared"
    again = load_t5(path, saved.projection, padding=saved.padding)
    saved.check_tokenizer(again.tokenizer.fingerprint)
    assert torch.equal(again.encode(again.tokenize(TEXTS)).context, t5.encode(t5.tokenize(TEXTS)).context)
    assert again.fingerprint == t5.fingerprint


def test_text_encoder_file_errors(tmp_path, t5_folder):
    t5, path = encoder(t5_folder), tmp_path / "te.safetensors"
    save_text_encoder(path, saved_of(t5, t5_folder))
    saved = read_text_encoder(path)
    with pytest.raises(ValueError, match="te.safetensors gives a width of 32; expected the model's 768"):
        saved.check_width(768)
    with pytest.raises(FileNotFoundError, match=f"needs the T5 {t5_folder.name}"):
        saved.find_t5([tmp_path])
    other = tmp_path / t5_folder.name
    other.mkdir()
    save_file({"shared.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"{other.name} is not the T5 that .*te.safetensors.* expected {t5.file_hash[:16]}"
    ):
        saved.find_t5([tmp_path])
    with pytest.raises(ValueError, match="tokenizer found for"):
        saved.check_tokenizer("0" * 64)
    with pytest.raises(ValueError, match="model.safetensors is no saved text encoder"):
        read_text_encoder(other / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        read_text_encoder(tmp_path / "cut.safetensors")


def test_text_encoder_file_with_wrong_contents(tmp_path, t5_folder):
    path = tmp_path / "te.safetensors"
    save_text_encoder(path, saved_of(encoder(t5_folder), t5_folder))
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        description = json.loads(file.metadata()["retune.text_encoder"])
    odd = {"projection.linear.weight": torch.zeros(3, 3), "projection.scale": torch.tensor(1.0)}
    save_file(odd, path, metadata={"retune.text_encoder": json.dumps(description)})
    with pytest.raises(ValueError, match="te.safetensors is damaged: the projection's tensors do not fit"):
        read_text_encoder(path)
    newer = description | {"format_version": 99}
    save_file(odd, path, metadata={"retune.text_encoder": json.dumps(newer)})
    with pytest.raises(ValueError, match="format version 99"):
        read_text_encoder(path)
    del description["pad"]
    save_file(odd, path, metadata={"retune.text_encoder": json.dumps(description)})
    with pytest.raises(ValueError, match="te.safetensors is damaged"):
        read_text_encoder(path)
