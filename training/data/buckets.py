"""Aspect-ratio buckets: image sizes for batches, since all images of a batch need the same size.

NovelAI's bucketing as in kohya's sd-scripts: the buckets are all sizes on a grid of `step` pixels whose area is at most
resolution squared. An image goes to the bucket with the nearest aspect ratio, so that as little as possible is cropped.
"""

from __future__ import annotations

import math

from ..config.checks import check_multiple

Size = tuple[int, int]
"""(width, height) in pixels."""


def default_step(resolution: int) -> int:
    """Default grid in pixels: 64 for a resolution of 256 or more, below that a quarter of it (a multiple of 8)."""
    return max(8, min(64, resolution // 4 // 8 * 8))


def make_buckets(
    resolution: int, step: int | None = None, min_side: int | None = None, max_side: int | None = None
) -> tuple[Size, ...]:
    """All bucket sizes of a resolution: each width with its largest height, and each mirrored.

    Args:
        resolution: Square root of the largest area, in pixels.
        step: Sides are multiples of it; a multiple of 8. Default: `default_step(resolution)`.
        min_side: Smallest side; default half the resolution.
        max_side: Largest side; default twice the resolution.

    Returns:
        (width, height) pairs, sorted.

    Raises:
        ValueError: `step` is no multiple of 8, or the resolution is not within these limits.
    """
    step = default_step(resolution) if step is None else step
    min_side = resolution // 2 if min_side is None else min_side
    max_side = resolution * 2 if max_side is None else max_side
    check_multiple("step", step)
    if not step <= resolution or not min_side <= resolution <= max_side:
        raise ValueError(
            f"resolution is {resolution}; expected at least the step ({step}) and between min_side ({min_side}) "
            f"and max_side ({max_side})."
        )
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(math.ceil(max(min_side, 1) / step) * step, max_side + 1, step):
        height = min(max_side, resolution**2 // width) // step * step
        if height >= max(min_side, step):
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def target_sizes(resolution: int, buckets: bool) -> tuple[Size, ...]:
    """All buckets of a resolution, or without `buckets` only the square one."""
    return make_buckets(resolution) if buckets else ((resolution, resolution),)


def bucket_for(width: int, height: int, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose log aspect ratio is nearest to that of width x height; of equally near ones the largest."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1], size))
