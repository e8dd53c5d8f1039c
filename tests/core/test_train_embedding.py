"""Training tokens on a tiny model: only the new vectors learn, resume is exact, captions teach what they should."""

import hashlib
import json
import logging
from dataclasses import replace

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.templates import OBJECT, STYLE, CaptionTemplates
from retune.training.formats.embedding import read_embedding
from retune.training.formats.embedding_report import median_norm
from retune.training.models.concepts import Concept
from retune.training.recipes.textual_inversion import choose_captions, read_concepts, train_embedding
from retune.training.trainables.token_embeddings import TokenEmbeddings, first_vectors, start_concept


def config(**changes):
    values = {
        "run_name": "r",
        "token": "<it>",
        "vectors": 2,
        "initial_text": "red circle",
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "settings": TrainingSettings(save_every=2, warmup_steps=1, validation_fraction=0.3, validate_every=3),
    }
    return EmbeddingConfig(**(values | changes))


def pictures_of(captions, seed=1):
    random = torch.Generator().manual_seed(seed)
    return from_images([torch.rand(3, 32, 32, generator=random) for _ in captions], list(captions), resolution=None)


@pytest.fixture
def shown():
    """Six pictures whose captions hold the token."""
    return pictures_of(["a <it>", "a small <it>, white background", "the <IT> on the left"] * 2)


def weights_of(model):
    parts = (model.denoiser.network, model.autoencoder.network, model.text_encoder.network)
    return [p.detach().clone() for part in parts for p in part.parameters()]


def encoded(encoder, text):
    return encoder.encode(encoder.tokenize([text])).context


def rows(root):
    return [json.loads(line) for line in (root / "r" / "metrics.jsonl").read_text().splitlines()]


def test_only_the_new_vectors_learn(tiny_model, shown, tmp_path):
    before, encoder = weights_of(tiny_model), tiny_model.text_encoder
    trained = train_embedding(tiny_model, shown, config(), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(before, weights_of(tiny_model), strict=True))
    assert encoder.concepts == ()
    (concept,) = trained.embedding.concepts
    start = start_concept("<it>", "red circle", 2, encoder.vocabularies, (), 0)
    assert concept.vectors["clip_l"].shape == start.vectors["clip_l"].shape == (2, 32)
    assert ((concept.vectors["clip_l"] - start.vectors["clip_l"]).norm(dim=1) > 1e-2).all()
    knowing = encoder.with_concepts(trained.embedding.concepts)
    assert torch.equal(encoded(knowing, "two small blue squares"), encoded(encoder, "two small blue squares"))
    assert trained.lora == {} and trained.embedding.metadata["steps"] == 6
    saved = read_embedding(tmp_path / "r" / "embeddings" / "it.safetensors")
    assert torch.equal(saved.parts[0][1], concept.vectors["clip_l"]) and saved.token == "<it>"


def test_the_loss_falls_and_every_vector_gets_a_gradient(tiny_model, tmp_path):
    """One picture over and over, its noise levels few and low: the token learns what lowers the loss."""
    settings = TrainingSettings(warmup_steps=1, lr_schedule="constant", min_timestep=500, max_timestep=501)
    chosen = config(settings=settings, steps=40, learning_rate=3e-2, norm="free", initial_text="")
    train_embedding(tiny_model, pictures_of(["<it>"]), chosen, tmp_path)
    losses = [row["loss"] for row in rows(tmp_path) if "event" not in row]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path) if "event" not in row)


def test_a_stopped_run_goes_on_bit_for_bit(tiny_model, shown, tmp_path):
    class Dies(Callbacks):
        def on_step(self, info):
            if info.step == 3:
                raise KeyboardInterrupt

    samples = SamplePrompts(prompts=("a red <it>",), every=3, steps=2, cfg=2.0, width=32, height=32)
    whole = replace(config(), samples=samples, lora_rank=2)

    def digest(root):
        files = ["metrics.jsonl", "tokens.safetensors", "lora.safetensors", "samples/000006_00.png"]
        return [hashlib.sha256((root / "r" / name).read_bytes()).hexdigest() for name in files]

    train_embedding(tiny_model, shown, whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_embedding(tiny_model, shown, whole, tmp_path / "stopped", Dies())
    train_embedding(tiny_model, shown, whole, tmp_path / "stopped")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    watched = [row for row in rows(tmp_path / "whole") if row.get("event") == "watch"]
    assert [row["step"] for row in watched] == [0, 3, 6]
    figures = watched[-1]["tokens"]["<it>/clip_l"]
    assert figures["norm"] == pytest.approx([1.0, 1.0]) and len(figures["nearest"][0]) == 3


def test_with_a_lora_both_learn_at_rates_of_their_own(tiny_model, shown, tmp_path):
    both = train_embedding(tiny_model, shown, config(lora_rank=2, lora_learning_rate=1e-3), tmp_path)
    ups = [value for name, value in both.lora.items() if name.endswith("lora_up.weight")]
    assert ups and all(value.any() for value in ups)
    still = train_embedding(tiny_model, shown, config(lora_rank=2, lora_learning_rate=0.0, run_name="s"), tmp_path)
    assert not any(value.any() for name, value in still.lora.items() if name.endswith("lora_up.weight"))
    assert not torch.equal(*(run.embedding.concepts[0].vectors["clip_l"] for run in (both, still)))


def test_several_tokens_learn_from_their_own_captions(tiny_model, tmp_path):
    data = pictures_of(["a <one>", "a <one> circle"])
    chosen = config(
        token="<one>, <two>", initial_text="red, blue", vectors=1, settings=TrainingSettings(warmup_steps=0)
    )
    with pytest.raises(ValueError, match="token <two> is in none of 2 captions"):
        train_embedding(tiny_model, data, chosen, tmp_path)
    data = pictures_of(["a <one>", "a <two>"])
    trained = train_embedding(tiny_model, data, replace(chosen, steps=4), tmp_path)
    starts = tiny_model.text_encoder.vocabularies["clip_l"]
    for concept, word in zip(trained.embedding.concepts, ("red", "blue"), strict=True):
        assert not torch.allclose(concept.vectors["clip_l"][0], starts.table[starts.ids(word)[0]], atol=1e-3)


def test_vectors_start_from_words_tokens_or_chance(tiny_model, caplog):
    vocabulary = tiny_model.text_encoder.vocabularies["clip_l"]
    words = vocabulary.table[vocabulary.ids("a b")]

    def first(text, count, known=()):
        random = torch.Generator().manual_seed(3)
        return first_vectors(text, count, "clip_l", vocabulary, known, random)

    assert len(words) == 2 and torch.equal(first("a b", 2), words)
    assert torch.equal(first("a b", 4), words[[0, 0, 1, 1]])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(first("a b", 1), words[:1])
    assert "2 tokens; the first 1" in caplog.text
    old = Concept("<old>", {"clip_l": torch.randn(2, 32)})
    assert torch.equal(first("<old> b", 3, [old]), torch.cat([old.vectors["clip_l"], words[1:]]))
    drawn = first("", 5)
    assert torch.equal(drawn, first("", 5))
    assert drawn.norm(dim=1).tolist() == pytest.approx([median_norm(vocabulary)] * 5, rel=1e-5)


def test_the_length_of_vectors_is_kept_where_they_are_read():
    """norms: what is read is as long as asked for, and gradients have no part along the vector."""
    concept = Concept("<it>", {"clip_l": torch.randn(3, 8)})
    start = concept.vectors["clip_l"]
    tokens = TokenEmbeddings([concept], [], {"clip_l": 0.5}, torch.device("cpu"))
    with tokens.attach():
        read = concept.vectors["clip_l"]
        (read * torch.randn(3, 8)).sum().backward()
    assert read.norm(dim=1).tolist() == pytest.approx([0.5] * 3)
    assert concept.vectors["clip_l"] is start
    (master,) = tokens.parameters.values()
    assert master.grad.norm() > 0
    assert (master.grad * master).sum(dim=1).abs().max() < 1e-5


def test_captions_and_sentences(caplog):
    named, plain = pictures_of(["a <it>", "a dog", "a Cat and cats"]), pictures_of(["a dog", "a cat"])
    with caplog.at_level(logging.WARNING):
        data, captions = choose_captions(named, config())
        assert [e.caption for e in data.examples] == ["a <it>"] and captions("x", 1, 0) == "x"
        assert "2 images without a token" in caplog.text
        caplog.clear()
        data, captions = choose_captions(plain, config())
        assert len(data.examples) == 2 and "no caption holds <it>" in caplog.text
    drawn = {captions("a dog", number, index) for number in range(1, 30) for index in range(2)}
    assert len(drawn) > 10 and drawn <= {line.replace("{}", "<it>") for line in OBJECT}
    assert captions("a dog", 4, 1) == captions("a cat", 4, 1) and captions("a dog", 0, 5) == "a photo of a <it>"
    assert choose_captions(named, config(template="style"))[1].lines == STYLE
    own = config(template="own", lines=("a {}: {caption}",))
    assert choose_captions(named, own)[1]("a dog", 7, 0) == "a <it>: a dog"
    data, _ = choose_captions(named, config(caption_word="cat, cats"))
    assert [e.caption for e in data.examples] == ["a <it>", "a <it> and <it>"]
    assert len(choose_captions(named, config(lora_rank=2))[0].examples) == 3
    with pytest.raises(ValueError, match="token <it> is in none of 2 captions"):
        choose_captions(plain, config(template="captions"))


def test_known_embeddings_of_the_command_line(tiny_model, tmp_path):
    from retune.training.common.files import write_tensors

    write_tensors(tmp_path / "old.safetensors", {"emp_params": torch.ones(1, 32)})
    (known,) = read_concepts([f"<old>={tmp_path / 'old.safetensors'}"], tiny_model.text_encoder)
    assert known.token == "<old>" and torch.equal(known.vectors["clip_l"], torch.ones(1, 32))
    with pytest.raises(ValueError, match="expected token=file"):
        read_concepts(["old.safetensors"], tiny_model.text_encoder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token": "two words"}, "expected one word"),
        ({"token": "<a>, <A>"}, "expected different words"),
        ({"token": "<a>, <b>"}, "1 texts for 2 tokens"),
        ({"token": "<a>, <b>", "initial_text": "", "template": "object"}, "expected 'captions'"),
        ({"template": "own"}, r"lines hold no \{\}"),
        ({"vectors": 0}, "vectors is 0; expected 1 to 75"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
    ],
)
def test_what_cannot_be_asked_for(changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


def test_a_word_of_the_vocabulary_is_warned_of(tiny_model, tmp_path, caplog):
    data = pictures_of(["a picture"])
    with caplog.at_level(logging.WARNING):
        train_embedding(
            tiny_model, data, config(token="a", initial_text="", steps=1, settings=TrainingSettings()), tmp_path
        )
    assert "a is a word that clip_l knows" in caplog.text


def test_captions_are_drawn_by_seed():
    one, other = (CaptionTemplates(OBJECT, "<it>", seed) for seed in (0, 1))
    assert [one("", n, 0) for n in range(1, 20)] != [other("", n, 0) for n in range(1, 20)]
