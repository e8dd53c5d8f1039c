"""Tags in a new order, and some left out; encodings of captions that never come again."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.cache import TextCache
from retune.training.data.captions import vary_tags
from retune.training.models.protocols import Conditioning

TAGS = "a b, c, d e, f"


def varied(index, caption=TAGS, keep=0, shuffle=True, dropout=0.0):
    named = generator(0, "caption shuffle", index) if shuffle else None
    return vary_tags(
        caption, keep=keep, shuffle=named, dropout=dropout, random=generator(0, "tag dropout", index)
    ).split(", ")


def test_all_orders_are_alike():
    found, count = Counter(tuple(varied(i)) for i in range(4800)), 4800
    assert set(found) == set(itertools.permutations(TAGS.split(", ")))
    assert all(abs(n - count / 24) < 4 * (count / 24) ** 0.5 for n in found.values())


def test_kept_tags_stay_in_front():
    for i in range(50):
        tags = varied(i, keep=2, dropout=0.5)
        assert tags[:2] == ["a b", "c"] and set(tags[2:]) <= {"d e", "f"}
    assert varied(0, keep=9, dropout=1.0) == TAGS.split(", ")


def test_tags_are_left_out_at_their_rate_and_in_order():
    kept = [varied(i, shuffle=False, dropout=0.25) for i in range(2000)]
    assert sum(map(len, kept)) / 8000 == pytest.approx(0.75, abs=0.02)
    assert all(tags == [t for t in TAGS.split(", ") if t in tags] or tags == [""] for tags in kept)
    assert varied(0, dropout=1.0) == [""]


def test_one_option_does_not_change_the_others_draws():
    for i in range(20):
        order, left = varied(i), varied(i, dropout=0.4)
        assert left == [tag for tag in order if tag in left] or left == [""]


def test_blank_tags_vanish():
    assert varied(0, " a ,, b,", shuffle=False) == ["a", "b"]


@pytest.mark.parametrize("bad", [{"keep_tokens": -1}, {"tag_dropout": 1.5}])
def test_bad_settings_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} is"):
        dataclasses.replace(TrainingSettings(), **bad)


def test_get_in_memory_writes_nothing_to_disk_and_is_bounded(tmp_path):
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return Conditioning(torch.full((1, 4, 8), float(len(texts[0]))))

    cache = TextCache(tmp_path, encode, "t", memory=3 * 4 * 8 * 4)
    cache.fill(["known"])
    for caption in ("one", "known", "one", "two"):
        assert cache.get_in_memory(caption).context.mean() == len(caption)
    assert encoded == ["known", "one", "two"] and len(list(tmp_path.rglob("*.safetensors"))) == 1
    cache.get_in_memory("three"), cache.get_in_memory("four")
    assert cache.get_in_memory("one").context.mean() == 3 and encoded[-1] == "one"  # it was dropped from memory
    assert torch.equal(cache.get("one").context, cache.get_in_memory("one").context)
