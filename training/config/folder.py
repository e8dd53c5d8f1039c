"""How a folder of images becomes a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .checks import check_fields, check_multiple
from .fields import setting

CAPTIONS = ("txt", "metadata.jsonl", "file name", "one caption")
ON_PROBLEM = ("skip", "stop")
CROPS = ("center", "random")
MASKS = ("none", "alpha", "files")


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """How a folder becomes a data set."""

    folder: Path | str
    """Searched with all sub-folders; hidden ones are left out. A sub-folder called `10_name` (1 to 3 digits) shows its
    images 10 times per epoch, as in kohya's layout."""
    resolution: int = setting(512, step=8)
    """Images are resized to an area of at most resolution x resolution pixels; a multiple of 8."""
    captions: Literal[CAPTIONS] = setting("txt")  # type: ignore[valid-type]
    """Where captions come from: a .txt or .caption file next to each image, one metadata.jsonl (file_name, text), the
    file's name, or one caption for all."""
    caption: str = setting("")
    """The caption for 'one caption'."""
    repeats: int = setting(1, low=1)
    """Times each image is shown per epoch, on top of kohya's 10_name folders."""
    buckets: bool = setting(True, advanced=True)
    """Keep aspect ratios (batches hold one size each); off cuts every image to a square."""
    crop: Literal[CROPS] = setting("center", advanced=True)  # type: ignore[valid-type]
    """Which part of an image that is too long on one side; random is drawn anew each time and cannot be cached."""
    flip: bool = setting(False)
    """Mirror a random half of the images, drawn anew each time."""
    on_bad_image: Literal[ON_PROBLEM] = setting("skip", advanced=True)  # type: ignore[valid-type]
    """Leave unreadable images out and count them in the report, or stop with an error."""
    on_missing_caption: Literal[ON_PROBLEM] = setting("stop", advanced=True)  # type: ignore[valid-type]
    """Stop and name images without a caption, or leave them out and count them."""
    masks: Literal[MASKS] = setting("none", advanced=True)  # type: ignore[valid-type]
    """Which part of an image counts: all of it, where it is opaque, or where a picture called name-masklabel.png, or of
    the same name in a sub-folder 'masks', is white. Images without a mask count whole."""
    weight: float = setting(1.0, low=0, high=1000, step=0.05, advanced=True)
    """Factor of these images' loss; for regularisation images that should count less."""
    trigger_word: str = setting("")
    """Put in front of every caption that lacks it, and the whole caption of an image without one; no file is changed.
    """

    def __post_init__(self):
        check_multiple("resolution", self.resolution)
        check_fields(self)
        if self.captions == "one caption" and not self.caption.strip():
            raise ValueError('caption is empty; expected a text. "one caption" gives it to every image.')
