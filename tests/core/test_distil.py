"""Distilling a text encoder into a resampler: what a linear map cannot say is learned, held-out prompts stay unseen."""

import dataclasses

import pytest
import torch
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common import transfer
from retune.training.demo.scenes import demo_examples
from retune.training.text_encoder import distil
from retune.training.text_encoder.distil import Distillation, distil_projection, fit_or_distil
from retune.training.text_encoder.fit import HOLD_OUT_EVERY

PROMPTS = [f"word{i} and more {i * 7 % 11}" for i in range(200)]
SHORT = Distillation(steps=30, layers=1, batch_size=8)


class Words:
    """Three states of width 6 for each prompt, and an end token."""

    def states(self, prompt):
        random = torch.Generator().manual_seed(sum(map(ord, prompt)))
        return torch.randn(4, 6, generator=random), torch.ones(4, dtype=torch.bool)

    def pooled(self, prompt):
        return Words().states(prompt)[0].mean(0) @ torch.ones(6, 3)


class Mixed(Words):
    """Five tokens of width 8 that depend on all states of a prompt, and pads; `windows` of them."""

    def __init__(self, change=lambda prompt, states: states, windows=lambda prompt: 1):
        self.change, self.windows = change, windows

    def states(self, prompt):
        states, _ = super().states(prompt)
        weight = torch.randn(24, 5 * 8, generator=torch.Generator().manual_seed(1)) / 24**0.5
        outputs = self.change(prompt, torch.tanh(2 * states.flatten() @ weight).view(5, 8) + 3)
        real = torch.tensor([False, True, True, True, False])
        return outputs.repeat(self.windows(prompt), 1), real.repeat(self.windows(prompt))


def test_what_a_linear_map_cannot_say_is_learned():
    _, linear = fit_or_distil(Words(), Mixed(), PROMPTS, method="ridge")
    settings = Distillation(steps=600, layers=2, batch_size=32)
    projection, report = fit_or_distil(Words(), Mixed(), PROMPTS, method="distillation", settings=settings)
    assert projection.tokens == 5 and (report.method, report.prompts, report.held_out) == ("distillation", 200, 40)
    assert report.explained > linear.explained + 0.2
    states = torch.stack([Words().states(prompt)[0] for prompt in PROMPTS[::HOLD_OUT_EVERY]])
    outputs, wanted = projection(states), torch.stack([Mixed().states(p)[0] for p in PROMPTS[::HOLD_OUT_EVERY]])
    real = slice(1, 4)
    error = (outputs - wanted)[:, real].square().sum() / (wanted[:, real] - wanted[:, real].mean((0, 1))).square().sum()
    assert report.explained == pytest.approx(1 - error.item(), abs=1e-4)


def test_on_a_device_it_learns_the_same_and_the_host_does_not_wait(device, monkeypatch):
    """Copies to the device are those to a CUDA device."""
    monkeypatch.setattr(transfer, "STAGING", ("cuda", "lazy"))
    waits = []

    def count(done, total):
        waits.append(device.waits + sum(device.reads.values()))

    there, here = (
        distil_projection(Words(), Mixed(), PROMPTS, SHORT, device=torch.device(where), on_step=count)[0].state_dict()
        for where in ("lazy", "cpu")
    )
    assert len(waits) == 60 and waits[0] == waits[29]
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_repeats_to_the_bit_whatever_was_drawn_before():
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        found.append(distil_projection(Words(), Mixed(), PROMPTS, SHORT)[0].state_dict())
    other = distil_projection(Words(), Mixed(), PROMPTS, dataclasses.replace(SHORT, seed=1))[0].state_dict()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not torch.equal(found[0]["linear.weight"], other["linear.weight"])


def test_held_out_prompts_are_not_learned_from():
    held_out = set(PROMPTS[::HOLD_OUT_EVERY])
    spoiled = Mixed(lambda prompt, states: -9 * states if prompt in held_out else states)
    (plain, report), (other, worse) = (distil_projection(Words(), r, PROMPTS, SHORT) for r in (Mixed(), spoiled))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())
    assert report.explained > worse.explained


def test_it_learns_in_inference_mode_and_what_comes_out_can_be_trained():
    with torch.inference_mode():
        projection, _ = distil_projection(Words(), Mixed(), PROMPTS, SHORT)
    projection.requires_grad_(True)(torch.ones(1, 4, 6)).sum().backward()
    assert projection.linear.weight.grad is not None


def test_the_pooled_output_is_fitted_besides():
    projection, report = distil_projection(Words(), Mixed(), PROMPTS, SHORT, 3)
    assert report.pooled_explained == pytest.approx(1, abs=1e-2)
    mean = Words().states(PROMPTS[3])[0].mean(0, keepdim=True)
    torch.testing.assert_close(projection.pool(mean)[0], Words().pooled(PROMPTS[3]), rtol=0.05, atol=0.05)


def test_of_long_prompts_the_first_window_is_learned_and_other_lengths_are_refused():
    long = Mixed(windows=lambda prompt: 2 if prompt.endswith("1") else 1)
    assert distil_projection(Words(), long, PROMPTS, SHORT)[0].tokens == 5
    with pytest.raises(
        ValueError, match="number of tokens is 4 to 5; expected a fixed number to distil into. Use a CLI"
    ):
        uneven = Mixed(lambda prompt, states: states[1:] if prompt.endswith("1") else states)
        distil_projection(Words(), uneven, PROMPTS, SHORT)


def test_of_too_many_prompts_evenly_spaced_ones_are_taken(monkeypatch):
    monkeypatch.setattr(distil, "KEPT_BYTES", 50 * 4 * (4 * 6 + 5 * 8))
    _, report = distil_projection(Words(), Mixed(), PROMPTS, SHORT)
    assert (report.prompts, report.held_out) == (50, 10)


def test_steps_are_told_and_may_cancel():
    told = []

    def on_step(done, total):
        told.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil_projection(Words(), Mixed(), PROMPTS, SHORT, on_step=on_step)
    assert told == [(1, 30), (2, 30), (3, 30)]


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="number of different prompts is 1; expected at least 10"):
        distil_projection(Words(), Mixed(), ["same"] * 20, SHORT)


def test_a_command_distils_the_models_clip_into_its_t5(tmp_path):
    """On prompts that it did not see more steps come nearer."""
    captions = demo_examples(150, 0)[1]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(captions), encoding="utf-8")
    more = {"model": "demo", "t5": "demo", "fit": prompts}
    clip = build_model(ModelConfig(model="demo")).text_encoder
    unseen, errors = demo_examples(10, 1)[1], []
    wanted = clip.encode(clip.tokenize(unseen)).context
    for steps in (2, 60):
        encoder = build_model(ModelConfig(**more, fit_method="distillation", fit_steps=steps)).text_encoder
        found = encoder.encode(encoder.tokenize(unseen)).context
        assert found.shape == wanted.shape
        errors.append(float((found - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="fit_steps is 0; expected 1 to 1000000"):
        ModelConfig(**more, fit_method="distillation", fit_steps=0)
