"""Data sets: captioned images, each with the size it is trained at. Pixels are read on demand."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .images import content_key, decode_image, read_unchanged, resize_and_crop
from .masks import Mask

__all__ = ["Dataset", "Example", "Mask", "content_key", "tensor_key"]


def tensor_key(image: Tensor) -> str:
    """Content key (32 hex digits) of a tensor's shape and float32 values."""
    pixels = image.detach().to("cpu", torch.float32).contiguous()
    return content_key(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes())


@dataclass(frozen=True)
class Example:
    """One captioned image and the size it is trained at."""

    key: str
    """Content hash of the file's bytes or of the tensor, 32 hex digits."""
    caption: str
    width: int
    """Target (bucket) width in pixels."""
    height: int
    source: Path | Tensor = field(compare=False, repr=False)
    """The image file, or float (3, H, W) pixels in 0..1."""
    name: str
    """Path relative to the folder, for reports."""
    repeats: int = 1
    """How often this image appears in an epoch, multiplied by the data set's repeats."""
    weight: float = 1.0
    """Factor of this image's loss."""
    mask: Mask | None = None
    """Weights of the loss per pixel; None: 1 everywhere."""
    is_regularisation: bool = False
    """Whether it is a regularisation image, which is never held out for validation."""

    def load(self, *, flip: bool = False, crop: str = "center", generator: torch.Generator | None = None) -> Tensor:
        """The image at its target size, (3, height, width) in 0..1; arguments as `resize_and_crop`.

        Raises:
            ImageError: The file is missing, damaged, or has changed since the data set was made.
        """
        return resize_and_crop(self.pixels(), self.width, self.height, crop, generator, flip)

    def load_mask(
        self, *, flip: bool = False, crop: str = "center", generator: torch.Generator | None = None
    ) -> Tensor | None:
        """The mask (1, height, width) in 0..1, resized, cropped and mirrored like the image in `load`, or None."""
        if self.mask is None:
            return None
        return resize_and_crop(self.mask.pixels(), self.width, self.height, crop, generator, flip)

    def pixels(self) -> Tensor:
        """The image (3, H, W) in 0..1 at its original size."""
        if isinstance(self.source, Tensor):
            return self.source
        return decode_image(read_unchanged(self.source, self.key), self.source)


@dataclass(frozen=True)
class Dataset:
    """Examples, and how to crop, mirror and repeat them. `len` is the number of images in an epoch, with repeats."""

    examples: tuple[Example, ...]
    crop: str = "center"
    flip: bool = False
    """Mirror each image with probability 1/2."""
    repeats: int = 1
    report: str = field(default="", compare=False)
    """Text about counts, sizes, captions and skipped files."""

    def __len__(self) -> int:
        return self.repeats * sum(example.repeats for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """32 hex digits over everything that training uses: content, captions, sizes, order and options."""
        digest = hashlib.sha256(b"[[")
        for number, e in enumerate(self.examples):
            row = [e.key, e.caption, e.width, e.height, e.repeats, *_non_default_fields(e)]
            digest.update(f"{', ' if number else ''}{json.dumps(row)}".encode())
        digest.update(f"], {json.dumps([self.crop, self.flip, self.repeats])[1:]}".encode())
        return digest.hexdigest()[:32]

    @property
    def captions(self) -> list[str]:
        """Every distinct caption, in order of first appearance."""
        return list(dict.fromkeys(example.caption for example in self.examples))

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the image with the most pixels."""
        return max(((example.width, example.height) for example in self.examples), key=math.prod)


def _non_default_fields(example: Example) -> list:
    """Weight, mask and regularisation; empty for their defaults, so that fingerprints from before them stay valid."""
    mask = [example.mask.key, example.mask.alpha] if example.mask else None
    fields = [example.weight, mask, example.is_regularisation]
    return [] if fields == [1.0, None, False] else fields
