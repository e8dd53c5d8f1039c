"""Which part of a training image counts: its transparency, or a picture that is white there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import Tensor

from .images import EXTENSIONS, decode_alpha, decode_image, read_unchanged

LABEL = "-masklabel.png"
"""OneTrainer's name of a mask: the image's stem, then this, beside the image."""
MASK_FOLDER = "masks"
"""Sub-folder beside the images that holds masks of the same stem; in sd-scripts too they have a folder of their own."""


@dataclass(frozen=True)
class Mask:
    """Where an image counts: white or opaque is 1, black or transparent 0, in between in proportion."""

    key: str
    """Content hash of the file."""
    alpha: bool = False
    """Whether it is the transparency of `source` rather than its first channel (red, or grey), as in sd-scripts."""
    source: Path | Tensor = field(compare=False, repr=False, kw_only=True)
    """A picture file, or float (1, H, W) values in 0..1."""

    def pixels(self) -> Tensor:
        """(1, H, W) in 0..1 at its own size. Raises ImageError when the file is gone, broken or changed."""
        if isinstance(self.source, Tensor):
            return self.source
        data = read_unchanged(self.source, self.key)
        return decode_alpha(data, self.source) if self.alpha else decode_image(data, self.source)[:1]


def is_mask_file(name: str) -> bool:
    """Whether a relative posix path names a mask rather than an image."""
    return name.lower().endswith(LABEL) or MASK_FOLDER in PurePosixPath(name).parent.parts


def mask_file(image: Path) -> Path | None:
    """The mask of an image file: `<stem>-masklabel.png` beside it, else `masks/<stem>` with any picture's ending."""
    label = image.with_name(image.stem + LABEL)
    if label.is_file():
        return label
    folder = image.parent / MASK_FOLDER
    found = (folder / (image.stem + ending) for ending in (image.suffix, *EXTENSIONS))
    return next((path for path in found if path.is_file()), None)
