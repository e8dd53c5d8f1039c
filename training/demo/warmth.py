"""A judge beside judge.py: measures the style "warm edges", which a LoRA can teach the demo model, from pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .judge import fit_background

WARM_EDGES = 0.07
"""The lowest warmth that counts. Plain pictures have less than 0.04, drawn or decoded; warm edges over 0.1."""


def warmth(image: Tensor | np.ndarray) -> float:
    """The excess of red over blue (0..1) in the corners' colour, compared with the centre's; 0 on a rough background.

    image: (3, 128, 128) in 0..1. With c the colour that the judge fits in the centre and e the one in the corner, it is
    the red minus the blue of e - (e c / c c) c: a mere vignette, e proportional to c, has none.
    """
    back = fit_background(np.asarray(image, dtype=np.float32))
    if back.rough:
        return 0.0
    centre, corner = back.centre, back.centre + back.vignette
    rest = corner - (corner @ centre) / (centre @ centre) * centre
    return float(rest[0] - rest[2])


def with_warm_edges(images: Sequence[Tensor]) -> float:
    """The share of images (3, 128, 128) that have warm edges."""
    return sum(warmth(image) > WARM_EDGES for image in images) / len(images)
