"""The images of each training step, as a pure function of (seed, step)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.rng import generator
from .buckets import Size
from .examples import Dataset, Example


@dataclass(frozen=True)
class Slot:
    """An image at one position of a batch."""

    example: Example
    flip: bool
    index: int
    """Position in the batch, 0 to batch_size - 1; (step, index) keys the random draws for this image."""
    epoch: int
    """Counts from 0."""
    number: int = 0
    """Number of the batch, from 1; 0 outside of training, where captions do not vary."""


class Permutations(NamedTuple):
    """The order of an epoch, 8 bytes for each image."""

    images: list[Tensor]
    """Of the images of each bucket."""
    batches: Tensor
    """Of the batches of all buckets, which are numbered bucket by bucket."""


class BatchOrder:
    """Shuffled batches, each from a single bucket; has no state between steps.

    In each epoch the images of every bucket (with repeats) are permuted and divided into batches of exactly
    `batch_size`. A bucket's last batch is filled up from the start of the same permutation, repeatedly if the bucket
    has fewer images than a batch. So every image appears at least once per epoch, and all batches have the same size.
    Then the batches of all buckets are permuted. The order depends on `generator(seed, "order", epoch)` alone.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        if not len(dataset):
            raise ValueError("the data set is empty; expected at least one image.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._buckets = _group_by_size(dataset)
        self._epoch: tuple[int, Permutations] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return sum(math.ceil(len(bucket) / self.batch_size) for bucket in self._buckets)

    def batch(self, step: int) -> list[Slot]:
        """The images of a step, counted from 1. Mirroring is drawn from `generator(seed, "flip", step, index)`."""
        if step < 1:
            raise ValueError(f"step is {step}; expected at least 1. Steps count from 1.")
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        examples = self._examples(self._permutations(epoch), position)
        return [Slot(example, self._draw_flip(step, i), i, epoch, step) for i, example in enumerate(examples)]

    def largest(self) -> Slot:
        """The image with the most pixels, not mirrored, as the first of batch 1: its caption varies as in training."""
        return Slot(max(self.dataset.examples, key=lambda e: e.width * e.height), False, 0, 0, 1)

    def _draw_flip(self, step: int, index: int) -> bool:
        return self.dataset.flip and bool(torch.rand(1, generator=generator(self.seed, "flip", step, index)) < 0.5)

    def _examples(self, permutations: Permutations, position: int) -> list[Example]:
        """The images of the batch at a position of an epoch."""
        number = int(permutations.batches[position])
        for bucket, order in zip(self._buckets, permutations.images, strict=True):
            batches = math.ceil(len(bucket) / self.batch_size)
            if number < batches:
                start = number * self.batch_size
                places = (place % len(order) for place in range(start, start + self.batch_size))
                return [bucket[int(order[place])] for place in places]
            number -= batches
        raise AssertionError(f"position {position} is beyond the epoch")

    def _permutations(self, epoch: int) -> Permutations:
        """The permutations of an epoch; those of the last epoch asked for are cached."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = generator(self.seed, "order", epoch)
            images = [torch.randperm(len(bucket), generator=random) for bucket in self._buckets]
            self._epoch = (epoch, Permutations(images, torch.randperm(self.steps_per_epoch, generator=random)))
        return self._epoch[1]


def _group_by_size(dataset: Dataset) -> list[list[Example]]:
    """The images of each bucket, with repeats; buckets in the order of their sizes."""
    buckets: dict[Size, list[Example]] = {}
    for example in dataset.examples:
        bucket = buckets.setdefault((example.width, example.height), [])
        bucket.extend([example] * (example.repeats * dataset.repeats))
    return [buckets[size] for size in sorted(buckets)]
