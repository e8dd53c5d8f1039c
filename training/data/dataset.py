"""Data sets from files or from tensors, and their division into training and validation."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..common.text import count_noun
from ..config.checks import check_multiple
from ..config.folder import CROPS, FolderConfig
from .buckets import Size, bucket_for, make_buckets
from .examples import Dataset, Example, tensor_key
from .folder import load_folder
from .images import flatten_alpha
from .masks import Mask
from .report import format_report

__all__ = ["Dataset", "Example", "FolderConfig", "from_images", "join_datasets", "load_folder", "split_validation"]

log = logging.getLogger(__name__)

CHANNELS = (1, 3, 4)


def from_images(
    images: Sequence[Tensor],
    captions: Sequence[str],
    resolution: int | None = None,
    *,
    buckets: bool = True,
    repeats: int = 1,
    crop: str = "center",
    flip: bool = False,
    names: Sequence[str] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> Dataset:
    """A data set of float image tensors in 0..1: (H, W, C), (C, H, W), or batches (B, H, W, C), (B, C, H, W) of them.

    C is 1, 3 or 4 (transparency is laid on white). `captions` holds one for all or one per image. Without a resolution
    every image keeps its own size, cut to multiples of 8; with one it goes to a bucket (a square without `buckets`).
    masks: floats in 0..1 of their images' sizes, (H, W) or batches (B, H, W), 1 where an image counts; one for all or
    one per image.
    """
    pixels = [image for tensor in images for image in _channels_first(tensor)]
    captions = _one_each(captions, len(pixels))
    names = [f"image {i}" for i in range(1, len(pixels) + 1)] if names is None else names
    if len(names) != len(pixels):
        raise ValueError(f"there are {len(names)} names and {len(pixels)} images; expected one name each.")
    if crop not in CROPS or repeats < 1:
        raise ValueError(f"crop is {crop!r} and repeats {repeats}; expected one of {', '.join(CROPS)} and at least 1.")
    own = [(image.shape[2], image.shape[1]) for image in pixels]
    targets = _targets(own, resolution, buckets)
    found = [None] * len(pixels) if masks is None else _masks(masks, own)
    rows = zip(pixels, captions, targets, names, found, strict=True)
    examples = tuple(
        Example(tensor_key(image), text, *size, image, name, mask=mask) for image, text, size, name, mask in rows
    )
    dataset = Dataset(examples, crop, flip, repeats)
    notes = [] if masks is None else [f"masks: {len(found)} of {count_noun(len(found), 'image')}"]
    return replace(dataset, report=format_report(dataset, "given images", own, notes=notes))


def join_datasets(first: Dataset, second: Dataset, *, regularisation: bool = False) -> Dataset:
    """Both data sets as one; repeats stay those of each. Raises ValueError when they crop or mirror differently.

    regularisation: `second` only keeps the model what it was (DreamBooth, arXiv 2208.12242, section 3.2). An epoch then
    shows exactly as many of its images as of the first's, as in sd-scripts (`DreamBoothDataset`); their repeats are
    raised or lowered in proportion, and of more images than that some are left out, evenly over their order. They are
    not held out for validation.
    """
    for option in ("crop", "flip"):
        one, other = getattr(first, option), getattr(second, option)
        if one != other:
            raise ValueError(f"{option} of the second data set is {other}; expected {one}, as in the first.")
    if not len(first) or not len(second):
        raise ValueError(f"the data sets show {len(first)} and {len(second)} images; expected at least one each.")
    more, what = _unrolled(second), "more images"
    if regularisation:
        more, what = _balanced(more, len(first)), "regularisation images"
    counts = (
        f"{len(more)} of {count_noun(len(second.examples), 'image')}, {sum(e.repeats for e in more)} shown per epoch"
    )
    report = f"{first.report}\n\n{what}: {counts}\n{second.report}"
    return Dataset((*_unrolled(first), *more), first.crop, first.flip, report=report)


def _unrolled(dataset: Dataset) -> tuple[Example, ...]:
    """The examples with the data set's own repeats in theirs."""
    return tuple(replace(example, repeats=example.repeats * dataset.repeats) for example in dataset.examples)


def _balanced(examples: tuple[Example, ...], showings: int) -> tuple[Example, ...]:
    """The examples as regularisation images whose repeats, in the same proportions, add up to `showings`."""
    ends = itertools.accumulate(example.repeats for example in examples)
    total = sum(example.repeats for example in examples)
    ends = [end * showings // total for end in ends]
    repeats = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(replace(e, repeats=n, is_regularisation=True) for e, n in zip(examples, repeats, strict=True) if n)


def split_validation(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): about `fraction` of the different images is held out, chosen by content alone.

    A file's side depends on its content and the seed, not on its name or on the other files; equal files stay together.
    Only where one side would be empty the image nearest to the border changes sides. The validation set is shown once
    per epoch (no repeats) and not mirrored. With fraction 0 it is empty. Regularisation images are never held out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction is {fraction}; expected 0 <= fraction < 1.")
    if fraction == 0:
        return dataset, replace(dataset, examples=(), report="validation: none")
    places = {example.key: _place(example.key, seed) for example in dataset.examples if not example.is_regularisation}
    if len(places) < 2:
        raise ValueError(
            f"the data set has {count_noun(len(places), 'different image')}; expected at least 2 to hold some out for "
            "validation. Add images, or set the validation fraction to 0."
        )
    ranked = sorted(places, key=lambda key: (places[key], key))
    held = {key for key in ranked if places[key] < fraction} or set(ranked[:1])
    held -= {ranked[-1]}
    return _side(dataset, held, True), _side(dataset, held, False)


def _side(dataset: Dataset, held: set[str], training: bool) -> Dataset:
    examples = tuple(
        e for e in dataset.examples if (e.key in held) != training and (training or not e.is_regularisation)
    )
    line = f"{'training' if training else 'validation'}: {len(examples)} of {len(dataset.examples)} images"
    if training:
        return replace(dataset, examples=examples, report=line)
    once = tuple(replace(example, repeats=1) for example in examples)
    return replace(dataset, examples=once, crop="center", flip=False, repeats=1, report=line)


def _place(key: str, seed: int) -> float:
    """A fixed uniform number in [0, 1) for a content key."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:6], "big") / 2**48


def _channels_first(tensor: Tensor) -> list[Tensor]:
    """The images of one tensor as (3, H, W) float32 in 0..1, copied, outside inference mode."""
    if tensor.ndim not in (3, 4) or not tensor.is_floating_point():
        raise ValueError(f"image is {tuple(tensor.shape)} {tensor.dtype}; expected a float (H, W, C) or (C, H, W).")
    batch = tensor[None] if tensor.ndim == 3 else tensor
    if batch.shape[-1] in CHANNELS:
        batch = batch.movedim(-1, 1)
    if batch.shape[1] not in CHANNELS:
        raise ValueError(f"image shape is {tuple(tensor.shape)}; expected 1, 3 or 4 channels, last or first.")
    if not batch.isfinite().all() or batch.numel() and (batch.min() < -0.5 or batch.max() > 1.5):
        raise ValueError("image values are not finite or far outside 0..1; expected 0..1. Divide 8-bit values by 255.")
    with torch.inference_mode(False):
        return [flatten_alpha(image.to("cpu", torch.float32).clamp(0, 1)).clone() for image in batch]


def _masks(masks: Sequence[Tensor], sizes: Sequence[Size]) -> list[Mask]:
    """A mask for each image of these sizes."""
    found = [mask for tensor in masks for mask in _mask_pixels(tensor)]
    if len(found) not in (1, len(sizes)):
        raise ValueError(
            f"there are {count_noun(len(found), 'mask')} for {count_noun(len(sizes), 'image')}; expected one for all "
            "or one per image."
        )
    found *= len(sizes) // len(found)
    for number, (mask, size) in enumerate(zip(found, sizes, strict=True), start=1):
        width, height = mask.shape[2], mask.shape[1]
        if (width, height) != size:
            raise ValueError(
                f"mask {number} is {width} x {height}, its image {size[0]} x {size[1]}; expected the same size. Load "
                "Image gives a mask of 64 x 64 for a picture without transparency: leave that out."
            )
    if black := [number for number, mask in enumerate(found, start=1) if not mask.any()]:
        log.warning(
            "mask %d is black, so nothing of its image counts more. Invert a mask of what to leave out.", *black[:1]
        )
    return [Mask(tensor_key(mask), source=mask) for mask in found]


def _mask_pixels(tensor: Tensor) -> list[Tensor]:
    """The masks of one tensor as (1, H, W) float32 in 0..1, copied, outside inference mode."""
    if tensor.ndim not in (2, 3) or not tensor.is_floating_point():
        raise ValueError(f"mask is {tuple(tensor.shape)} {tensor.dtype}; expected a float (H, W) or (B, H, W).")
    if not tensor.isfinite().all() or tensor.numel() and (tensor.min() < -0.5 or tensor.max() > 1.5):
        raise ValueError("mask values are not finite or far outside 0..1; expected 0..1, 1 where the image counts.")
    batch = tensor[None] if tensor.ndim == 2 else tensor
    with torch.inference_mode(False):
        return [mask[None].to("cpu", torch.float32).clamp(0, 1).clone() for mask in batch]


def _one_each(captions: Sequence[str], count: int) -> list[str]:
    if not count:
        raise ValueError("there are no images; expected at least one.")
    if len(captions) not in (1, count):
        raise ValueError(
            f"there are {count_noun(len(captions), 'caption')} for {count_noun(count, 'image')}; expected one for all "
            "or one per image."
        )
    cleaned = [" ".join(caption.split()) for caption in captions] * (count if len(captions) == 1 else 1)
    empty = [i for i, caption in enumerate(cleaned, start=1) if not caption]
    if empty:
        raise ValueError(f"the caption of image {empty[0]} is empty; expected a text for each image.")
    return cleaned


def _targets(own: list[Size], resolution: int | None, buckets: bool) -> list[Size]:
    if resolution is None:
        for width, height in own:
            if min(width, height) < 8:
                raise ValueError(f"an image is {width} x {height}; expected at least 8 x 8 pixels.")
        return [(width // 8 * 8, height // 8 * 8) for width, height in own]
    check_multiple("resolution", resolution)
    sizes = make_buckets(resolution) if buckets else ((resolution, resolution),)
    return [bucket_for(*size, sizes) for size in own]
