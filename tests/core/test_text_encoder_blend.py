"""Weighted sums of weights, encodings and projections against closed forms."""

import logging

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.models.protocols import Conditioning
from retune.training.text_encoder.blend import (
    blend_conditioning,
    blend_projections,
    expect_same_shapes,
    extend_context,
    parse_weights,
    renormalised_weights,
    weighted_sum,
)
from retune.training.text_encoder.projection import Projection


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "blend test"))


def test_weights_are_parsed_and_a_sum_other_than_one_is_logged(caplog):
    assert parse_weights("0.4, 0.6", 2) == [0.4, 0.6] and parse_weights(" .1;.2\n 0.7 ", 3) == [0.1, 0.2, 0.7]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert parse_weights("-0.5 1", 2) == [-0.5, 1.0]
    assert "sum to 0.5" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "has 1 numbers .*expected 2"),
        ("1, x", "expected numbers"),
        ("nan, 1", "numbers"),
        ("0, 0", "other than 0"),
    ],
)
def test_weights_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(text, 2)


def test_a_mix_is_the_weighted_sum_and_exact_where_there_is_nothing_to_mix():
    tensors = [drawn(3, 4, seed=seed) for seed in range(3)]
    expected = sum(w * t.double() for w, t in zip((0.2, 0.5, -0.1), tensors, strict=True))
    torch.testing.assert_close(weighted_sum([0.2, 0.5, -0.1], tensors), expected.float(), atol=1e-6, rtol=0)
    hollow = torch.full((3, 4), float("nan"))
    assert torch.equal(weighted_sum([0.0, 1.0], [hollow, tensors[1]]), tensors[1])
    thirds = [0.1, 0.7, 0.2]  # their products with one number do not sum to it bit for bit
    assert torch.equal(weighted_sum(thirds, [tensors[0]] * 3), tensors[0])
    assert weighted_sum([0.5, 0.5], [tensors[0].half(), tensors[1].half()]).dtype == torch.float32


def test_holders_of_a_part_share_it():
    assert renormalised_weights([0.4, 0.6], [True, True]) == [0.4, 0.6]
    assert renormalised_weights([0.4, 0.6], [True, False]) == [1.0, 0.0]
    assert renormalised_weights([0.3, 0.3, 0.4], [True, True, False]) == [0.5, 0.5, 0.0]
    assert renormalised_weights([0.0, 1.0], [True, False]) is None


def test_the_first_difference_is_named():
    one = {"a": (2, 3), "b": (4,)}
    expect_same_shapes(one, dict(one), 2)
    with pytest.raises(ValueError, match="text encoder 3 has 5 for b, text encoder 1 has 4"):
        expect_same_shapes(one, one | {"b": (5,)}, 3)
    with pytest.raises(ValueError, match="nothing for a"):
        expect_same_shapes(one, {"b": (4,)}, 2)


def test_encodings_blend_in_context_and_pooled():
    a, b = (Conditioning(drawn(1, 4, 6, seed=s), drawn(1, 5, seed=s + 9)) for s in (1, 2))
    found = blend_conditioning([0.25, 0.75], [a, b])
    torch.testing.assert_close(found.context, 0.25 * a.context + 0.75 * b.context)
    torch.testing.assert_close(found.pooled, 0.25 * a.pooled + 0.75 * b.pooled)
    for weights, same in (([1, 0], a), ([0, 1], b)):
        found = blend_conditioning(weights, [a, b])
        assert torch.equal(found.context, same.context) and torch.equal(found.pooled, same.pooled)
    without = Conditioning(b.context)
    assert torch.equal(blend_conditioning([0.4, 0.6], [a, without]).pooled, a.pooled)
    assert blend_conditioning([0.4, 0.6], [without, without]).pooled is None
    with pytest.raises(ValueError, match="context: batch x width is 1 x 6, 1 x 7"):
        blend_conditioning([0.5, 0.5], [a, Conditioning(drawn(1, 4, 7))])


def test_attention_to_a_repeated_context_is_the_same_and_others_end_with_their_last_token():
    context, queries = drawn(1, 7, 8), drawn(1, 5, 8, seed=1)
    attend = torch.nn.functional.scaled_dot_product_attention
    longer = extend_context(context, 21)
    torch.testing.assert_close(attend(queries, longer, longer), attend(queries, context, context))
    found = extend_context(context, 9)
    assert torch.equal(found[:, :7], context) and torch.equal(found[0, 7:], context[0, -1].expand(2, 8))
    short, long = Conditioning(context), Conditioning(drawn(1, 21, 8, seed=2))
    assert torch.equal(blend_conditioning([1, 0], [short, long]).context, context)  # and not lengthened
    assert torch.equal(blend_conditioning([0.5, 0.5], [short, long]).context, 0.5 * longer + 0.5 * long.context)


@pytest.mark.parametrize("kind", ["orthogonal", "mlp", "resampler"])
def test_projections_blend_with_their_scales(kind):
    options = {"tokens": 5, "layers": 1} if kind == "resampler" else {}
    one, two = (Projection(16, 64, kind, seed=s, pooled_width=6, **options).scaled(2.0 + s) for s in (0, 1))
    states = drawn(1, 3, 16)
    torch.testing.assert_close(blend_projections([1.0, 0.0], [one, two])(states), one(states))
    blend = blend_projections([0.3, 0.7], [one, two])
    torch.testing.assert_close(blend.pooled.weight, 0.3 * one.pooled.weight + 0.7 * two.pooled.weight)
    if kind != "resampler":  # linear in its output weights, and mlp's output starts at 0
        torch.testing.assert_close(blend(states), 0.3 * one(states) + 0.7 * two(states))
    with pytest.raises(ValueError, match="projection of text encoder 2"):
        blend_projections([0.5, 0.5], [one, Projection(16, 32)])
