"""The LoRA benchmark: seconds from progress marks, losses at equal seconds, and LoRAs put on the model it judges."""

import pytest
import torch
from retune.benchmarks.__main__ import main
from retune.benchmarks.lora import compare, interpolate, jobs, lora_applied, parameter_changes
from retune.benchmarks.lora_runs import (
    COMFYUI,
    RETUNE,
    Job,
    LoraBenchConfig,
    comfyui_prompt,
    median_step_seconds,
    retune_prompt,
)
from retune.training.commands.open_model import ModelConfig, build_model, unet_parameters
from retune.training.formats.lora import parse_lora


def test_the_pace_is_the_median_of_stretches_of_whole_steps():
    marks = [(0.0, 1), (0.5, 2), (1.0, 3), (1.5, 4), (4.0, 5), (4.5, 6), (5.0, 7)]
    assert median_step_seconds(marks, 2) == 1.0  # the stretches from 1 to 3, 3 to 5 and 5 to 7 took 1, 3 and 1 s
    assert median_step_seconds([(0.0, 1), (6.0, 5), (6.1, 6), (7.5, 8)], 2) == pytest.approx(
        (6 / 4 * 2 + 1.5 / 3 * 2) / 2
    )
    with pytest.raises(ValueError, match="progress is 2 marks of 4 a step; expected two steps at least"):
        median_step_seconds([(0.0, 1), (1.0, 3)], 4)


def row(trainer, steps, loss, seconds, seed=0, rate=1e-3):
    figures = {"learning rate": rate, "steps": steps, "trainer": trainer, "seed": seed}
    return figures | {"validation loss": loss, "seconds per step": seconds, "seconds apart": 3.0}


def test_losses_are_compared_at_equal_steps_and_at_equal_seconds():
    rows = [
        row(RETUNE, 10, 0.4, 0.5),
        row(COMFYUI, 10, 0.5, 1.0),
        row(COMFYUI, 20, 0.2, 1.0),
        row(RETUNE, 20, 0.3, 0.5),
    ]
    found = compare(rows, untrained=1.0)
    assert found["seconds_ratio"] == 2.0 and found["trainers"][RETUNE]["seconds_per_step"] == 0.5
    equal = [(r["seconds"], r[RETUNE], r[COMFYUI]) for r in found["at_equal_seconds"]]
    assert equal == [(5.0, 0.4, pytest.approx(0.75)), (10.0, 0.3, 0.5)]
    assert [(r["steps"], r["trainer"]) for r in found["rows"]] == [(n, t) for n in (10, 20) for t in (RETUNE, COMFYUI)]
    assert found["findings"][0].endswith("side by side 2.00 times as many there.")
    assert "10 s: 0.3000 here, 0.5000 in ComfyUI" in found["findings"][-1]
    assert "10 steps: 0.4000 here, 0.5000 in ComfyUI." in found["findings"][1]
    again = compare([*rows, *({**r, "seed": 1, "validation loss": r["validation loss"] + 0.01} for r in rows)], 1.0)
    assert "that it is lower here holds by validation loss (0.405 ± 0.005 against" in again["findings"][1]
    with pytest.raises(ValueError, match="expected at most 20"):
        interpolate([(0, 1.0), (20, 0.0)], 21)


def test_both_trainers_are_asked_for_the_same():
    config = LoraBenchConfig(steps=40, rank=3, batch_size=2, accumulation=5, seeds=2, learning_rates=(1e-4,))
    assert jobs(config) == [Job(1e-4, steps, seed) for seed in (0, 1) for steps in (10, 20, 40)]
    job = Job(2e-4, 10, 7)
    here, there = retune_prompt(config, job), comfyui_prompt(config, job)
    own, core = here["train"]["inputs"], there["train"]["inputs"]
    for name, value in {"learning_rate": 2e-4, "steps": 10, "seed": 7, "rank": 3, "batch_size": 2}.items():
        assert own[name] == core[name] == value
    assert here["settings"]["inputs"]["gradient_accumulation"] == core["grad_accumulation_steps"] == 5
    assert here["data"]["inputs"]["folder"] == there["data"]["inputs"]["folder"]
    with pytest.raises(ValueError, match="learning_rates are .*; expected one at least"):
        LoraBenchConfig(learning_rates=(0.0,))


def test_a_lora_put_on_the_model_changes_weights_biases_and_norms_and_goes_again():
    """Under the names that ComfyUI's own trainer gives; its kernels' factors are flat."""
    denoiser = build_model(ModelConfig(model="demo")).denoiser
    before = {name: value.detach().clone() for name, value in unet_parameters(denoiser).items()}
    shape = before["input_blocks.0.0.weight"].shape
    assert len(shape) == 4 and shape[-1] == 3
    random = torch.Generator().manual_seed(0)
    up, down = torch.randn(shape[0], 2, generator=random), torch.randn(2, shape[1:].numel(), generator=random)
    bias = torch.randn(shape[0], generator=random)
    norm = torch.randn(before["out.0.weight"].shape, generator=random)
    conv = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(3.0), "diff_b": bias}
    tensors = {f"diffusion_model.input_blocks.0.0.{name}": value for name, value in conv.items()}
    lora = parse_lora("x", tensors | {"diffusion_model.out.0.diff": norm})
    with lora_applied(denoiser, lora):
        now = {name: value.detach().clone() for name, value in unet_parameters(denoiser).items()}
    expected = {"input_blocks.0.0.weight": 1.5 * (up @ down).reshape(shape), "input_blocks.0.0.bias": bias}
    expected["out.0.weight"] = norm
    assert parameter_changes(lora).keys() == expected.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value + expected.get(name, 0), msg=name)
    assert all(torch.equal(value, before[name]) for name, value in unet_parameters(denoiser).items())
    with pytest.raises(ValueError, match="x changes nowhere.weight; expected layers of the demo model's UNet"):
        lora_applied(denoiser, parse_lora("x", {"diffusion_model.nowhere.diff": norm})).__enter__()


def test_without_comfyui_it_says_how_to_get_it(capsys):
    assert main(["lora-loss"]) == 2
    assert "comfyui is not given" in (said := capsys.readouterr().err) and "run.py bench lora-loss" in said
