"""The polish of a picture, read back from its pixels: what the demo's aesthetic head was trained to guess.

A program that no gradient goes through, and so an honest judge of what tuning for the head has done to pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from .judge import fit_background
from .scenes import VIGNETTE

DARKEST = 0.15
"""Mean of a background's colour below which its vignette cannot be seen."""


def polish(image: Tensor | np.ndarray) -> float:
    """By the vignette, which `scenes.draw` makes of it: 0 (flat) to 1, of one image (3, 128, 128) in 0..1.

    background = colour (1 - VIGNETTE x polish x d), d from 0 in the centre to 1 in the corners: least squares over the
    channels. NaN on a background too dark to tell.
    """
    pixels = np.asarray(image, dtype=np.float64)
    back, _ = fit_background(pixels)
    middle = tuple(side // 2 for side in back.shape[1:])
    colour, corner = back[:, middle[0], middle[1]], back[:, 0, 0]
    if colour.mean() < DARKEST:
        return math.nan
    share = float((colour - corner) @ colour / (colour @ colour))
    return min(max(share / VIGNETTE, 0.0), 1.0)


def mean_polish(images: Iterable[Tensor]) -> float:
    """Over the images whose polish can be told; NaN when it is of none."""
    found = [value for value in map(polish, images) if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan
