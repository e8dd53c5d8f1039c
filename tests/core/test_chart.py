"""Charts: smoothing by its closed form, ticks, and a picture with the curves where they belong."""

import pytest
import torch
from retune.training.plots import score_histogram as scores_chart
from retune.training.plots.canvas import ticks
from retune.training.plots.run_chart import BANDS, COLOURS, HEIGHT, PANEL, WIDTH, limits, run_chart, smoothed


def painted(image, colour):
    """(H, W) bool: pixels of a colour."""
    colour = COLOURS.get(colour, colour)
    rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return ((image * 255).round() == rgb).all(-1)


def rows(losses, validation=()):
    steps = [{"step": step, "loss": loss, "learning_rate": 1e-4} for step, loss in enumerate(losses, 1)]
    return steps + [{"event": "validation", "step": step, "loss": loss} for step, loss in validation]


def test_smoothing_is_the_weighted_mean_of_all_values_so_far():
    values, weight = [3.0, 1.0, 4.0, 1.0, 5.0], 0.8
    for n, got in enumerate(smoothed(values, weight), 1):
        shares = [weight ** (n - i) for i in range(1, n + 1)]
        assert got == pytest.approx(sum(s * v for s, v in zip(shares, values, strict=False)) / sum(shares))
    assert smoothed([2.5] * 50) == pytest.approx([2.5] * 50)
    assert smoothed([]) == []


@pytest.mark.parametrize("low, high", [(0, 1), (0, 7), (0, 0.013), (0, 12345), (0, 1e-6)])
def test_ticks_are_few_round_numbers_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8 and found[0] == low and found[-1] <= high * (1 + 1e-6)
    step = found[1] - found[0]
    leading = float(f"{step:e}".split("e")[0])
    assert min(abs(leading - m) for m in (1, 2, 5)) < 1e-6
    assert [b - a for a, b in zip(found, found[1:], strict=False)] == pytest.approx([step] * (len(found) - 1))


def test_a_falling_loss_falls_in_the_picture():
    image = run_chart("my run", rows([1 / step for step in range(1, 101)]))
    assert image.shape == (HEIGHT, WIDTH, 3) and 0 <= image.min() and image.max() == 1
    curve = painted(image, "smoothed")[60:]  # below the legend
    columns = curve.any(0).nonzero().flatten()
    assert columns.max() - columns.min() > 0.8 * WIDTH
    height = [curve[:, c].nonzero().float().mean().item() for c in (columns.min() + 5, columns.max() - 5)]
    assert height[1] - height[0] > 0.4 * HEIGHT


def test_validation_is_drawn_only_when_there_is_some():
    losses = [1.0] * 20
    assert not painted(run_chart("r", rows(losses)), "validation").any()
    assert painted(run_chart("r", rows(losses, [(0, 0.9), (20, 0.5)])), "validation").any()


@pytest.mark.parametrize("given", [[], rows([0.5]), rows([0.0, 0.0]), rows([], [(0, 0.7)])])
def test_short_runs_give_axes(given):
    image = run_chart("r", given)
    assert image.shape == (HEIGHT, WIDTH, 3) and painted(image, "grid").any()


def test_one_wild_value_does_not_flatten_the_rest():
    steps = [(float(i), 1.0) for i in range(100)] + [(100.0, 500.0)]
    assert limits(steps, [(i, 1.2) for i in range(101)]).y == (0.0, pytest.approx(1.08 * 1.2))


def test_further_figures_of_validations_get_panels_below(tmp_path):
    losses = [1.0] * 20
    figures = [{"text_gap": gap, "bands": [0.1, 0.2, 0.3, 0.4, last]} for gap, last in ((0.0, 0.9), (0.5, 0.5))]
    given = rows(losses) + [
        {"event": "validation", "step": step, "loss": 0.5, **more} for step, more in zip((0, 20), figures, strict=True)
    ]
    image = run_chart("r", given)
    assert image.shape == (HEIGHT + PANEL, WIDTH, 3)
    plain = run_chart("r", rows(losses, [(0, 0.5), (20, 0.5)]))
    assert torch.equal(image[:HEIGHT], plain)
    gap, bands = painted(image, "text gap"), [painted(image, colour) for colour in BANDS]
    assert gap[:, : WIDTH // 2].any() and not gap[:, WIDTH // 2 :].any() and not gap[:HEIGHT].any()
    line = gap[HEIGHT + 24 :].nonzero()  # below the title
    first, last = line[line[:, 1].argmin(), 0], line[line[:, 1].argmax(), 0]
    assert first - last > 0.5 * (PANEL - 24 - 44)  # a growing gap goes up
    middle = [band[HEIGHT + 24 :].nonzero()[:, 0].float().mean().item() for band in bands]
    assert middle == sorted(middle, reverse=True)  # more error stands higher
    assert all(band[:, WIDTH // 2 :].any() and not band[:HEIGHT].any() for band in bands)


def test_equal_captions_leave_the_gap_panel_out():
    given = rows([1.0] * 5) + [{"event": "validation", "step": 5, "loss": 0.5, "bands": [0.1, 0.2, 0.3, 0.4, 0.5]}]
    image = run_chart("r", given)
    assert image.shape[0] == HEIGHT + PANEL and not painted(image, "text gap").any()
    assert all(painted(image, colour).any() for colour in BANDS)


def test_alignment_of_samples_has_a_panel_from_0_to_1():
    samples = [
        {"event": "sample", "step": step, "alignment": value} for step, value in ((0, 0.0), (10, 0.5), (20, 0.5))
    ]
    image = run_chart("r", rows([1.0] * 20) + samples)
    assert image.shape[0] == HEIGHT + PANEL
    line = painted(image, "alignment")[HEIGHT + 24 :].nonzero()
    first, last = line[line[:, 1].argmin(), 0].item(), line[line[:, 1].argmax(), 0].item()
    assert first - last == pytest.approx(0.5 / 1.08 * (PANEL - 24 - 44), abs=4)
    figures = {"text_gap": 0.5, "bands": [0.1, 0.2, 0.3, 0.4, 0.5]}
    whole = run_chart("r", rows([1.0] * 20) + [{"event": "validation", "step": 20, "loss": 0.5, **figures}, *samples])
    assert whole.shape[0] == HEIGHT + 2 * PANEL
    assert painted(whole, "alignment")[HEIGHT + PANEL :, : WIDTH // 2].any()
    assert not painted(whole, "alignment")[: HEIGHT + PANEL].any()


def test_a_reward_rises_in_the_picture_also_below_zero_with_a_panel_for_each_term():
    def reward_rows(start):
        values = [start + step / 20 for step in range(100)]
        return [
            {"step": n, "loss": -v, "reward": v, "good": v, "good normalised": v, "true": 0.5, "true normalised": 1.0}
            for n, v in enumerate(values, 1)
        ]

    for start in (-8.0, -1.0, 2.0):
        image = run_chart("tuned", reward_rows(start))
        assert image.shape == (HEIGHT + PANEL, WIDTH, 3)
        curve = painted(image, "smoothed")[60:HEIGHT]
        columns = curve.any(0).nonzero().flatten()
        assert columns.max() - columns.min() > 0.8 * WIDTH
        height = [curve[:, c].nonzero().float().mean().item() for c in (columns.min() + 5, columns.max() - 5)]
        assert height[0] - height[1] > 0.2 * HEIGHT
    low, high = limits([(1, -4.0), (2, -2.0)], [(1, -4.0), (2, -3.0)]).y
    assert low < -4 and high == 0.0


@pytest.mark.parametrize("values", [(20.0, 22.0), (-22.0, -20.0)])
def test_an_axis_of_scores_far_from_0_has_a_small_margin(values):
    steps = list(enumerate(values))
    low, high = limits(steps, steps, from_zero=False).y
    assert (low, high) == (pytest.approx(values[0] - 0.16), pytest.approx(values[1] + 0.16))
    assert 0.0 in limits(steps, steps).y and limits([(1, 20.0)], [(1, 20.0)], from_zero=False).y[0] == 0.0


def test_a_guard_shows_gains_and_diversity_with_its_floor():
    steps = [{"step": n, "loss": -n, "reward": n, "good": n, "good normalised": n} for n in range(1, 21)]
    checks = [
        {
            "event": "guard",
            "step": step,
            "gains": {"reward": step / 10, "true": -step / 20},
            "shares": {"diversity": 1 - step / 40},
            "held_out": ["true"],
            "floor": 0.8,
            "best_step": min(step, 5),
        }
        for step in (0, 5, 10, 15, 20)
    ]
    image = run_chart("guarded", steps + checks)
    assert image.shape[0] == HEIGHT + 2 * PANEL  # the term, then the two of the guard
    gains, shares = image[HEIGHT : HEIGHT + PANEL, WIDTH // 2 :], image[HEIGHT + PANEL :, : WIDTH // 2]
    for colour, rises in (("smoothed", True), (BANDS[0], False)):
        line = painted(gains, colour)[24:].nonzero()
        first, last = (line[line[:, 1] == column, 0].float().mean() for column in (line[:, 1].min(), line[:, 1].max()))
        assert (last < first) == rises
    floor, curve = (painted(shares, name)[24:].nonzero() for name in ("floor", "diversity"))
    height = floor[:, 0].float().mean().item()
    above = curve[curve[:, 0] < height - 1, 1].max() / curve[:, 1].max()
    assert floor[:, 0].max() - floor[:, 0].min() <= 2 and 0.3 < above < 0.6  # 0.8 is crossed at step 8 of 20
    assert torch.equal(run_chart("guarded", steps)[:HEIGHT], image[:HEIGHT])


def test_bars_are_as_high_as_their_counts_and_the_mean_is_dashed():
    image = scores_chart.score_histogram("a reward", [0.0] * 6 + [10.0] * 3, 10 / 3, 4.7)
    assert image.shape == (scores_chart.HEIGHT, scores_chart.WIDTH, 3)
    left, top, right, bottom = scores_chart.PLOT
    bars, mean = (painted(image, colour)[top:bottom, left:right] for colour in (scores_chart.BAR, scores_chart.MEAN))
    heights = bars.sum(0)
    first, last = heights[: len(heights) // 2].max().item(), heights[len(heights) // 2 :].max().item()
    assert first == pytest.approx(bottom - top, abs=2) and last == pytest.approx(first / 2, abs=2)
    low, high = scores_chart.limits([0.0, 10.0])
    columns = mean.any(0).nonzero().float()
    assert columns.mean().item() == pytest.approx((10 / 3 - low) / (high - low) * (right - left), abs=1)
    assert 0.4 < mean.any(1).float().mean() < 0.8  # dashes and gaps


@pytest.mark.parametrize("scores", [[1.0], [0.0, 0.0], [-3.0, -3.0]])
def test_equal_scores_have_an_axis_too(scores):
    low, high = scores_chart.limits(scores)
    assert low < scores[0] < high
    assert scores_chart.score_histogram("r", scores, scores[0], 0.0).max() == 1
