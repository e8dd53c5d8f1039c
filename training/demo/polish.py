"""A judge beside judge.py: measures the polish of a picture from its pixels.

The demo's aesthetic head was trained to predict the polish. This program has no gradient that a reward tuning could
exploit, so it measures independently what tuning for the head does to pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from .judge import fit_background
from .scenes import VIGNETTE

DARKEST = 0.15
"""Mean of a background's colour below which its vignette cannot be measured."""


def polish(image: Tensor | np.ndarray) -> float:
    """The polish of an image (3, 128, 128) in 0..1: 0 (flat) to 1, or NaN on a background that is too dark.

    Read from the vignette that `scenes.draw` paints: background = colour (1 - VIGNETTE x polish x d), with d from 0 in
    the centre to 1 in the corners, solved for the polish by least squares over the channels.
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
    """Mean polish of the images that have one; NaN where none has."""
    values = [value for value in map(polish, images) if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan
