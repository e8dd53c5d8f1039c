"""Aspect-ratio buckets."""

import math

import pytest
from retune.training.data.buckets import bucket_for, default_step, make_buckets


def kohya_buckets(resolution: int, min_size: int, max_size: int, divisible: int) -> set[tuple[int, int]]:
    """The published rule of sd-scripts' model_util.make_bucket_resolutions, restated as the reference."""
    square = int(math.sqrt(resolution**2) // divisible) * divisible
    found = {(square, square)}
    for width in range(min_size, max_size + 1, divisible):
        height = min(max_size, int((resolution**2 // width) // divisible) * divisible)
        if height >= min_size:
            found |= {(width, height), (height, width)}
    return found


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024])
def test_buckets_are_kohyas(resolution):
    expected = kohya_buckets(resolution, resolution // 2, resolution * 2, 64)
    assert set(make_buckets(resolution)) == expected and len(expected) > 4


@pytest.mark.parametrize("resolution", [64, 128, 200, 512, 1000])
def test_sides_area_and_symmetry(resolution):
    step = default_step(resolution)
    buckets = make_buckets(resolution)
    assert step % 8 == 0
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= resolution**2 and (height, width) in buckets
        assert resolution // 2 - step < min(width, height) and max(width, height) <= 2 * resolution
    assert list(buckets) == sorted(set(buckets))


def test_the_demo_resolution_has_its_square_and_wide_ones():
    buckets = make_buckets(128)
    assert (128, 128) in buckets and (256, 64) in buckets and (160, 96) in buckets


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((512, 512), (512, 512)), ((30, 30), (512, 512)), ((1920, 1080), (640, 384)), ((1080, 1920), (384, 640))],
)
def test_nearest_aspect(size, bucket):
    assert bucket_for(*size, make_buckets(512)) == bucket


def test_extreme_aspects_get_the_outermost_bucket():
    buckets = make_buckets(512)
    assert bucket_for(5000, 10, buckets) == max(buckets, key=lambda b: (b[0] / b[1], b[0]))
    assert bucket_for(10, 5000, buckets) == max(buckets, key=lambda b: (b[1] / b[0], b[1]))


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="step is 20; expected a positive multiple of 8. Use 16 or 24"):
        make_buckets(512, step=20)
    with pytest.raises(ValueError, match="resolution is 32"):
        make_buckets(32, step=64)
    with pytest.raises(ValueError, match="max_side"):
        make_buckets(512, max_side=256)
