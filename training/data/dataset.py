"""Builds data sets from tensors, joins two, and splits one into training and validation."""

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
from .buckets import Size, bucket_for, target_sizes
from .captions import expect_caption
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
    """Builds a data set from image tensors.

    Args:
        images: Float tensors in 0..1, (H, W, C) or (C, H, W), or batches of them. C is 1, 3 or 4; transparent pixels
            are composited on white.
        captions: One for all or one per image.
        resolution: Images are resized to an area of about resolution squared, a multiple of 8. None: they keep their
            size, cropped to multiples of 8.
        buckets: Keep aspect ratios in buckets; otherwise images are cropped to squares. Ignored without a resolution.
        repeats: How often each image appears in an epoch.
        crop: "center" or "random".
        flip: Mirror each image with probability 1/2.
        names: Names for messages; default "image 1", "image 2", ...
        masks: Weights of the loss per pixel, floats in 0..1, (H, W) or batches (B, H, W), each of its image's size; one
            for all or one per image.

    Raises:
        ValueError: An argument has an unsuitable shape, range or number of elements.
    """
    pixels = [image for tensor in images for image in _channels_first(tensor)]
    captions = _caption_per_image(captions, len(pixels))
    names = [f"image {i}" for i in range(1, len(pixels) + 1)] if names is None else names
    if len(names) != len(pixels):
        raise ValueError(f"there are {len(names)} names and {len(pixels)} images; expected one name each.")
    if crop not in CROPS or repeats < 1:
        raise ValueError(f"crop is {crop!r} and repeats {repeats}; expected one of {', '.join(CROPS)} and at least 1.")
    sizes = [(image.shape[2], image.shape[1]) for image in pixels]
    targets = _sizes_for_training(sizes, resolution, buckets)
    image_masks = [None] * len(pixels) if masks is None else _mask_per_image(masks, sizes)
    rows = zip(pixels, captions, targets, names, image_masks, strict=True)
    examples = tuple(
        Example(tensor_key(image), text, *size, image, name, mask=mask) for image, text, size, name, mask in rows
    )
    dataset = Dataset(examples, crop, flip, repeats)
    notes = [] if masks is None else [f"masks: {len(image_masks)} of {count_noun(len(image_masks), 'image')}"]
    return replace(dataset, report=format_report(dataset, "given images", sizes, notes=notes))


def join_datasets(first: Dataset, second: Dataset, *, regularisation: bool = False) -> Dataset:
    """Joins two data sets; each keeps its repeats.

    Args:
        first: The first data set.
        second: The second one.
        regularisation: Use `second` as regularisation images, which preserve what the model can do (DreamBooth, arXiv
            2208.12242, section 3.2). An epoch then has exactly as many of them as of the first data set's images, as
            in sd-scripts (`DreamBoothDataset`): their repeats are scaled in proportion, and surplus images are left
            out, evenly over their order. They are not used for validation.

    Raises:
        ValueError: The two have different crop or flip, or one is empty.
    """
    for option in ("crop", "flip"):
        expected, value = getattr(first, option), getattr(second, option)
        if value != expected:
            raise ValueError(f"{option} of the second data set is {value}; expected {expected}, as in the first.")
    if not len(first) or not len(second):
        raise ValueError(f"the data sets show {len(first)} and {len(second)} images; expected at least one each.")
    added, title = _with_total_repeats(second), "more images"
    if regularisation:
        added, title = _balance_repeats(added, len(first)), "regularisation images"
    total_repeats = sum(example.repeats for example in added)
    counts = f"{len(added)} of {count_noun(len(second.examples), 'image')}, {total_repeats} shown per epoch"
    report = f"{first.report}\n\n{title}: {counts}\n{second.report}"
    return Dataset((*_with_total_repeats(first), *added), first.crop, first.flip, report=report)


def _with_total_repeats(dataset: Dataset) -> tuple[Example, ...]:
    """The examples, their repeats multiplied by the data set's."""
    return tuple(replace(example, repeats=example.repeats * dataset.repeats) for example in dataset.examples)


def _balance_repeats(examples: tuple[Example, ...], total_repeats: int) -> tuple[Example, ...]:
    """The examples as regularisation images, their repeats scaled so that they sum to `total_repeats`."""
    ends = itertools.accumulate(example.repeats for example in examples)
    total = sum(example.repeats for example in examples)
    ends = [end * total_repeats // total for end in ends]
    repeats = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(replace(e, repeats=n, is_regularisation=True) for e, n in zip(examples, repeats, strict=True) if n)


def split_validation(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits a data set into training and validation by the images' content.

    An image's side depends on its content and the seed, not on its name or the other images; equal images stay
    together. If one side would be empty, the image nearest to the limit changes sides. Regularisation images are never
    held out.

    Args:
        dataset: The data set.
        fraction: Approximate share of different images to hold out, 0 <= fraction < 1.
        seed: Seed of the split.

    Returns:
        (training, validation). The validation set has no repeats, center crops and no mirroring; with fraction 0 it is
        empty.

    Raises:
        ValueError: `fraction` is out of range, or there are fewer than two different images to split.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction is {fraction}; expected 0 <= fraction < 1.")
    if fraction == 0:
        return dataset, replace(dataset, examples=(), report="validation: none")
    scores = {
        example.key: _uniform_hash(example.key, seed) for example in dataset.examples if not example.is_regularisation
    }
    if len(scores) < 2:
        raise ValueError(
            f"the data set has {count_noun(len(scores), 'different image')}; expected at least 2 to hold some out for "
            "validation. Add images, or set the validation fraction to 0."
        )
    ranked = sorted(scores, key=lambda key: (scores[key], key))
    held_out = {key for key in ranked if scores[key] < fraction} or set(ranked[:1])
    held_out -= {ranked[-1]}
    return _select_side(dataset, held_out, True), _select_side(dataset, held_out, False)


def _select_side(dataset: Dataset, held_out: set[str], training: bool) -> Dataset:
    """The training or the validation part; `held_out` has the keys of the validation images."""
    examples = tuple(
        e for e in dataset.examples if (e.key in held_out) != training and (training or not e.is_regularisation)
    )
    report = f"{'training' if training else 'validation'}: {len(examples)} of {len(dataset.examples)} images"
    if training:
        return replace(dataset, examples=examples, report=report)
    once = tuple(replace(example, repeats=1) for example in examples)
    return replace(dataset, examples=once, crop="center", flip=False, repeats=1, report=report)


def _uniform_hash(key: str, seed: int) -> float:
    """A number in [0, 1), uniformly distributed over content keys."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:6], "big") / 2**48


def _channels_first(tensor: Tensor) -> list[Tensor]:
    """The images of a tensor as copies (3, H, W) in float32 and 0..1, made outside of inference mode."""
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


def _mask_per_image(masks: Sequence[Tensor], sizes: Sequence[Size]) -> list[Mask]:
    """One mask per image; ValueError for another number of masks or other sizes than the images'."""
    values = [mask for tensor in masks for mask in _mask_values(tensor)]
    if len(values) not in (1, len(sizes)):
        raise ValueError(
            f"there are {count_noun(len(values), 'mask')} for {count_noun(len(sizes), 'image')}; expected one for all "
            "or one per image."
        )
    values *= len(sizes) // len(values)
    _check_mask_sizes(values, sizes)
    if black := [number for number, mask in enumerate(values, start=1) if not mask.any()]:
        log.warning(
            "mask %d is black, so nothing of its image counts more. Invert a mask of what to leave out.", *black[:1]
        )
    return [Mask(tensor_key(mask), source=mask) for mask in values]


def _check_mask_sizes(masks: Sequence[Tensor], sizes: Sequence[Size]) -> None:
    for number, (mask, size) in enumerate(zip(masks, sizes, strict=True), start=1):
        width, height = mask.shape[2], mask.shape[1]
        if (width, height) != size:
            raise ValueError(
                f"mask {number} is {width} x {height}, its image {size[0]} x {size[1]}; expected the same size. Load "
                "Image gives a mask of 64 x 64 for a picture without transparency: leave that out."
            )


def _mask_values(tensor: Tensor) -> list[Tensor]:
    """The masks of a tensor as copies (1, H, W) in float32 and 0..1, made outside of inference mode."""
    if tensor.ndim not in (2, 3) or not tensor.is_floating_point():
        raise ValueError(f"mask is {tuple(tensor.shape)} {tensor.dtype}; expected a float (H, W) or (B, H, W).")
    if not tensor.isfinite().all() or tensor.numel() and (tensor.min() < -0.5 or tensor.max() > 1.5):
        raise ValueError("mask values are not finite or far outside 0..1; expected 0..1, 1 where the image counts.")
    batch = tensor[None] if tensor.ndim == 2 else tensor
    with torch.inference_mode(False):
        return [mask[None].to("cpu", torch.float32).clamp(0, 1).clone() for mask in batch]


def _caption_per_image(captions: Sequence[str], count: int) -> list[str]:
    """One caption per image, spaces cleaned up; ValueError for another number of captions or an empty one."""
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
    return [expect_caption(caption, f"the caption of image {i}") for i, caption in enumerate(cleaned, start=1)]


def _sizes_for_training(sizes: list[Size], resolution: int | None, buckets: bool) -> list[Size]:
    """The size each image is trained at."""
    if resolution is None:
        for width, height in sizes:
            if min(width, height) < 8:
                raise ValueError(f"an image is {width} x {height}; expected at least 8 x 8 pixels.")
        return [(width // 8 * 8, height // 8 * 8) for width, height in sizes]
    check_multiple("resolution", resolution)
    targets = target_sizes(resolution, buckets)
    return [bucket_for(*size, targets) for size in sizes]
