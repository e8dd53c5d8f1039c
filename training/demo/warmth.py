"""Whether a picture has warm edges: the style that a LoRA can teach the demo model, told from pixels alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .judge import fit_background
from .scenes import SIDE

WARM_EDGES = 0.07
"""Least warmth that counts. Plain pictures have less than 0.04, drawn or decoded, those with warm edges over 0.1."""


def warmth(image: Tensor | np.ndarray) -> float:
    """How much more red than blue (0..1) the corners have than a lighter or darker centre would; 0 when unreadable.

    image: (3, 128, 128) in 0..1. The background's colours are those the judge fits. A vignette has no warmth: with c
    the centre's colour and e the corner's, it is the red minus the blue of e - (e c / c c) c.
    """
    back, rough = fit_background(np.asarray(image, dtype=np.float32))
    if rough:
        return 0.0
    centre, corner = back[:, SIDE // 2, SIDE // 2], back[:, 0, 0]
    rest = corner - (corner @ centre) / (centre @ centre) * centre
    return float(rest[0] - rest[2])


def with_warm_edges(images: Sequence[Tensor]) -> float:
    """Share of images that have warm edges."""
    return sum(warmth(image) > WARM_EDGES for image in images) / len(images)
