"""Optimisers and learning-rate schedules against closed forms and the schedules of diffusers."""

import math

import pytest
import torch
from retune.training.config import TrainingSettings
from retune.training.optim import build_optimizer, learning_rate_factor


def factors(steps, **settings):
    return [learning_rate_factor(step, steps, TrainingSettings(**settings)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_a_line_to_the_peak(schedule):
    assert factors(20, lr_schedule=schedule, warmup_steps=5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_schedules_by_hand():
    assert factors(4, lr_schedule="constant", warmup_steps=0) == [1, 1, 1, 1]
    assert factors(4, lr_schedule="linear", warmup_steps=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5)
    assert factors(4, lr_schedule="cosine", warmup_steps=0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])


@pytest.mark.parametrize("name, ours", [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant")])
def test_after_the_warm_up_diffusers_schedule_follows(name, ours):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = None if name == "constant" else 3
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    theirs = []
    for _ in range(12):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors(12, lr_schedule=ours, warmup_steps=3)[3:] == pytest.approx(theirs[3:])


def test_warm_up_longer_than_the_run_is_cut():
    assert factors(4, warmup_steps=100) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def stepped(name, gradient, **settings):
    """One weight 2.0 after one step at learning rate 0.1."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer({"w": weight}, 0.1, TrainingSettings(optimizer=name, **settings))
    weight.grad = torch.tensor([gradient])
    optimizer.step()
    return weight.item()


def test_first_steps_by_hand():
    assert stepped("AdamW", 0.3, weight_decay=0.0) == pytest.approx(1.9, abs=1e-6)  # the sign of the gradient
    assert stepped("AdamW", 0.3, weight_decay=0.5) == pytest.approx(2.0 * (1 - 0.05) - 0.1, abs=1e-6)
    assert stepped("SGD", 0.3, weight_decay=0.0) == pytest.approx(2.0 - 0.03)
    assert stepped("SGD", 0.3, weight_decay=0.5) == pytest.approx(2.0 - 0.1 * (0.3 + 0.5 * 2.0))
    assert stepped("Adafactor", 0.3, weight_decay=0.0) < 2.0


def test_sgd_has_momentum():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    optimizer = build_optimizer({"w": weight}, 1.0, TrainingSettings(optimizer="SGD", weight_decay=0.0))
    for _ in range(2):
        weight.grad = torch.tensor([1.0])
        optimizer.step()
    assert weight.item() == pytest.approx(-1 - 1.9)
