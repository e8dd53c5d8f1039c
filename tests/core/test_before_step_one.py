"""What a training of tokens would fail on later is said before its first step; no step is without a gradient."""

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.captions import vary_tags
from retune.training.data.dataset import from_images
from retune.training.data.templates import OBJECT, CaptionTemplates, contains_token, expect_readable, expect_tokens
from retune.training.formats.embedding_save import expect_file_names
from retune.training.recipes.textual_inversion import train_embedding


def config(**changes):
    settings = TrainingSettings(tag_dropout=1.0, caption_shuffle=True, warmup_steps=0, validation_fraction=0.0)
    values = {"run_name": "r", "token": "<it>", "steps": 3, "batch_size": 1, "learning_rate": 1e-2}
    return EmbeddingConfig(**(values | {"settings": settings} | changes))


def pictures(captions):
    random = torch.Generator().manual_seed(1)
    return from_images([torch.rand(3, 32, 32, generator=random) for _ in captions], list(captions), resolution=None)


def test_tag_dropout_keeps_the_learned_word():
    def dropped(number, stays):
        drawn = {"shuffle": generator(0, "caption shuffle", number), "random": generator(0, "tag dropout", number)}
        return vary_tags("red, a <it> here, blue, big", keep=0, dropout=0.7, stays=stays, **drawn).split(", ")

    for number in range(50):
        kept = dropped(number, lambda tag: contains_token(tag, ["<it>"]))
        assert "a <it> here" in kept
        other = dropped(number, lambda tag: False)
        assert [tag for tag in kept if tag != "a <it> here"] == [tag for tag in other if tag not in ("", "a <it> here")]


def test_every_step_has_a_gradient_although_all_other_tags_are_dropped(tiny_model, tmp_path):
    shown = pictures(["red, white, <it>", "a small <it>, blue"])
    trained = train_embedding(tiny_model, shown, config(), tmp_path)
    assert trained.embedding.metadata["steps"] == 3


def test_a_loss_that_nothing_has_a_part_in_is_explained(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("retune.training.recipes.textual_inversion.contains_token", lambda tag, tokens: "<it>" == tag)
    shown = pictures(["red, a <it>", "blue, <it> too", "<it>"])
    with pytest.raises(ValueError, match="the loss of step [123] depends on nothing that trains"):
        train_embedding(tiny_model, shown, config(), tmp_path)


@pytest.mark.parametrize("token", ["<" + "x" * 260 + ">", "ü" * 101, "<>", "***", "<con>", "NUL.x"])
def test_a_token_that_gives_no_file_is_refused_before_the_first_step(tiny_model, tmp_path, token):
    with pytest.raises(ValueError, match="^token .*Choose"):
        train_embedding(tiny_model, pictures([f"a {token}"] * 2), config(token=token), tmp_path)
    assert not (tmp_path / "r").exists()


def test_tokens_of_the_usual_kinds_give_files():
    expect_file_names(["<my-cat>", "sks", "x" * 200, "猫"])


def test_a_line_without_the_token_is_refused(tiny_model, tmp_path):
    lines = ("a photo of {}", "a plain photo")
    with pytest.raises(ValueError, match="the line 'a plain photo' gives 'a plain photo', without <it>"):
        train_embedding(tiny_model, pictures(["x", "y"]), config(template="own", lines=lines), tmp_path)
    expect_tokens(("{caption}", "{}"), ["a <it>", "<IT> b"], ["<it>"])
    with pytest.raises(ValueError, match="the line '{caption}' gives 'b', without"):
        expect_tokens(("{caption}", "{}"), ["a <it>", "b"], ["<it>"])
    expect_tokens(OBJECT, ["x"], ["<it>"])


def test_every_caption_that_may_come_is_known():
    assert CaptionTemplates((), "<it>", 0).all_of(["a", "b"]) == ["a", "b"]
    lines = ("a {}", "{caption}, {}")
    assert CaptionTemplates(lines, "<it>", 0).all_of(["x", "y"]) == ["a <it>", "x, <it>", "y, <it>"]


def test_a_token_behind_the_end_of_a_t5_is_refused():
    from retune.training.demo.files import weights_path
    from retune.training.text_encoder.projection import Projection
    from retune.training.text_encoder.t5 import Padding, load_t5

    encoder = load_t5(weights_path("t5.safetensors"), Projection(96, 128), padding=Padding(max_tokens=20))
    words = " ".join(["red"] * 19)
    count = len(encoder.vocabularies[encoder.name].ids(words))
    assert count >= 19
    expect_readable(encoder, [f"<it> {words}"], ["<it>"], 2, shuffled=False)
    for caption, shuffled in ((f"{words} <it>", False), (f"<it>, {words}", True)):
        with pytest.raises(ValueError, match="<it> would end at place .*expected at most 19"):
            expect_readable(encoder, [caption], ["<it>"], 2, shuffled)
    expect_readable(encoder, ["a red circle"], ["<it>"], 2, shuffled=True)
