"""The picture of how large a text encoder's tokens are: bins by hand, the right colours at the right places."""

import math

import pytest
import torch
from retune.training.plots.canvas import log_ticks
from retune.training.plots.token_histogram import (
    BINS,
    COLOURS,
    HEIGHT,
    PLOT,
    WIDTH,
    Distribution,
    limits,
    shares,
    token_histogram,
)


def distribution(*rms, std=None):
    return Distribution(rms, std or rms[0], (min(rms), rms[0], max(rms)))


def solid(image, colour):
    """(H, W) bool: pixels of a colour inside the plot."""
    rgb = torch.tensor([int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)])
    left, top, right, bottom = PLOT
    return ((image * 255).round() == rgb).all(-1)[top:bottom, left:right]


def test_shares_are_counted_in_equal_steps_of_the_logarithm():
    step = (100 / 1) ** (1 / BINS)
    values = [1.01, 1.01, step**1.5, 99.0, 0.0]
    found = shares(values, 1.0, 100.0)
    assert len(found) == BINS and found[0] == 1.0 and found[1] == found[-1] == 0.5
    assert sum(found) == 2.0


def test_limits_hold_every_value_and_are_fourfold_apart():
    low, high = limits([distribution(0.2, 0.2)])
    assert high / low == pytest.approx(4) and math.sqrt(low * high) == pytest.approx(0.2)
    assert limits([distribution(0.1, 0.4, std=0.2), distribution(2.0)]) == pytest.approx((0.1 / 1.2, 2.4))
    assert limits([distribution(0.0, 0.3, std=0.3)])[0] > 0


@pytest.mark.parametrize("low, high, expected", [(0.15, 2.4, [0.2, 0.5, 1, 2]), (1e-6, 900, range(9))])
def test_ticks_are_round_and_few(low, high, expected):
    expected = [10.0 ** (n - 6) for n in expected] if isinstance(expected, range) else expected
    assert log_ticks(low, high) == pytest.approx(expected)


def test_larger_stands_further_right_and_each_at_its_place():
    one, other = distribution(*[0.2] * 50), distribution(*[0.8] * 50)
    image = token_histogram({"before": other, "after": one})
    assert image.shape == (HEIGHT, WIDTH, 3) and 0 <= image.min() and image.max() == 1
    low, high = limits([one, other])
    for name, value in (("before", 0.8), ("after", 0.2)):
        columns = solid(image, name).sum(0)  # the dashed line of the std is the highest column of its colour
        expected = math.log(value / low) / math.log(high / low) * (PLOT[2] - PLOT[0])
        assert abs(columns.argmax().item() - expected) <= (PLOT[2] - PLOT[0]) / BINS + 2
    assert not solid(image, "reference").any()


def test_an_even_encoder_is_narrow_and_an_uneven_one_broad():
    random = torch.Generator().manual_seed(0)
    broad = distribution(*torch.randn(400, generator=random).exp().tolist(), std=1.0)
    image = token_histogram({"after": distribution(*[1.0] * 400), "reference": broad})
    half = (PLOT[3] - PLOT[1]) // 2
    filled = [solid(image, name)[half:-3].any(0).sum().item() for name in ("after", "reference")]
    assert filled[1] > 4 * filled[0]


def test_other_names_are_refused():
    with pytest.raises(
        ValueError, match="statistics is middle; expected one or more of before, after, measured, reference"
    ):
        token_histogram({"middle": distribution(1.0)})
    with pytest.raises(ValueError, match="statistics is empty"):
        token_histogram({})
