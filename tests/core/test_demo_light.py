"""The style that the demo model does not know, and the detector of it."""

import pytest
import torch
from retune.training.build import ModelConfig, build_model
from retune.training.demo.judge import alignment
from retune.training.demo.light import LIT_FROM_BELOW, light_slope, lit_from_below
from retune.training.demo.scenes import Scene, demo_examples, draw
from retune.training.generators import generator

SCENE = {"shape": "circle", "colour": "red", "size": "large", "count": 1, "position": "centre", "background": "white"}


def test_slope_is_that_of_the_shading():
    """Without highlights, front * (1 - 0.28 p (u + v)) has a slope of -0.28 p front's mean per radius."""
    disc = torch.zeros(3, 128, 128) + 0.95
    rows, columns = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    u, v = (columns - 64) / 20, (rows - 64) / 20
    inside = u**2 + v**2 < 1
    for towards in (1, -1):
        shaded = torch.tensor([0.5, 0.2, 0.2])[:, None, None] * (1 - towards * 0.2 * (u + v))
        slope = light_slope(torch.where(inside, shaded, disc))
        assert slope == pytest.approx(-towards * 0.2 * 0.3, abs=0.004)
    assert light_slope(torch.full((3, 128, 128), 0.5)) == 0


def test_the_look_reverses_the_light_and_nothing_else():
    scene = Scene(**SCENE, polish=0.9)
    above, below = (draw(scene, generator(0, "x"), light) for light in ("above", "below"))
    assert light_slope(above) < -LIT_FROM_BELOW < LIT_FROM_BELOW < light_slope(below)
    flat = Scene(**SCENE, polish=0.0)
    assert torch.equal(draw(flat, generator(0, "x"), "above"), draw(flat, generator(0, "x"), "below"))


def test_drawn_and_decoded_pictures_are_told_apart_and_stay_readable():
    autoencoder = build_model(ModelConfig(model="demo")).autoencoder
    plain, styled = demo_examples(40, 0), demo_examples(40, 0, "", "lit from below")
    assert plain[1] != [] and not any("glossy" in text or "flat" in text for text in styled[1])
    for (images, captions), share in ((plain, 0.0), (styled, 1.0)):
        with torch.no_grad():
            decoded = autoencoder.decode(autoencoder.encode(images))
        assert lit_from_below(images) == share
        assert lit_from_below(decoded) == pytest.approx(share, abs=0.05)
        assert alignment(decoded, captions)["alignment"] >= 0.9
    with pytest.raises(ValueError, match="look is 'dark'; expected one of plain, lit from below"):
        demo_examples(1, 0, "", "dark")
