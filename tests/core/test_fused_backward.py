"""A fused backward: the weights of the unfused one, one gradient in memory at a time; and what it is refused for."""

import dataclasses

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.loop import TrainingDiverged
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import STEP_BY_TENSOR, TrainingSettings
from retune.training.loop import optimizers
from retune.training.loop.fused_backward import FusedBackward, check_fused_backward
from retune.training.loop.gradient_step import GradientStep
from retune.training.loop.optimizers import build_optimizer
from retune.training.recipes.unet import train_model
from torch import nn

QUIET = {"warmup_steps": 0, "lr_schedule": "constant", "caption_dropout": 0.0, "max_grad_norm": 0.0}

LIMIT = 3.5


def config(name, **settings):
    run = {"run_name": name, "steps": 4, "batch_size": 2, "learning_rate": 1e-3, "train": "whole UNet"}
    return TrainModelConfig(**run, settings=TrainingSettings(**(QUIET | settings)))


@pytest.mark.parametrize("optimizer, precision", [*((o, "fp32") for o in STEP_BY_TENSOR), ("AdamW", "bf16")])
def test_the_weights_are_those_of_an_unfused_run(tiny_model, pictures, tmp_path, optimizer, precision):
    if optimizer in optimizers.PACKAGES:
        pytest.importorskip(optimizers.PACKAGES[optimizer][0])
    options = {"optimizer": optimizer, "ema_decay": 0.9, "lr_cross_attention": 2.0, "unfreeze_self_attention": 3}
    options |= {"gradient_checkpointing": True, "precision": precision}
    runs = [
        train_model(tiny_model, pictures, config(f"{fused}", fused_backward=fused, **options), tmp_path)
        for fused in (False, True)
    ]
    for name, value in runs[0].unet.items():
        torch.testing.assert_close(runs[1].unet[name], value, rtol=0, atol=1e-6)
    rows = [(tmp_path / f"{fused}" / "metrics.jsonl").read_text().splitlines() for fused in (False, True)]
    assert len(rows[0]) == len(rows[1]) == 4


def network():
    random = torch.Generator().manual_seed(0)
    weights = {f"rest.{i}": nn.Parameter(torch.randn(50, 50, generator=random)) for i in range(6)}
    return weights, torch.randn(4, 50, generator=random)


def product(weights, inputs):
    for weight in weights.values():
        inputs = torch.tanh(inputs @ weight / 7)
    return inputs.square().sum()


def test_one_gradient_is_in_memory_at_a_time():
    weights, inputs = network()
    settings = TrainingSettings(optimizer="SGD", fused_backward=True)
    fused, most = FusedBackward(build_optimizer(weights, 0.1, settings), settings), []
    for weight in weights.values():
        weight.register_hook(lambda gradient: most.append(sum(w.grad is not None for w in weights.values())))
    fused.begin(1)
    product(weights, inputs).backward()
    assert len(most) == 6 and max(most) == 0 and all(w.grad is None for w in weights.values())
    assert fused.updating
    fused.end()
    assert not fused.updating


def test_memory_falls_by_the_gradients(live_bytes):
    peaks = []
    for fused_backward in (False, True):
        weights, inputs = network()
        settings = TrainingSettings(optimizer="SGD", fused_backward=fused_backward, max_grad_norm=0.0)
        optimizer = build_optimizer(weights, 0.1, settings)
        for group in optimizer.param_groups:
            group["momentum"] = 0.0
        fused = FusedBackward(optimizer, settings) if fused_backward else None
        with live_bytes() as memory:
            if fused:
                fused.begin(1)
            product(weights, inputs).backward()
        peaks.append(memory.peak)
    of_a_weight = 50 * 50 * 4
    assert peaks[0] >= 6 * of_a_weight and peaks[1] <= 2.5 * of_a_weight


def test_each_tensor_is_clipped_by_itself_and_the_norm_is_that_of_all():
    settings = TrainingSettings(optimizer="SGD", max_grad_norm=LIMIT, weight_decay=0.0)
    weights, inputs = network()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    product(weights, inputs).backward()
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
    fused = FusedBackward(build_optimizer(weights, 0.1, settings), settings)
    fused.begin(1)
    product(weights, inputs).backward()
    norms = [gradient.norm() for gradient in gradients.values()]
    assert min(norms) < LIMIT < max(norms)
    for name, weight in weights.items():
        clipped = gradients[name] * min(1.0, LIMIT / (gradients[name].norm().item() + 1e-6))
        torch.testing.assert_close(weight.detach(), before[name] - 0.1 * clipped)
    every = torch.cat([gradient.flatten() for gradient in gradients.values()])
    torch.testing.assert_close(fused.norm(), every.norm())


@pytest.mark.parametrize(
    "fused, kept", [(True, "No state is kept"), (False, "The state after step 1 is kept")], ids=["fused", "unfused"]
)
def test_a_run_that_diverges_before_a_state_was_saved(tiny_model, pictures, tmp_path, monkeypatch, fused, kept):
    """Its weights are then those of a part of a step; unfused they are the last step's, which are saved."""
    gradient = GradientStep.gradient

    def diverging(self, step, callbacks):
        figures = gradient(self, step, callbacks)
        return dataclasses.replace(figures, loss=float("nan")) if step == 2 else figures

    monkeypatch.setattr(GradientStep, "gradient", diverging)
    run = config("r", optimizer="SGD", fused_backward=fused, save_every=100)
    with pytest.raises(TrainingDiverged, match=f"loss is nan at step 2; expected a finite number. {kept}. Try a lower"):
        train_model(tiny_model, pictures, run, tmp_path)
    assert (tmp_path / "r" / "state" / "latest.safetensors").exists() is not fused


class Stop(Callbacks):
    """Cancels after step 2, or in the backward pass of step 3."""

    def __init__(self, step):
        self.step = step

    def on_step(self, info):
        if info.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("inside", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(tiny_model, pictures, tmp_path, inside, monkeypatch):
    """Stopped in the middle of an update, it goes on from the state that was saved before."""
    run = dataclasses.replace(config("r", optimizer="Adafactor", fused_backward=True, save_every=1))
    whole = train_model(tiny_model, pictures, run, tmp_path / "whole")
    step, calls = FusedBackward._apply, [0]

    def broken(self, number, parameter):
        calls[0] += 1
        if self._step == 3 and inside and calls[0] % 7 == 0:
            raise KeyboardInterrupt
        return step(self, number, parameter)

    monkeypatch.setattr(FusedBackward, "_apply", broken)
    with pytest.raises(KeyboardInterrupt):
        train_model(tiny_model, pictures, run, tmp_path, None if inside else Stop(2))
    monkeypatch.undo()
    resumed = train_model(tiny_model, pictures, run, tmp_path)
    assert all(torch.equal(resumed.unet[name], value) for name, value in whole.unet.items())
    for name in ("metrics.jsonl", "model.safetensors", "state/latest.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / "r" / name).read_bytes()


def test_what_needs_all_gradients_is_refused():
    with pytest.raises(ValueError, match="fused_backward is on with optimizer Prodigy; expected one of AdamW, Adafact"):
        TrainingSettings(optimizer="Prodigy", fused_backward=True)
    with pytest.raises(ValueError, match="fused_backward is on with precision fp16"):
        TrainingSettings(precision="fp16", fused_backward=True)
    for several in ({"gradient_accumulation": 3}, {"total_batch": 6}):
        with pytest.raises(ValueError, match="fused_backward is on with 3 batches a step; expected one"):
            check_fused_backward(config("r", fused_backward=True, **several))
    check_fused_backward(config("r", fused_backward=True))
