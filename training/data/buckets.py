"""Aspect-ratio buckets: batches need one size, photographs come in many.

After NovelAI's bucketing as kohya's sd-scripts implement it: all sizes on a grid of `step` pixels whose area is at most
resolution squared; an image goes to the bucket of the nearest aspect ratio and is cut as little as possible.
"""

from __future__ import annotations

import math

from ..config.checks import check_multiple

Size = tuple[int, int]
"""(width, height) in pixels."""


def default_step(resolution: int) -> int:
    """Grid of the buckets in pixels: 64 from resolution 256 on, a quarter of the resolution (multiple of 8) below."""
    return max(8, min(64, resolution // 4 // 8 * 8))


def make_buckets(
    resolution: int, step: int | None = None, min_side: int | None = None, max_side: int | None = None
) -> tuple[Size, ...]:
    """All (width, height) with sides in min_side..max_side, multiples of `step`, and area <= resolution^2; sorted.

    Defaults: `default_step(resolution)`, half and twice the resolution. Each width gets its tallest height.
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


def bucket_for(width: int, height: int, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose log aspect ratio is nearest to width / height; of equally near ones the largest."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1], size))
