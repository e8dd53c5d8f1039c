"""Two data sets as one, and regularisation images in their share."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from retune.training.data.dataset import from_images, join_datasets, split_validation
from retune.training.data.order import BatchOrder


def numbered(count, start=0, **options):
    values = [torch.full((8, 8, 3), (start + i) / 1000) for i in range(count)]
    return from_images(values, [f"caption {start + i}" for i in range(count)], **options)


def shown(dataset, batch_size=1):
    """How often an epoch shows each caption."""
    order = BatchOrder(dataset, batch_size, 0)
    return Counter(slot.example.caption for n in range(order.steps_per_epoch) for slot in order.batch(n + 1))


def with_repeats(dataset, *repeats):
    return replace(
        dataset, examples=tuple(replace(e, repeats=n) for e, n in zip(dataset.examples, repeats, strict=True))
    )


def test_more_images_are_shown_as_often_as_they_say():
    first, second = numbered(3, repeats=4), with_repeats(numbered(2, 100, repeats=2), 1, 5)
    dataset = join_datasets(first, second)
    assert shown(dataset) == {**{f"caption {i}": 4 for i in range(3)}, "caption 100": 2, "caption 101": 10}
    assert not any(e.is_regularisation for e in dataset.examples)
    assert "more images: 2 of 2 images, 12 shown per epoch" in dataset.report


@pytest.mark.parametrize("repeats", [1, 7])
@pytest.mark.parametrize("count", [1, 4, 12, 13, 300])
def test_an_epoch_shows_as_many_regularisation_images_as_others(count, repeats):
    first = numbered(4, repeats=3)
    dataset = join_datasets(first, numbered(count, 100, repeats=repeats), regularisation=True)
    counts = shown(dataset)
    others = [n for caption, n in counts.items() if int(caption.split()[1]) >= 100]
    assert sum(others) == 12 and max(others) - min(others) <= 1 and len(others) == min(count, 12)
    assert sum(counts.values()) == len(dataset) == 24
    assert [e.is_regularisation for e in dataset.examples] == [False] * 4 + [True] * len(others)


def test_repeats_of_regularisation_images_keep_their_proportion():
    dataset = join_datasets(numbered(4, repeats=3), with_repeats(numbered(3, 100), 1, 1, 4), regularisation=True)
    assert [e.repeats for e in dataset.examples[4:]] == [2, 2, 8]


def test_left_out_images_are_spread_over_the_order():
    dataset = join_datasets(numbered(4), numbered(100, 100), regularisation=True)
    assert [e.caption for e in dataset.examples[4:]] == [f"caption {100 + i}" for i in (24, 49, 74, 99)]


def test_regularisation_images_are_never_held_out():
    first, second = numbered(40), numbered(40, 100)
    dataset = join_datasets(first, replace(second, examples=(*second.examples, first.examples[0])), regularisation=True)
    training, validation = split_validation(dataset, 0.3, seed=0)
    alone = split_validation(first, 0.3, seed=0)[1]
    assert {e.key for e in validation.examples} == {e.key for e in alone.examples}
    assert not any(e.is_regularisation for e in validation.examples)
    assert not {e.key for e in training.examples} & {e.key for e in validation.examples}


def test_weights_and_roles_are_part_of_the_fingerprint():
    first, second = numbered(2), numbered(2, 100)
    light = replace(second, examples=tuple(replace(e, weight=0.5) for e in second.examples))
    made = {join_datasets(first, a, regularisation=b).fingerprint for a in (second, light) for b in (False, True)}
    assert len(made) == 4


@pytest.mark.parametrize("option", [{"crop": "random"}, {"flip": True}])
def test_options_that_differ_are_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} of the second data set is"):
        join_datasets(numbered(2), numbered(2, 100, **option))


def test_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="show 2 and 0 images; expected at least one each"):
        join_datasets(numbered(2), replace(numbered(2), examples=()))
