"""The style that the demo model does not know, and the detector of it."""

import pytest
import torch
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.rng import generator
from retune.training.demo.judge import alignment
from retune.training.demo.scenes import WARM, Scene, demo_examples, draw, warm_edges
from retune.training.demo.warmth import WARM_EDGES, warmth, with_warm_edges

SCENE = {"shape": "circle", "colour": "red", "size": "large", "count": 1, "position": "centre", "background": "white"}


def test_warmth_is_worked_out_from_the_corners_and_a_vignette_has_none():
    grey = torch.full((3, 128, 128), 0.5)
    corner = 0.6 * 0.5 + 0.4 * torch.tensor(WARM)
    rest = corner - corner.mean()
    assert warmth(warm_edges(grey)) == pytest.approx((rest[0] - rest[2]).item(), abs=0.01)
    assert warmth(draw(Scene(**SCENE, polish=1.0), generator(0, "x"))) == pytest.approx(0, abs=0.01)
    assert warmth(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))) == 0


def test_the_look_changes_the_edges_and_no_caption():
    plain, styled = demo_examples(12, 3), demo_examples(12, 3, "", "warm edges")
    assert plain[1] == styled[1]
    assert torch.allclose(plain[0][:, :, 62:66, 62:66], styled[0][:, :, 62:66, 62:66], atol=0.01)
    assert (plain[0] - styled[0])[:, :, 0, 0].abs().max() > 0.2
    with pytest.raises(ValueError, match="look is 'dark'; expected one of plain, warm edges"):
        demo_examples(1, 0, "", "dark")


@pytest.mark.slow
def test_drawn_and_decoded_pictures_are_told_apart_and_stay_readable():
    autoencoder = build_model(ModelConfig(model="demo")).autoencoder
    for look, share, least in (("plain", 0.0, 0.9), ("warm edges", 1.0, 0.85)):
        images, captions = demo_examples(40, 0, "", look)
        with torch.no_grad():
            decoded = autoencoder.decode(autoencoder.encode(images))
        assert with_warm_edges(images) == share and abs(with_warm_edges(decoded) - share) < 0.03
        assert alignment(decoded, captions)["alignment"] >= least
        assert look != "plain" or max(map(warmth, decoded)) < WARM_EDGES - 0.02
