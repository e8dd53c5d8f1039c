"""What a run says of itself before it starts and after its first steps, and when its loss rises."""

import logging
import random
from dataclasses import replace

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.loop import plan
from retune.training.loop.plan import WINDOW, LossWatch, pace_text, plan_text
from retune.training.recipes.unet import train_model


def test_a_plan_counts_images_repeats_steps_and_epochs():
    dataset = from_images([torch.zeros(3, 32, 32)] * 3, ["a"])
    config = TrainModelConfig(run_name="r", steps=30, batch_size=2, settings=TrainingSettings(gradient_accumulation=2))
    assert plan_text(dataset, config, 1.0) == "plan: 3 images, 4 a step; 1 steps an epoch, 30 steps are 30 epochs"
    text = plan_text(replace(dataset, repeats=10), config, 7.5)
    assert text == "plan: 3 images, 30 an epoch with repeats, 4 a step; 7.5 steps an epoch, 30 steps are 4 epochs"


@pytest.mark.parametrize(
    "left, seconds, said", [(10, 2.0, "20 s for the 10 left"), (300, 2.0, "10 min"), (3000, 2.4, "2 h 0 min")]
)
def test_the_pace_tells_duration_and_end(left, seconds, said):
    text = pace_text(left, seconds, now=0.0)
    assert said in text and text.startswith(f"{seconds:g} s a step") and "until about" in text


@pytest.mark.parametrize("slope, warned", [(0.0, False), (-1e-3, False), (1e-3, True)])
def test_a_loss_that_rises_is_told_once_and_noise_is_not(slope, warned):
    draw, watch = random.Random(0), LossWatch()
    found = [watch.add(1 + slope * step + draw.expovariate(2)) for step in range(40 * WINDOW)]
    assert sum(map(bool, found)) == warned


class Said(Callbacks):
    def __init__(self):
        self.texts, self.states = [], []

    def on_text(self, text):
        self.texts.append(text)

    def on_state(self, state, step, message=""):
        self.states.append((state, step, message))


def test_a_run_says_its_plan_its_pace_and_that_it_diverges(tiny_model, pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plan, "WINDOW", 2)
    monkeypatch.setattr(plan, "SIGMAS", -1e9)  # any loss counts as risen: what it takes is tested above
    settings = TrainingSettings(warmup_steps=0)
    config = TrainModelConfig(run_name="r", steps=8, batch_size=4, learning_rate=1e-3, settings=settings)
    said = Said()
    with caplog.at_level(logging.INFO):
        train_model(tiny_model, pictures, config, tmp_path, said)
    (first,) = [text for text in said.texts if "plan: 6 images" in text]
    assert "8 steps are" in first and "memory: at most about" in first and first in caplog.text
    assert [text for text in said.texts if " s a step, " in text and "for the 3 left" in text]
    (warning,) = [(state, message) for state, _, message in said.states if message]
    assert warning[0] == "running" and "the loss rises" in warning[1] and warning[1] in caplog.text
