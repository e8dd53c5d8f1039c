"""Reward tuning on a tiny model: gradients through the sampler, what trains and what does not, exact resume."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.common.foreign import read_tensors
from retune.training.config.reward import TUNE_TARGETS, RewardTuneConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.prompts import Prompt, PromptSlot
from retune.training.models.diffusers import SD1_SCHEDULER, DiffusersDenoiser
from retune.training.objectives.reward import RewardObjective
from retune.training.recipes.reward import build_trainable, tune
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.sampling.rollout import first_latent, joint_end, rollout

PROMPTS = [Prompt("a red circle"), Prompt("two small blue squares"), Prompt("a green star, white background")]


def reward():
    terms = [Term(reward=load_reward(RewardConfig(kind=kind))) for kind in ("demo aesthetic", "demo CLIP")]
    return CombinedReward(terms)


def config(**changes):
    values = {
        "run_name": "r",
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "gradient_steps": 2,
        "sampling_steps": 4,
        "cfg": 2.0,
        "width": 32,
        "height": 32,
        "settings": TrainingSettings(warmup_steps=1, save_every=2, validation_fraction=0.3, validate_every=2),
    }
    return RewardTuneConfig(**(values | changes))


def weights_of(model):
    parts = (model.denoiser.network, model.autoencoder.network, model.text_encoder.network)
    return [p.detach().clone() for part in parts for p in part.parameters()]


def rows(root, run="r"):
    return [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]


def loaded(objective, count=2):
    return list(enumerate(objective.load([PromptSlot(PROMPTS[i].text, 1, i) for i in range(count)])))


def gradients(model, chosen, **options):
    """Of everything that trains, by the objective's own loss."""
    trainable = build_trainable(model, chosen)
    objective = RewardObjective(model, reward(), chosen, trainable, text_trains=chosen.text_trains)
    with trainable.attach(rng_key=(1, 0)):
        loss = objective(loaded(objective), 1)
        loss.per_sample.sum().backward()
    return objective, trainable, loss


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("train", ["text encoder", "UNet LoRA"])
def test_the_gradient_is_that_of_autograd_through_the_last_steps(tiny_model, train, stop_gradient):
    chosen = config(train=train, stop_gradient=stop_gradient, lora_rank=2)
    objective, trainable, loss = gradients(tiny_model, chosen)
    found = {name: p.grad.clone() for name, p in trainable.parameters.items() if p.grad is not None}
    for parameter in trainable.parameters.values():
        parameter.grad = None
    denoiser, chain = tiny_model.denoiser, objective.chain
    with trainable.attach(rng_key=(1, 0)):
        samples = [sample for _, sample in loaded(objective)]
        guidance, noise = objective._guidance_now(samples, chosen.cfg), objective._noise([0, 1], 1)
        states = rollout(denoiser, first_latent(denoiser, noise, chain), chain, guidance)
        end = joint_end(denoiser, states, chain, 2, guidance, stop_gradient)
        total = objective.reward.evaluate(
            tiny_model.autoencoder.pixels(end), [sample.prompt for sample in samples]
        ).total
        (-total).sum().backward()
    assert loss.per_sample.detach().tolist() == pytest.approx((-total).tolist(), rel=1e-4)
    expected = {name: p.grad for name, p in trainable.parameters.items() if p.grad is not None}
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0 and expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("train", TUNE_TARGETS[:4])
def test_only_what_was_asked_for_is_tuned(tiny_model, tmp_path, train):
    before = weights_of(tiny_model)
    tuned = tune(tiny_model, reward(), PROMPTS, config(train=train, steps=2, lora_rank=2), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(before, weights_of(tiny_model), strict=True))
    filled = {"unet": tuned.unet, "text": tuned.text, "lora": tuned.lora}
    wanted = {"text encoder": "text", "UNet": "unet"}.get(train, "lora")
    assert [name for name, part in filled.items() if part] == [wanted]
    if train == "text encoder":
        own = {name: target.tensor for name, target in tiny_model.text_encoder.weights.items()}
        assert tuned.text.keys() == own.keys()
        moved = [name for name, value in tuned.text.items() if not torch.equal(value, own[name])]
        assert len(moved) > 0.9 * len(own)  # the rows of words that no prompt holds stay, and so may a key's bias
    if train == "text encoder LoRA":
        assert all(name.startswith("text_encoders.") for name in tuned.lora)
    if train == "UNet LoRA":
        assert all(name.startswith("diffusion_model.") for name in tuned.lora)


def test_a_tuned_unet_of_v_prediction_says_so(tiny_model, tmp_path):
    """The whole UNet is in the file, so others may load it; the result itself has nothing but weights."""
    denoiser = DiffusersDenoiser(tiny_model.denoiser.network, {**SD1_SCHEDULER, "prediction_type": "v_prediction"})
    model = replace(tiny_model, denoiser=denoiser)
    settings = TrainingSettings(warmup_steps=0)
    tuned = tune(model, reward(), PROMPTS, config(train="UNet", steps=1, settings=settings), tmp_path)
    tensors, metadata = read_tensors(tuned.path)
    assert {"v_pred", "model.diffusion_model.v_pred"} <= tensors.keys()
    assert metadata["modelspec.predict_key"] == "v" and len(tuned.unet) == len(tensors) - 2


def test_the_reward_rises(tiny_model, tmp_path):
    """Always the same prompt; a random decoder gives pictures that a few steps of the UNet can move."""
    chosen = config(train="UNet", steps=12, batch_size=1, learning_rate=2e-3, gradient_steps=4, cfg=1.0)
    chosen = replace(chosen, settings=TrainingSettings(warmup_steps=1, lr_schedule="constant"))
    tune(tiny_model, reward(), PROMPTS[:1], chosen, tmp_path)
    rewards = [row["reward"] for row in rows(tmp_path) if "event" not in row]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    assert {"demo aesthetic", "demo CLIP", "demo CLIP normalised"} <= rows(tmp_path)[-1].keys()


@pytest.mark.parametrize("method", ["last K", "random K", "one step"])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_model, tmp_path, method):
    class Dies(Callbacks):
        def on_step(self, info):
            if info.step == 3:
                raise KeyboardInterrupt

    samples = SamplePrompts(prompts=("a red circle",), every=4, steps=2, cfg=2.0, width=32, height=32)
    whole = config(method=method, samples=samples)

    def digest(root):
        return [
            hashlib.sha256((root / "r" / name).read_bytes()).hexdigest()
            for name in ("metrics.jsonl", "tuned.safetensors")
        ]

    tune(tiny_model, reward(), PROMPTS, whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_model, reward(), PROMPTS, whole, tmp_path / "stopped", Dies())
    tune(tiny_model, reward(), PROMPTS, whole, tmp_path / "stopped")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    assert any(row.get("event") == "validation" for row in rows(tmp_path / "whole"))


def test_how_many_steps_are_gone_through(tiny_model):
    def chosen(method):
        objective = RewardObjective(tiny_model, reward(), config(method=method), None, text_trains=False)
        return [objective._chosen_steps(step) for step in range(1, 30)]

    assert set(map(str, chosen("last K"))) == {"[2, 3]"}
    assert set(map(str, chosen("random K"))) == {"[3]", "[2, 3]"}
    assert set(map(str, chosen("one step"))) == {"[3]", "[2]"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_steps": 5}, "gradient_steps is 5; expected at most sampling_steps, 4"),
        ({"width": 30}, "expected multiples of 8"),
        ({"train": "VAE"}, "train is 'VAE'"),
    ],
)
def test_what_cannot_be_asked_for(changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


def test_what_the_model_lacks(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="the text encoder has no projection"):
        tune(tiny_model, reward(), PROMPTS, config(train="projection"), tmp_path)
    with pytest.raises(ValueError, match="prompts hold no prompts"):
        tune(tiny_model, reward(), [], config(), tmp_path)


def test_the_command_line_tunes_and_logs_what_it_holds_out(tmp_path, capsys):
    from retune.training.__main__ import main

    (tmp_path / "p.txt").write_text("two small red circles\n", encoding="utf-8")
    sizes = "--steps 1 --batch-size 1 --gradient-steps 1 --sampling-steps 2 --width 64 --height 64 --lora-rank 2"
    arguments = ["reward", "--model", "demo", "--prompts", str(tmp_path / "p.txt"), *sizes.split(), "--run-name", "r"]
    arguments += ["--rewards", "demo aesthetic,weight=2", "--held-out", "demo CLIP", "--train", "text encoder LoRA"]
    assert main([*arguments, "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["run"] == str(tmp_path / "r")
    (row,) = (row for row in rows(tmp_path) if "event" not in row)
    assert row["reward"] == pytest.approx(2 * row["demo aesthetic normalised"]) and "demo CLIP" in row
    assert main([*arguments, "--rewards", "demo CLIP,wait=2", "--output", str(tmp_path)]) == 2
    assert "has 'wait'" in capsys.readouterr().err
