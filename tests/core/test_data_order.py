"""Batch order: a pure function of seed and step, every image once an epoch, one size per batch."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from retune.training.data.examples import Dataset, Example
from retune.training.data.order import BatchOrder


def dataset(counts: dict[tuple[int, int], int], **options) -> Dataset:
    examples = []
    for (width, height), count in counts.items():
        for i in range(count):
            name = f"{width}x{height}-{i}"
            examples.append(Example(f"{name:>32}", name, width, height, torch.zeros(3, height, width), name))
    return Dataset(tuple(examples), **options)


MIXED = {(64, 64): 7, (96, 64): 5, (64, 96): 1}


def names(order: BatchOrder, steps: range) -> list[list[str]]:
    return [[slot.example.name for slot in order.batch(step)] for step in steps]


def test_an_epoch_shows_everything_in_full_batches_of_one_size():
    order = BatchOrder(dataset(MIXED), 3, seed=1)
    assert order.steps_per_epoch == 3 + 2 + 1
    for epoch in range(4):
        steps = range(1 + 6 * epoch, 7 + 6 * epoch)
        batches = [order.batch(step) for step in steps]
        assert all(
            len(batch) == 3 and len({(s.example.width, s.example.height) for s in batch}) == 1 for batch in batches
        )
        assert {slot.epoch for batch in batches for slot in batch} == {epoch}
        assert [slot.index for slot in batches[0]] == [0, 1, 2]
        shown = Counter(slot.example.name for batch in batches for slot in batch)
        assert set(shown) == {e.name for e in order.dataset.examples}
        assert shown["64x96-0"] == 3
        assert all(count <= 2 for name, count in shown.items() if name != "64x96-0")


def test_exact_fit_shows_each_once():
    order = BatchOrder(dataset({(64, 64): 8}), 4, seed=0)
    shown = Counter(name for batch in names(order, range(1, 3)) for name in batch)
    assert len(shown) == 8 and set(shown.values()) == {1}


def test_any_step_can_be_asked_alone():
    walked = BatchOrder(dataset(MIXED, flip=True), 2, seed=5)
    steps = [walked.batch(step) for step in range(1, 40)]
    for step in (39, 1, 17, 8, 9):
        assert BatchOrder(dataset(MIXED, flip=True), 2, seed=5).batch(step) == steps[step - 1]


def test_epochs_and_seeds_differ():
    order = BatchOrder(dataset({(64, 64): 30}), 3, seed=0)
    first, second = names(order, range(1, 11)), names(order, range(11, 21))
    other = names(BatchOrder(dataset({(64, 64): 30}), 3, seed=1), range(1, 11))
    assert first != second and first != other


def test_batches_of_different_sizes_are_mixed():
    order = BatchOrder(dataset({(64, 64): 20, (96, 64): 20}), 2, seed=0)
    widths = [order.batch(step)[0].example.width for step in range(1, 21)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_repeats_of_examples_and_data_set_multiply():
    once, often = dataset({(64, 64): 2}).examples
    data = Dataset((once, replace(often, repeats=3)), repeats=2)
    assert len(data) == 8
    order = BatchOrder(data, 4, seed=0)
    shown = Counter(name for batch in names(order, range(1, order.steps_per_epoch + 1)) for name in batch)
    assert shown == {once.name: 2, often.name: 6}


def test_flips_are_fair_and_only_when_asked():
    order = BatchOrder(dataset({(64, 64): 4}, flip=True), 4, seed=3)
    flips = [slot.flip for step in range(1, 251) for slot in order.batch(step)]
    assert 430 < sum(flips) < 570
    plain = BatchOrder(dataset({(64, 64): 4}), 4, seed=3)
    assert not any(slot.flip for step in range(1, 50) for slot in plain.batch(step))


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchOrder(dataset(MIXED), 0, seed=0)
    with pytest.raises(ValueError, match="empty"):
        BatchOrder(Dataset(()), 1, seed=0)
    with pytest.raises(ValueError, match="step is 0"):
        BatchOrder(dataset(MIXED), 1, seed=0).batch(0)
