"""Tokens that stand for vectors: split off in prompts, encoded by the core's text encoders."""

import pytest
import torch
from retune.training.config.tokens import check_token
from retune.training.models.concepts import Concept, add_concepts, pieces, split_tokens


def concept(token, width=32, count=1, name="clip_l", seed=0):
    return Concept(token, {name: torch.randn(count, width, generator=torch.Generator().manual_seed(seed))})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a <cat-toy>, red", ["a ", "<cat-toy>", ", red"]),
        ("a<Cat-Toy>b", ["a", "<Cat-Toy>", "b"]),
        ("(sks:1.2) dog", ["(", "sks", ":1.2) dog"]),
        ("a sks-dog, asks, sks_", ["a sks-dog, asks, sks_"]),
        ("embedding:sks and sks", ["embedding:sks and ", "sks", ""]),
        ("sks2 sks", ["", "sks2", " ", "sks", ""]),
        ("", [""]),
    ],
)
def test_tokens_in_a_prompt(text, parts):
    assert split_tokens(text, ["sks", "<cat-toy>", "sks2"]) == parts


def test_pieces_are_texts_and_concepts():
    cat, dog = concept("<cat>"), concept("dog")
    assert pieces(" a   <cat> and\n a DOG ", [cat, dog]) == [" a   ", cat, "and a", dog]
    assert pieces("a<cat>", [cat]) == ["a ", cat]
    assert pieces(" as it is ", [cat]) == [" as it is "]


def test_the_later_of_one_token_counts():
    first, second, other = concept("<cat>"), concept("<CAT>"), concept("dog")
    assert add_concepts([first, other], [second]) == (second, other)


@pytest.mark.parametrize("token", ["", " ", "two words", "a,b", "embedding:x"])
def test_what_cannot_be_a_token(token):
    with pytest.raises(ValueError, match="expected one word"):
        check_token(token)


def test_a_token_reads_as_its_vectors(tiny_model):
    """The vectors of known words give what the words give; gradients reach the vectors and nothing else."""
    encoder = tiny_model.text_encoder
    vocabulary = encoder.vocabularies["clip_l"]
    ids = vocabulary.ids("red circle")
    assert vocabulary.word(vocabulary.ids("circle")[-1])
    vectors = vocabulary.table[ids].detach().clone().requires_grad_(True)
    with_concepts = encoder.with_concepts([Concept("<it>", {"clip_l": vectors})])

    def encode(chosen, text):
        return chosen.encode(chosen.tokenize([text])).context

    assert torch.equal(encode(with_concepts, "a <it> on the left"), encode(encoder, "a red circle on the left"))
    assert torch.equal(encode(with_concepts, "a red circle"), encode(encoder, "a red circle"))
    assert not torch.equal(encode(encoder, "a <it>"), encode(with_concepts, "a <it>"))
    encode(with_concepts, "<it> <it>").square().sum().backward()
    assert (vectors.grad.abs().sum(dim=1) > 0).all()
    assert vocabulary.table.grad is None
    assert with_concepts.fingerprint != encoder.fingerprint


def test_vectors_count_against_the_window(tiny_model):
    encoder = tiny_model.text_encoder
    most = encoder.window - 2
    with_concepts = encoder.with_concepts([concept("<short>", count=5), concept("<long>", count=20, seed=1)])
    text = "a " * (most - 3)
    word = len(encoder.vocabularies["clip_l"].ids("a"))
    assert word == 1
    (short,) = with_concepts.tokenize([text + "<short>"])
    assert [sum(token >= 0 for token in window) for window in short] == [encoder.window] * 2
    first = len(encoder.token_embedding.weight)
    assert [sum(token >= first for token in window) for window in short] == [0, 5]
    (long,) = with_concepts.tokenize([text + "<long>"])
    assert [sum(token >= first for token in window) for window in long] == [3, 17]


def test_vectors_that_do_not_fit(tiny_model):
    encoder = tiny_model.text_encoder
    with pytest.raises(ValueError, match="1 x 31 for clip_l; expected vectors of 32"):
        encoder.with_concepts([concept("<it>", width=31)])
    with pytest.raises(ValueError, match="has vectors for clip_g; expected some for clip_l"):
        encoder.with_concepts([concept("<it>", name="clip_g")])
