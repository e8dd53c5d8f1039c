"""Data sets made of tensors, and the division into training and validation."""

import pytest
import torch
from retune.training.data.dataset import from_images, split_validation


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def numbered(count: int, start: int = 0):
    return from_images([image(i, 8, 8, 3) for i in range(start, start + count)], ["x"])


def test_channels_last_first_and_batches_are_the_same_image():
    last = image(0, 16, 24, 3)
    dataset = from_images([last, last.permute(2, 0, 1), last[None], last.permute(2, 0, 1)[None]], ["x"])
    assert len({e.key for e in dataset.examples}) == 1
    for example in dataset.examples:
        assert (example.width, example.height) == (24, 16)
        assert torch.equal(example.load(), last.permute(2, 0, 1))
    assert "duplicates: 1 image" in dataset.report


def test_batches_are_unrolled_with_one_caption_each():
    dataset = from_images([image(0, 2, 8, 8, 3), image(1, 8, 8, 3)], ["a", "b ", "c\nd"])
    assert [e.caption for e in dataset.examples] == ["a", "b", "c d"]
    assert dataset.captions == ["a", "b", "c d"]


def test_grey_and_alpha_channels():
    grey = from_images([torch.full((8, 8, 1), 0.3)], ["x"]).examples[0].load()
    assert torch.equal(grey, torch.full((3, 8, 8), 0.3))
    clear = from_images([torch.zeros(8, 8, 4)], ["x"]).examples[0].load()
    assert torch.equal(clear, torch.ones(3, 8, 8))


def test_own_size_is_cut_to_multiples_of_8_and_a_resolution_gives_buckets():
    wide = image(0, 70, 131, 3)
    (example,) = from_images([wide], ["x"]).examples
    assert (example.width, example.height) == (128, 64)
    (example,) = from_images([image(0, 1080, 1920, 3)], ["x"], 512).examples
    assert (example.width, example.height) == (640, 384)
    (example,) = from_images([wide], ["x"], 64, buckets=False).examples
    assert (example.width, example.height) == (64, 64)


def test_images_of_inference_mode_are_copied_out_of_it():
    with torch.inference_mode():
        source = torch.rand(8, 8, 3)
        (example,) = from_images([source], ["x"]).examples
    before = source.clone()
    assert not example.source.is_inference()
    example.source.zero_()
    assert torch.equal(source, before)


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([torch.zeros(8, 8, 3)] * 3, ["a", "b"], "2 captions for 3 images"),
        ([torch.zeros(8, 8, 3)], [], "0 captions for 1 image;"),
        ([], ["a"], "no images"),
        ([torch.zeros(8, 8, 3)] * 2, ["a", " "], "caption of image 2 is empty"),
        ([torch.zeros(8, 8, 5)], ["a"], "1, 3 or 4 channels"),
        ([torch.zeros(8, 8)], ["a"], "expected a float"),
        ([torch.zeros(8, 8, 3, dtype=torch.uint8)], ["a"], "expected a float"),
        ([torch.full((8, 8, 3), 255.0)], ["a"], "8-bit"),
        ([torch.full((8, 8, 3), float("nan"))], ["a"], "not finite"),
        ([torch.zeros(4, 8, 3)], ["a"], "at least 8 x 8"),
    ],
)
def test_bad_images_and_captions(images, captions, message):
    with pytest.raises(ValueError, match=message):
        from_images(images, captions)


def test_bad_options():
    with pytest.raises(ValueError, match="crop"):
        from_images([torch.zeros(8, 8, 3)], ["x"], crop="none")
    with pytest.raises(ValueError, match="repeats"):
        from_images([torch.zeros(8, 8, 3)], ["x"], repeats=0)
    with pytest.raises(ValueError, match="2 names and 1 images"):
        from_images([torch.zeros(8, 8, 3)], ["x"], names=["a", "b"])
    with pytest.raises(ValueError, match="resolution is 100"):
        from_images([torch.zeros(8, 8, 3)], ["x"], 100)


def test_validation_is_a_fraction_and_nothing_is_in_both():
    dataset = numbered(300)
    training, validation = split_validation(dataset, 0.2, seed=1)
    assert 40 < len(validation) < 80 and len(training) + len(validation) == 300
    assert not {e.key for e in training.examples} & {e.key for e in validation.examples}
    other = split_validation(dataset, 0.2, seed=2)[1]
    assert {e.key for e in other.examples} != {e.key for e in validation.examples}


def test_a_files_side_does_not_depend_on_the_other_files():
    small, large = numbered(60, start=40), numbered(200)
    held_small = {e.key for e in split_validation(small, 0.3, seed=0)[1].examples}
    held_large = {e.key for e in split_validation(large, 0.3, seed=0)[1].examples}
    assert held_small == held_large & {e.key for e in small.examples} and held_small


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_neither_side_is_empty(fraction, seed):
    training, validation = split_validation(numbered(2), fraction, seed)
    assert len(training) == len(validation) == 1


def test_equal_content_stays_together():
    pictures = [image(i, 8, 8, 3) for i in range(6)]
    dataset = from_images([*pictures, *pictures], [f"caption {i}" for i in range(12)])
    training, validation = split_validation(dataset, 0.4, seed=0)
    assert not {e.key for e in training.examples} & {e.key for e in validation.examples}
    assert len(validation) % 2 == 0 and validation


def test_validation_is_plain_while_training_keeps_its_options():
    dataset = from_images([image(i, 8, 8, 3) for i in range(20)], ["x"], repeats=3, crop="random", flip=True)
    training, validation = split_validation(dataset, 0.3, seed=0)
    assert (training.repeats, training.crop, training.flip) == (3, "random", True)
    assert (validation.repeats, validation.crop, validation.flip) == (1, "center", False)


def test_no_validation_and_impossible_ones():
    dataset = numbered(3)
    training, validation = split_validation(dataset, 0, seed=0)
    assert training is dataset and len(validation) == 0 and not validation
    with pytest.raises(ValueError, match="fraction is 1"):
        split_validation(dataset, 1, seed=0)
    with pytest.raises(ValueError, match="1 different image"):
        split_validation(numbered(1), 0.1, seed=0)
