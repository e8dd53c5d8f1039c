"""Optimisers and learning-rate schedules against closed forms and the schedules of other libraries."""

import math
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup as diffusers_restarts
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup as diffusers_polynomial
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.optimizers import build_optimizer, learning_rate_factor


def factors(steps, **settings):
    return [learning_rate_factor(step, steps, TrainingSettings(**settings)) for step in range(1, steps + 1)]


SCHEDULES = get_args(get_type_hints(TrainingSettings)["lr_schedule"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_a_line_to_the_peak(schedule):
    assert factors(400, lr_schedule=schedule, warmup_steps=5)[:6] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rel=2e-3
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_stay_between_zero_and_the_peak(schedule):
    found = factors(50, lr_schedule=schedule, warmup_steps=7, lr_cycles=3, lr_power=2.5)
    assert all(0 < factor <= 1 for factor in found) and (found[-1] < 0.25 or schedule == "constant")


def test_schedules_by_hand():
    assert factors(4, lr_schedule="constant", warmup_steps=0) == [1, 1, 1, 1]
    assert factors(4, lr_schedule="linear", warmup_steps=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5)
    assert factors(4, lr_schedule="cosine", warmup_steps=0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert factors(4, lr_schedule="REX", warmup_steps=0) == pytest.approx([1, 6 / 7, 2 / 3, 0.4])
    assert factors(4, lr_schedule="polynomial", warmup_steps=0, lr_power=2) == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16])
    restarts = factors(4, lr_schedule="cosine with restarts", warmup_steps=0, lr_cycles=2)
    assert restarts == pytest.approx([1, 0.5, 1, 0.5])
    stable = factors(10, lr_schedule="warm-up-stable-decay", warmup_steps=0, lr_decay_share=0.4)
    assert stable == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def scheduled(make, steps):
    """What a library's schedule makes of the rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 3])
def test_restarts_and_polynomial_are_those_of_diffusers(warmup):
    theirs = scheduled(lambda o: diffusers_restarts(o, warmup, 23, num_cycles=3), 23)[warmup:]
    assert factors(23, lr_schedule="cosine with restarts", warmup_steps=warmup, lr_cycles=3)[warmup:] == pytest.approx(
        theirs, abs=1e-12
    )
    theirs = scheduled(lambda o: diffusers_polynomial(o, warmup, 23, lr_end=0.0, power=1.7), 23)[warmup:]
    assert factors(23, lr_schedule="polynomial", warmup_steps=warmup, lr_power=1.7)[warmup:] == pytest.approx(theirs)


def test_polynomial_is_that_of_torch():
    theirs = scheduled(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 23, power=1.7), 23)
    assert factors(23, lr_schedule="polynomial", warmup_steps=0, lr_power=1.7) == pytest.approx(theirs)


def test_stable_decay_is_that_of_transformers():
    from transformers import get_wsd_schedule

    theirs = scheduled(lambda o: get_wsd_schedule(o, 3, 5, num_training_steps=23, decay_type="linear"), 23)
    ours = factors(23, lr_schedule="warm-up-stable-decay", warmup_steps=3, lr_decay_share=0.25)
    assert ours[3:] == pytest.approx(theirs[3:])


def test_rex_is_that_of_pytorch_optimizer():
    library = pytest.importorskip("pytorch_optimizer")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = library.REXScheduler(optimizer, total_steps=23)
    theirs = [scheduler.step() for _ in range(22)]  # it took its first step when it was made
    assert factors(23, lr_schedule="REX", warmup_steps=0) == pytest.approx([1.0, *theirs])


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


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "name, module, size",
    [
        ("AdamW8bit", "bitsandbytes", 0.1),  # one weight: its state is kept in 32 bits
        ("AdamWScheduleFree", "schedulefree", 0.1),
        ("Lion", "pytorch_optimizer", 0.1),
        ("CAME", "pytorch_optimizer", 0.01),  # its first moment has no bias correction: (1 - 0.9) of a clipped step
    ],
)
def test_first_steps_have_a_known_size_and_decoupled_decay(name, module, size, decay):
    pytest.importorskip(module)
    assert stepped(name, 0.3, weight_decay=decay) == pytest.approx(2.0 * (1 - 0.1 * decay) - size, abs=1e-5)


def test_sgd_has_momentum():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    optimizer = build_optimizer({"w": weight}, 1.0, TrainingSettings(optimizer="SGD", weight_decay=0.0))
    for _ in range(2):
        weight.grad = torch.tensor([1.0])
        optimizer.step()
    assert weight.item() == pytest.approx(-1 - 1.9)
