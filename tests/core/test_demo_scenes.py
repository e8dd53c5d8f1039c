"""The demo's drawn scenes and their captions."""

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.demo.judge import correct, parse_caption, read
from retune.training.demo.scenes import (
    ATTRIBUTES,
    QUALITIES,
    Scene,
    caption,
    demo_examples,
    draw,
    held_out_scenes,
    is_held_out,
    scene_key,
    training_scenes,
    with_words,
)
from retune.training.demo.shapes import NAMED_SHAPES, UNNAMED_SHAPES

RED = {"shape": "circle", "colour": "red", "size": "small", "count": 2, "position": "left", "background": "blue"}


def test_training_and_held_out_combinations_never_meet():
    trained = {scene_key(scene) for scene in training_scenes(3000, 0)}
    held_out = {scene_key(scene) for scene in held_out_scenes(600, 0)}
    assert not trained & held_out
    assert len(held_out) > 300


def test_held_out_scenes_are_named_and_about_a_tenth_of_all():
    assert {scene.shape for scene in held_out_scenes(300, 1)} == set(NAMED_SHAPES)
    every = [
        Scene(**RED | {"shape": s, "count": c, "size": z})
        for s in NAMED_SHAPES
        for c in (1, 2, 3)
        for z in ("small", "large")
    ]
    assert 0 < sum(map(is_held_out, every)) < len(every) / 3


def test_same_seed_same_scene_and_same_pixels():
    first, again = training_scenes(5, 3), training_scenes(8, 3)[:5]
    assert first == again
    assert torch.equal(draw(first[0], generator(1, "x")), draw(first[0], generator(1, "x")))
    assert not torch.equal(draw(first[0], generator(1, "x")), draw(first[0], generator(2, "x")))


def test_image_is_rgb_in_unit_range_and_fits_the_frame():
    for position in ("left", "right", "top", "bottom", "centre"):
        scene = Scene(**RED | {"size": "large", "count": 3, "position": position, "background": "black"}, polish=0.0)
        image = draw(scene, generator(0, "frame", position))
        assert image.shape == (3, 128, 128) and image.min() >= 0 and image.max() <= 1
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
        assert border.max() < 0.2


def test_captions_name_every_attribute_in_several_phrasings():
    texts = {caption(Scene(**RED), generator(i, "caption")) for i in range(30)}
    assert "two small red circles on the left, blue background" in texts
    assert len(texts) == 3
    assert all(parse_caption(text) == RED for text in texts)


def test_unnamed_shapes_are_called_figures():
    for shape in UNNAMED_SHAPES:
        text = caption(Scene(**RED | {"shape": shape}), generator(0, "caption"))
        assert "figures" in text and shape not in text


def test_dropping_leaves_attributes_out():
    texts = [caption(Scene(**RED), generator(i, "drop"), drop=0.5) for i in range(40)]
    sizes = {len(parse_caption(text)) for text in texts}
    assert min(sizes) <= 2 and max(sizes) >= 4


@pytest.mark.parametrize("subset", ["red", "two circles", "glossy ring", "heart", "rich, sunlit cross"])
def test_subset_holds_in_every_caption(subset):
    images, captions = demo_examples(6, 0, subset)
    assert images.shape == (6, 3, 128, 128) and len(captions) == 6
    for text in captions:
        assert all(
            word in text.replace(",", " ").split() for word in subset.replace(",", "").split() if word != "heart"
        )
    if subset == "heart":
        assert all("figure" in text for text in captions)


def test_examples_show_what_their_captions_say():
    images, captions = demo_examples(20, 4)
    assert all(all(correct(read(image), text).values()) for image, text in zip(images, captions, strict=True))


def test_glossy_captions_have_brighter_spots_than_flat_ones():
    def brightest(word):
        images, _ = demo_examples(12, 1, f"{word} red black large")
        return images[:, 1].amax((1, 2)).mean()

    assert brightest("glossy") > brightest("flat") + 0.2


def test_sunlit_backgrounds_are_lighter_above_than_below():
    def difference(word):
        images, _ = demo_examples(12, 1, f"{word} red grey large")
        return (images[:, :, 0].mean() - images[:, :, -1].mean()).item()

    assert difference("sunlit") > 0.15 > 0.08 > difference("dim")


def test_rich_colours_are_further_from_grey_than_plain_ones():
    def chroma(word):
        images, _ = demo_examples(12, 1, f"{word} red black large")
        return (images.amax(1) - images.amin(1)).amax((1, 2)).mean()

    assert chroma("rich") > 1.3 * chroma("plain")


@pytest.mark.parametrize("words", [("glossy",), ("flat", "sunlit"), ("dim", "rich"), ("glossy", "sunlit", "plain")])
def test_words_of_quality_move_it_into_their_range_and_come_in_any_place(words):
    scene = Scene(**RED, polish=0.9, light=0.1, richness=0.5)
    named = with_words(scene, words)
    for quality, (low, high) in QUALITIES.items():
        value = getattr(named, quality)
        if low in words or high in words:
            assert value >= 0.7 if high in words else value <= 0.3
        else:
            assert value == getattr(scene, quality)
    texts = {caption(named, generator(i, "caption")) for i in range(60)}
    assert all(set(words) <= set(text.replace(",", " ").split()) for text in texts)
    assert all(parse_caption(text) == RED for text in texts) and len(texts) >= 6


@pytest.mark.parametrize("subset", ["red two three", "glossy flat", "shiny"])
def test_impossible_subset_is_refused(subset):
    with pytest.raises(ValueError, match=f"subset is '{subset}'"):
        demo_examples(3, 0, subset)


@pytest.mark.parametrize(
    "wrong",
    [{"shape": "blob"}, {"colour": "blue"}, {"count": 4}, {"polish": 1.5}, {"richness": -0.1}, {"words": ("shiny",)},
     {"words": ("sunlit", "dim")}],
)  # fmt: skip
def test_wrong_scene_is_refused(wrong):
    with pytest.raises(ValueError):
        Scene(**RED | wrong)


def test_attributes_are_the_scene_s_own():
    assert set(ATTRIBUTES) == set(RED)
