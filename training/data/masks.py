"""Masks: weights of the loss per pixel, from an image's transparency or from a separate picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import Tensor

from ..common.foreign import is_file
from .images import decode_alpha, decode_image, read_unchanged
from .picture_files import endings

LABEL = "-masklabel.png"
"""Ending of OneTrainer's mask files: they are next to the image and begin with its stem."""
LABELS = (LABEL, "-condlabel.png")
"""Endings of OneTrainer's pictures about an image, which are no images themselves; the second is for ControlNets."""
MASK_FOLDER = "masks"
"""Sub-folder with masks of the images' stems; sd-scripts too reads masks from a separate folder."""


@dataclass(frozen=True)
class Mask:
    """Weights of an image's loss per pixel: white or opaque is 1, black or transparent is 0."""

    key: str
    """Content hash of the file."""
    alpha: bool = False
    """Whether the weights are the alpha channel of `source`; otherwise its first channel, as in sd-scripts."""
    source: Path | Tensor = field(compare=False, repr=False, kw_only=True)
    """A picture file, or float (1, H, W) values in 0..1."""

    def pixels(self) -> Tensor:
        """The mask (1, H, W) in 0..1 at its original size.

        Raises:
            ImageError: The file is missing, damaged, or has changed since the data set was made.
        """
        if isinstance(self.source, Tensor):
            return self.source
        data = read_unchanged(self.source, self.key)
        return decode_alpha(data, self.source) if self.alpha else decode_image(data, self.source)[:1]


def is_label_file(name: str) -> bool:
    """Whether a file's name says that it is about an image rather than one, as OneTrainer names its masks."""
    return name.lower().endswith(LABELS)


def is_mask_file(name: str) -> bool:
    """Whether a relative posix path names a mask rather than an image."""
    return is_label_file(name) or MASK_FOLDER in PurePosixPath(name).parent.parts


def mask_file(image: Path) -> Path | None:
    """The mask file of an image: `<stem>-masklabel.png` next to it, else `masks/<stem>.<any image suffix>`."""
    labels = [image.with_name(image.stem + ending) for ending in (LABEL, LABEL.replace("png", "PNG"), LABEL.upper())]
    folder = image.parent / MASK_FOLDER
    in_folder = [folder / (image.stem + ending) for ending in (image.suffix, *endings())] if folder.is_dir() else []
    return next(filter(is_file, [*labels, *in_folder]), None)
