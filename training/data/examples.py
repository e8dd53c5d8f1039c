"""What a data set is: captioned images with a target size each. Pixels are read only when asked for."""

from __future__ import annotations

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
    """`content_key` of a tensor's shape and float32 bytes."""
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
    """Path relative to the folder, for people to read."""
    repeats: int = 1
    """How often an epoch shows this image, on top of the data set's own repeats."""
    weight: float = 1.0
    """Factor of this image's loss."""
    mask: Mask | None = None
    """Where the image counts; None: everywhere."""
    is_regularisation: bool = False
    """Whether it keeps the model what it was rather than teaches: never held out for validation."""

    def load(self, *, flip: bool = False, crop: str = "center", generator: torch.Generator | None = None) -> Tensor:
        """Pixels (3, height, width) in 0..1, resized to cover the target size and cropped (`resize_and_crop`).

        Raises ImageError when the file is gone, broken, or is not the one the data set was made from.
        """
        return resize_and_crop(self.pixels(), self.width, self.height, crop, generator, flip)

    def load_mask(
        self, *, flip: bool = False, crop: str = "center", generator: torch.Generator | None = None
    ) -> Tensor | None:
        """The mask (1, height, width) in 0..1, resized, cropped and mirrored as `load` does; None without one."""
        if self.mask is None:
            return None
        return resize_and_crop(self.mask.pixels(), self.width, self.height, crop, generator, flip)

    def pixels(self) -> Tensor:
        """The whole image (3, H, W) in 0..1 at its own size."""
        if isinstance(self.source, Tensor):
            return self.source
        data = read_unchanged(self.source, self.key)
        return decode_image(data, self.source)


@dataclass(frozen=True)
class Dataset:
    """Examples and how they are shown. `len` counts what one epoch shows, repeats included."""

    examples: tuple[Example, ...]
    crop: str = "center"
    flip: bool = False
    """Mirror a random half of what is shown."""
    repeats: int = 1
    report: str = field(default="", compare=False)
    """For people: counts, sizes, captions, what was left out."""

    def __len__(self) -> int:
        return self.repeats * sum(example.repeats for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """32 hex digits over everything that training sees: content, captions, sizes, order and options."""
        rows = [[e.key, e.caption, e.width, e.height, e.repeats, *_rarely(e)] for e in self.examples]
        return content_key(json.dumps([rows, self.crop, self.flip, self.repeats]).encode())

    @property
    def captions(self) -> list[str]:
        """Every different caption once, in order of appearance."""
        return list(dict.fromkeys(example.caption for example in self.examples))

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the image with the most pixels."""
        return max(((example.width, example.height) for example in self.examples), key=math.prod)


def _rarely(example: Example) -> list:
    """What most images do not have, so that the fingerprint of those is not longer for it."""
    mask = [example.mask.key, example.mask.alpha] if example.mask else None
    rare = [example.weight, mask, example.is_regularisation]
    return [] if rare == [1.0, None, False] else rare
