"""The qualities read from pixels are those that were drawn, and their words are told apart."""

import math

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.demo.judge import parse_quality
from retune.training.demo.quality import mean_quality, qualities, quality_shares, quality_words
from retune.training.demo.scenes import QUALITIES, QUALITY_WORDS, Scene, draw, held_out_scenes, with_words

BLUE = {"shape": "circle", "colour": "blue", "size": "large", "count": 2, "position": "left", "background": "white"}


def drawn(scenes, seed=4):
    return [draw(scene, generator(seed, i)) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def measured():
    scenes = held_out_scenes(100, 4)
    found = [qualities(image) for image in drawn(scenes)]
    return {
        name: torch.tensor([[row[name], getattr(scene, name)] for row, scene in zip(found, scenes, strict=True)])
        for name in QUALITIES
    }


@pytest.mark.parametrize(("name", "error"), [("polish", 0.05), ("light", 0.08), ("richness", 0.1)])
def test_it_reads_what_was_drawn(measured, name, error):
    read, true = measured[name].double().T
    assert (read - true).abs().mean() < error
    assert torch.corrcoef(torch.stack([read, true]))[0, 1] > 0.95


@pytest.mark.parametrize("word", QUALITY_WORDS)
def test_a_drawn_word_is_read_back(word):
    scenes = [with_words(scene, [word]) for scene in held_out_scenes(40, 6)]
    shares = quality_shares(drawn(scenes), scenes)
    assert list(shares) == [word] and shares[word] >= 0.95


def test_the_middle_and_pictures_without_shapes_are_unsure():
    middle = [Scene(**BLUE, polish=0.5, light=0.5, richness=0.5)] * 8
    assert sum(quality_words(image)["polish"] == "unsure" for image in drawn(middle)) >= 6
    noise = torch.rand(3, 128, 128, generator=generator(0, "noise"))
    for image in (torch.full((3, 128, 128), 0.5), torch.zeros(3, 128, 128), noise):
        assert all(math.isnan(value) for value in qualities(image).values())
        assert set(quality_words(image).values()) == {"unsure"}


def test_the_mean_leaves_out_what_cannot_be_told():
    full = drawn([Scene(**BLUE, polish=1.0, light=1.0, richness=1.0)])
    blank = torch.full((3, 128, 128), 0.5)
    assert mean_quality([*full, blank]) == mean_quality(full) > 0.85
    assert math.isnan(mean_quality([blank]))


def test_shares_count_only_what_a_caption_says():
    (lit,) = drawn([Scene(**BLUE, polish=0.0, light=1.0, richness=1.0)])
    assert quality_shares([lit] * 2, ["sunlit, two circles", "dim circles, flat"]) == {
        "sunlit": 1.0, "dim": 0.0, "flat": 1.0
    }  # fmt: skip
    assert quality_shares([lit], ["two circles"]) == {}


def test_words_of_captions_are_parsed():
    assert parse_quality("two glossy red circles, Rich, sunlit") == ("glossy", "sunlit", "rich")
    assert parse_quality("glossy flat circles, plain") == ("plain",)
    assert parse_quality("dimmer, enriched") == ()
