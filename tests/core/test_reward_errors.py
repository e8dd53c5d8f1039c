"""Mistakes in a reward tuning are reported before it begins, and a reward that fails leaves the run's state."""

import json
import math
from pathlib import Path

import pytest
import torch
from retune.training.__main__ import main
from retune.training.common.callbacks import Callbacks
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.prompts import Prompt
from retune.training.demo.files import weights_path
from retune.training.recipes.reward import tune
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward

PROMPTS = [Prompt("a red circle"), Prompt("two small blue squares")]


def config(**changes):
    sizes = {"gradient_steps": 1, "sampling_steps": 2, "cfg": 1.0, "width": 32, "height": 32, "lora_rank": 2}
    settings = TrainingSettings(warmup_steps=1, save_every=1)
    values = {"run_name": "r", "steps": 4, "learning_rate": 1e-3, "train": "UNet LoRA", "settings": settings, **sizes}
    return RewardTuneConfig(**(values | changes))


def combined(*kinds, weight=1.0):
    return CombinedReward([Term(reward=load_reward(RewardConfig(kind=kind)), weight=weight) for kind in kinds])


@pytest.mark.parametrize("verb", ["reward", "score", "evaluate"])
def test_a_missing_or_wrong_reward_file_names_itself_its_source_and_its_folder(verb, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n", encoding="utf-8")
    flags = ["--model", "demo", "--prompts", str(tmp_path / "p.txt"), "--run-name", "r", "--output", str(tmp_path)]
    flags = ["--images", str(tmp_path)] if verb == "score" else flags
    wrong = weights_path("demo.safetensors")
    for reward, words in (
        (f"PickScore,file={tmp_path / 'nowhere.safetensors'}", ("nowhere.safetensors does not exist", "PickScore_v1")),
        ("HPSv2", ("HPSv2 needs a file", "https://huggingface.co/xswu/HPSv2")),
        (f"CLIP,file={wrong}", (wrong.name, "https://huggingface.co/openai/clip-vit-large-patch14")),
    ):
        assert main([verb, *flags, "--rewards", reward]) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in (*words, "models/retune_rewards")), message
    assert not (tmp_path / "r").exists()


def test_no_prompts_and_nothing_to_maximise(tmp_path, tiny_model, capsys):
    (tmp_path / "p.txt").write_text("# nothing\n\n", encoding="utf-8")
    flags = ["reward", "--model", "demo", "--prompts", str(tmp_path / "p.txt"), "--run-name", "r"]
    assert main([*flags, "--rewards", "demo CLIP", "--output", str(tmp_path)]) == 2
    assert "p.txt hold no prompts; expected at least one" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all have weight 0; expected one that is maximised"):
        tune(tiny_model, combined("demo CLIP", weight=0.0), PROMPTS, config(), tmp_path)
    assert not Path(tmp_path / "r").exists()


def test_a_reward_without_gradient_is_refused_and_may_be_logged(tiny_model, tmp_path):
    class Rounded:
        """A score in whole steps: nothing to follow."""

        def __init__(self, reward):
            self.reward = reward

        def __getattr__(self, name):
            return getattr(self.reward, name)

        def scores(self, images, prompts):
            return self.reward.scores(images, prompts).detach().round()

    rounded = Rounded(load_reward(RewardConfig(kind="demo CLIP")))
    with pytest.raises(ValueError, match="demo CLIP gives no gradient to the pictures"):
        tune(tiny_model, CombinedReward([Term(reward=rounded)]), PROMPTS, config(), tmp_path)
    terms = [Term(reward=load_reward(RewardConfig(kind="demo aesthetic"))), Term(reward=rounded, weight=0.0)]
    tune(tiny_model, CombinedReward(terms), PROMPTS, config(run_name="logged", steps=1), tmp_path)
    row = json.loads((tmp_path / "logged" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["demo CLIP"] == round(row["demo CLIP"])


def test_a_reward_that_gives_nan_leaves_the_state(tiny_model, tmp_path):
    reward = combined("demo aesthetic")
    parameter = next(reward.network.parameters())
    original = parameter.detach().clone()

    class Breaks(Callbacks):
        def on_step(self, info):
            if info.step == 2:
                parameter.data.fill_(math.nan)

    with pytest.raises(ValueError, match="demo aesthetic gives NaN or infinity for 1 of 1 images"):
        tune(tiny_model, reward, PROMPTS, config(), tmp_path / "broken", Breaks())
    status = json.loads((tmp_path / "broken" / "r" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2) and "demo aesthetic" in status["message"]
    parameter.data.copy_(original)
    again = tune(tiny_model, reward, PROMPTS, config(), tmp_path / "broken")
    whole = tune(tiny_model, combined("demo aesthetic"), PROMPTS, config(), tmp_path / "whole")
    assert all(torch.equal(value, whole.lora[name]) for name, value in again.lora.items())
    metrics = [(tmp_path / root / "r" / "metrics.jsonl").read_bytes() for root in ("broken", "whole")]
    assert metrics[0] == metrics[1]
