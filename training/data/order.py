"""Which images a step sees, as a pure function of (seed, step)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..common.rng import generator
from .buckets import Size
from .examples import Dataset, Example


@dataclass(frozen=True)
class Slot:
    """One place in a batch."""

    example: Example
    flip: bool
    index: int
    """Place in the batch, 0 .. batch_size - 1; together with the step it names this draw."""
    epoch: int
    """Counts from 0."""
    number: int = 0
    """Number of the batch, from 1; 0 outside of training, where nothing is varied."""


class BatchOrder:
    """Batches of one size each, shuffled anew every epoch; nothing is kept from step to step.

    Per epoch the showings of every bucket (repeats included) are permuted and cut into batches of exactly `batch_size`;
    a bucket's last batch is filled up from the start of the same permutation, again and again if the bucket holds fewer
    images than a batch. So every image appears at least once per epoch and no batch is smaller. Then the batches of all
    buckets are permuted. All of it follows from `generator(seed, "order", epoch)`.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        if not len(dataset):
            raise ValueError("the data set is empty; expected at least one image.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._buckets = _by_size(dataset)
        self._epoch: tuple[int, list[list[Example]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return sum(math.ceil(len(bucket) / self.batch_size) for bucket in self._buckets)

    def batch(self, step: int) -> list[Slot]:
        """The slots of one step; steps count from 1. Mirroring is drawn from `generator(seed, "flip", step, index)`."""
        if step < 1:
            raise ValueError(f"step is {step}; expected at least 1. Steps count from 1.")
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        examples = self._batches(epoch)[position]
        return [Slot(example, self._flips(step, i), i, epoch, step) for i, example in enumerate(examples)]

    def _flips(self, step: int, index: int) -> bool:
        return self.dataset.flip and bool(torch.rand(1, generator=generator(self.seed, "flip", step, index)) < 0.5)

    def _batches(self, epoch: int) -> list[list[Example]]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1]

    def _shuffled(self, epoch: int) -> list[list[Example]]:
        draw = generator(self.seed, "order", epoch)
        batches = []
        for bucket in self._buckets:
            order = torch.randperm(len(bucket), generator=draw).tolist()
            for start in range(0, len(bucket), self.batch_size):
                places = range(start, start + self.batch_size)
                batches.append([bucket[order[place % len(order)]] for place in places])
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def _by_size(dataset: Dataset) -> list[list[Example]]:
    buckets: dict[Size, list[Example]] = {}
    for example in dataset.examples:
        bucket = buckets.setdefault((example.width, example.height), [])
        bucket.extend([example] * (example.repeats * dataset.repeats))
    return [buckets[size] for size in sorted(buckets)]
