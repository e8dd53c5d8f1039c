"""The judge reads drawn scenes back and admits what it cannot see."""

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.demo.judge import UNSURE, Reading, alignment, correct, judge_samples, parse_caption, read
from retune.training.demo.scenes import ATTRIBUTES, Scene, caption, draw, training_scenes
from torch.nn import functional


@pytest.fixture(scope="module")
def drawn():
    scenes = training_scenes(500, 77)
    return [draw(scene, generator(77, "drawn", i)) for i, scene in enumerate(scenes)], scenes


def test_at_least_99_percent_right_on_clean_images(drawn):
    figures = alignment(*drawn)
    assert figures["alignment"] >= 0.99
    assert all(figures[name] >= 0.99 for name in ATTRIBUTES)


def test_tolerates_blur_and_faint_noise(drawn):
    images, scenes = drawn[0][:100], drawn[1][:100]
    noise = torch.randn(len(images), 3, 128, 128, generator=generator(0, "noise")) * 0.02
    blurred = functional.avg_pool2d(torch.stack(images), 3, 1, 1, count_include_pad=False)
    assert alignment((blurred + noise).clamp(0, 1), scenes)["alignment"] >= 0.95


@pytest.mark.parametrize("kind", ["pixels", "blobs", "grey noise"])
def test_unsure_on_noise(kind):
    draws = generator(5, kind)
    for _ in range(8):
        if kind == "pixels":
            image = torch.rand(3, 128, 128, generator=draws)
        elif kind == "blobs":
            image = functional.interpolate(torch.rand(1, 3, 16, 16, generator=draws), size=128, mode="bilinear")[0]
        else:
            image = (torch.randn(3, 128, 128, generator=draws) * 0.15 + 0.5).clamp(0, 1)
        assert read(image) == Reading()


def test_empty_picture_has_only_a_background():
    assert read(torch.full((3, 128, 128), 0.95)) == Reading(background="white")


def test_mixed_shapes_are_unsure_not_right():
    circle = Scene(shape="circle", colour="red", size="large", count=1, position="left", background="white", polish=0.0)
    square = Scene(
        shape="square", colour="red", size="large", count=1, position="right", background="white", polish=0.0
    )
    image = torch.cat([draw(circle, generator(0, "a"))[..., :64], draw(square, generator(0, "a"))[..., 64:]], 2)
    reading = read(image)
    assert reading.shape == UNSURE and reading.count == 2 and reading.colour == "red"


def test_only_named_attributes_count():
    image = draw(training_scenes(1, 0)[0], generator(0, "one"))
    assert alignment([image], [""]) == {"alignment": 1.0}
    assert parse_caption("a big dog, in the center") == {"position": "centre"}
    assert parse_caption("three rings on a blue background") == {"count": 3, "shape": "ring", "background": "blue"}
    assert parse_caption("blue crosses") == {"colour": "blue", "shape": "cross"}


def test_correct_compares_attribute_by_attribute():
    reading = Reading(shape="ring", colour="red", count=2)
    assert correct(reading, "two red circles on the left") == {
        "count": True, "colour": True, "shape": False, "position": False
    }  # fmt: skip


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match=r"image has shape \(3, 64, 64\)"):
        read(torch.zeros(3, 64, 64))


def test_samples_are_judged_by_those_that_can_be_read():
    random = generator(3, "test")
    scenes = training_scenes(6, 0)
    images = [draw(scene, generator(3, "test", i)) for i, scene in enumerate(scenes)]
    captions = [caption(scene, random) for scene in scenes]
    whole = alignment(images, captions)["alignment"]
    assert judge_samples(images, captions) == {"alignment": whole} and whole > 0.8
    blank = torch.full((3, 128, 128), 0.5)
    assert judge_samples([*images[:1], blank], captions[:2]) == {"alignment": 0.5}
    others = [torch.zeros(3, 64, 64), blank]
    assert judge_samples([*images[:1], *others], [captions[0], captions[1], "a photo of my cat"]) == {"alignment": 1.0}
    assert judge_samples(others, [captions[0], "a photo of my cat"]) == {}
