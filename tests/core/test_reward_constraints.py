"""What holds a tuned model near the frozen one, and tuning on images: gradients against autograd, exact resume."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.common.rng import generator
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.order import BatchOrder
from retune.training.data.prompts import Prompt, PromptSlot
from retune.training.models.protocols import Conditioning
from retune.training.objectives.regularizers import drift
from retune.training.objectives.reward import RewardObjective
from retune.training.objectives.reward_on_images import DirectObjective
from retune.training.recipes.reward import build_trainable, tune
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.sampling.guidance import Guidance
from retune.training.sampling.rollout import guided_output

PROMPTS = ["a red circle", "two small blue squares"]


def reward(weight=1.0):
    return CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo CLIP")), weight=weight)])


def config(**changes):
    values = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "gradient_steps": 2, "sampling_steps": 4, "cfg": 2.0}
    settings = TrainingSettings(warmup_steps=1, save_every=2, validation_fraction=0.4, validate_every=2)
    values |= {"run_name": "r", "width": 32, "height": 32, "settings": settings}
    return RewardTuneConfig(**(values | changes))


def pictures(count=4):
    images = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    return from_images([image.movedim(0, -1)[None] for image in images], (PROMPTS * count)[:count])


def moved(trainable):
    """Values some way off those it starts with."""
    random = torch.Generator().manual_seed(5)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=random) for name, value in trainable.values().items()
    }


def gradients(total, trainable):
    """Of a (B,) loss's sum, all in one vector."""
    found = torch.autograd.grad(total.sum(), list(trainable.parameters.values()), allow_unused=True)
    pairs = zip(found, trainable.parameters.values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("train", ["text encoder", "text encoder LoRA", "UNet", "UNet LoRA"])
def test_constraints_add_their_own_gradient(tiny_model, train, stop_gradient):
    """At K = 1, where nothing comes between a parameter and the output: weight times autograd of the formula."""
    chosen = config(train=train, gradient_steps=1, lora_rank=2, stop_gradient=stop_gradient)
    trainable = build_trainable(tiny_model, chosen)
    trainable.load(moved(trainable))
    slots = [PromptSlot(text, 1, i) for i, text in enumerate(PROMPTS)]

    def loss(**weights):
        objective = RewardObjective(
            tiny_model, reward(), replace(chosen, **weights), trainable, text_trains=chosen.text_trains
        )
        return objective, objective(list(enumerate(objective.load(slots))), 1)

    weights = {"eps_constraint": 7.0} | ({"drift_constraint": 3.0} if chosen.text_trains else {})
    objective, _ = loss(**weights)
    loaded = objective.load(slots)  # by the frozen text encoder
    with trainable.attach(rng_key=(1, 0)):
        plain, held = loss()[1], objective(list(enumerate(loaded)), 1)
        assert held.parts["eps_mse"] > 1e-6
        now, frozen = objective._guidance_now(loaded, 2.0), objective._frozen_guidance(loaded, 2.0)
        chain = objective._draw([0, 1], loaded, 1, now.detached())
        x, step = chain.states[chain.chosen[0]], chain.steps[chain.chosen[0]]
        with torch.no_grad(), trainable.disabled():
            expected = guided_output(tiny_model.denoiser, x, step, frozen)
        apart = guided_output(tiny_model.denoiser, x, step, now) - expected
        extra = 7.0 * apart.square().flatten(1).mean(1)
        assert held.parts["eps_mse"] == pytest.approx(extra.mean().item() / 7, rel=1e-4)
        if chosen.text_trains:
            extra = extra + 3.0 * drift(now, frozen)
            assert held.parts["drift"] == pytest.approx(drift(now, frozen).mean().item())
        difference = held.per_sample - plain.per_sample
        torch.testing.assert_close(difference.detach(), extra.detach(), rtol=1e-3, atol=1e-5)
        found = gradients(held.per_sample, trainable) - gradients(plain.per_sample, trainable)
        wanted = gradients(extra, trainable)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))


def test_released_is_the_base_model_and_no_more(tiny_model):
    text = Conditioning(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)))
    x, sigma = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2.0])
    for train in ("UNet", "UNet LoRA"):
        trainable = build_trainable(tiny_model, config(train=train, lora_rank=2))
        trainable.load(moved(trainable))
        with torch.no_grad():
            base = tiny_model.denoiser.predict(x, sigma, text)
            with trainable.attach(rng_key=(1, 0)):
                tuned = tiny_model.denoiser.predict(x, sigma, text)
                with trainable.disabled():
                    assert torch.equal(tiny_model.denoiser.predict(x, sigma, text), base)
                assert torch.equal(tiny_model.denoiser.predict(x, sigma, text), tuned)
        assert not torch.equal(tuned, base)


def test_drift_in_closed_form():
    old = Conditioning(torch.tensor([[[3.0, 4.0], [0.0, 5.0], [9.0, 9.0]]]), None, torch.tensor([[True, True, False]]))
    new = Conditioning(old.context + torch.tensor([1.0, 0.0]), None, old.mask)
    assert drift(Guidance(new), Guidance(old)).tolist() == pytest.approx([2 / 50])
    pooled = Guidance(
        Conditioning(old.context, torch.tensor([[2.0]])), Conditioning(old.context, torch.tensor([[2.0]]))
    )
    shifted = Guidance(Conditioning(old.context, torch.tensor([[3.0]])), pooled.negative)
    assert drift(shifted, pooled).tolist() == pytest.approx([(0 + 1 / 4 + 0 + 0) / 4])
    with pytest.raises(ValueError, match="drift_constraint is 1 and train 'UNet'; expected 0"):
        config(train="UNet", drift_constraint=1.0)


@pytest.mark.parametrize("train", ["text encoder", "UNet"])
def test_direct_tuning_is_autograd_of_equations_4_and_5(tiny_model, train):
    chosen, dataset = config(train=train, method="direct"), pictures()
    trainable = build_trainable(tiny_model, chosen)
    with torch.no_grad():
        latents = {e.key: tiny_model.autoencoder.encode(e.load()[None])[0] for e in dataset.examples}
    objective = DirectObjective(
        tiny_model,
        reward(),
        chosen,
        trainable,
        text_trains=chosen.text_trains,
        latent_of=lambda slot: latents[slot.example.key],
    )
    weights = torch.tensor([1.0, 3.0])
    slots = [
        replace(slot, example=replace(slot.example, weight=weight.item()))
        for slot, weight in zip(BatchOrder(dataset, 2, 0).batch(3), weights, strict=True)
    ]
    loaded, denoiser, encoder = objective.load(slots), tiny_model.denoiser, tiny_model.text_encoder
    with trainable.attach(rng_key=(3, 0)):
        found = objective(list(enumerate(loaded)), 3)
        latent = torch.stack([latents[slot.example.key] for slot in slots])
        noise = torch.stack([torch.randn(latent.shape[1:], generator=generator(0, "noise", 3, i)) for i in range(2)])
        draws = [torch.rand((), generator=generator(0, "timestep", 3, i), dtype=torch.float64) for i in range(2)]
        sigma = denoiser.sigmas[[int(1000 * draw) for draw in draws]].view(-1, 1, 1, 1)
        noisy = latent + sigma * noise
        text = Conditioning.cat([encoder.encode(encoder.tokenize([slot.example.caption])) for slot in slots])
        clean = noisy - sigma * denoiser.predict(noisy, sigma.view(-1), text)
        captions = [slot.example.caption for slot in slots]
        expected = -weights * objective.reward.evaluate(tiny_model.autoencoder.pixels(clean), captions).total
        torch.testing.assert_close(found.per_sample.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
        ours, theirs = gradients(found.per_sample, trainable), gradients(expected, trainable)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("train", ["UNet", "text encoder LoRA"])
def test_half_precision_trains_and_fp16_is_refused(tiny_model, tmp_path, train):
    settings = TrainingSettings(warmup_steps=1, precision="bf16")
    two_steps = config(train=train, steps=2, settings=settings)
    tune(tiny_model, reward(), [Prompt(text) for text in PROMPTS], two_steps, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 1e-4 for row in rows if "event" not in row)
    half = replace(settings, precision="fp16")
    with pytest.raises(ValueError, match="fp16"):
        tune(tiny_model, reward(), [Prompt("a")], config(train=train, settings=half), tmp_path / "half")


def test_a_stopped_run_on_images_goes_on_bit_for_bit(tiny_model, tmp_path):
    class Dies(Callbacks):
        def on_step(self, info):
            if info.step == 3:
                raise KeyboardInterrupt

    whole = config(method="direct", train="text encoder LoRA", lora_rank=2, eps_constraint=1.0, drift_constraint=1.0)

    def digest(root):
        files = [
            (root / "r" / name).read_bytes() for name in ("metrics.jsonl", "tuned.safetensors", "lora.safetensors")
        ]
        return [hashlib.sha256(file).hexdigest() for file in files]

    tune(tiny_model, reward(), [], whole, tmp_path / "whole", dataset=pictures())
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_model, reward(), [], whole, tmp_path / "stopped", Dies(), dataset=pictures())
    tune(tiny_model, reward(), [], whole, tmp_path / "stopped", dataset=pictures())
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    text = (tmp_path / "whole" / "r" / "metrics.jsonl").read_text()
    assert all(word in text for word in ('"eps_mse"', '"drift"', '"validation"'))


def test_direct_tuning_asks_for_images(tiny_model, tmp_path, caplog):
    with pytest.raises(ValueError, match="dataset is empty with method 'direct'"):
        tune(tiny_model, reward(), [Prompt("a cat")], config(method="direct"), tmp_path)
    tune(tiny_model, reward(), [Prompt("a cat")], config(steps=1, method="direct"), tmp_path, dataset=pictures())
    assert "1 prompts are left aside" in caplog.text
