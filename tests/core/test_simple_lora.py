"""What Train LoRA from Folder derives, and trigger words in captions."""

import pytest
from retune.training.config.simple_lora import GIB, SimpleLora
from retune.training.config.training_settings import CARDS, TrainingSettings
from retune.training.data.captions import with_trigger


@pytest.mark.parametrize(
    "family, memory, preset",
    [("SD1.x", 24, "SD1.5 6 GB"), ("SDXL", 23.6, "SDXL 24 GB"), ("SDXL", 11.8, "SDXL 12 GB"), ("SDXL", 8, "SDXL 8 GB")],
)
def test_the_card_follows_the_memory_and_its_preset_is_taken_whole(family, memory, preset):
    simple = SimpleLora(family, memory=int(memory * GIB))
    config = simple.config(20, ["a"], run_name="r")
    assert simple.preset == preset and config.settings == TrainingSettings(**CARDS[preset])
    assert config.batch_size * config.gradient_accumulation == 4


@pytest.mark.parametrize(
    "quality, images, steps",
    [("quick", 1, 100), ("quick", 20, 200), ("good", 20, 500), ("good", 81, 2000), ("best", 20, 1000)],
)
def test_steps_show_each_image_so_many_times(quality, images, steps):
    assert SimpleLora("SDXL", quality=quality).config(images, [], run_name="r").steps == steps


def test_shape_samples_and_text_are_those_of_the_family_and_of_the_data():
    simple = SimpleLora("SDXL", "sks", "best", "SDXL 12 GB")
    config = simple.config(20, ["sks", "sks, a cat", "sks, a dog"], run_name="r", seed=3)
    assert (config.rank, config.alpha, config.learning_rate, config.seed) == (64, 16.0, 1e-4, 3)
    samples = config.samples
    assert (samples.prompts, samples.width, samples.every) == (("sks", "sks, a cat"), 1024, 200)
    text = simple.text(20, config)
    for part in ("resolution 1024, trigger_word 'sks'", "preset SDXL 12 GB (gradient_accumulation 4", "seen about 200"):
        assert part in text
    assert "steps 1000, batch_size 1, learning_rate 0.0001, rank 64, alpha 16" in text


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="family is unknown; expected demo, SD1.x, SD2.x, SDXL"):
        SimpleLora("")


@pytest.mark.parametrize(
    "caption, found",
    [("a cat", "sks, a cat"), ("a SKS cat", "a SKS cat"), ("asks", "sks, asks"), ("", "sks")],
)
def test_a_trigger_word_is_put_where_it_lacks(caption, found):
    assert with_trigger(caption, "sks") == found and with_trigger(caption, "") == caption
