"""The guard of a reward tuning: its rule by closed forms, what it measures, exact resume, a collapse that is caught."""

import json
import math
import shutil

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.config.guard import GuardRule
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import former_identity, identity
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.prompts import Prompt
from retune.training.evaluation.diversity_guard import Guard, GuardMeasurement
from retune.training.evaluation.guard_pictures import guard_prompts, measure_variety
from retune.training.recipes.reward import tune
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.rewards.scale import PRIOR_COUNT
from retune.training.runs.outcome import describe_guard

PROMPTS = [Prompt("a red circle"), Prompt("two small blue squares"), Prompt("a green star, white background")]


DRAWN = (
    "two small red circles on the left, white background",
    "one large blue cross in the centre, black background",
    "three small green squares at the top, grey background",
    "one large yellow ring on the right, blue background",
)


def reward():
    """One term that is trained on, one that is held out."""
    kinds = {"demo aesthetic": 1.0, "demo CLIP": 0.0}
    return CombinedReward([Term(reward=load_reward(RewardConfig(kind=k)), weight=w) for k, w in kinds.items()])


def config(**changes):
    values = {
        "run_name": "r",
        "steps": 7,
        "batch_size": 2,
        "learning_rate": 3e-3,
        "train": "UNet",
        "gradient_steps": 1,
        "sampling_steps": 2,
        "cfg": 2.0,
        "width": 32,
        "height": 32,
        "guard_diversity": 0.6,
        "guard_prompts": 2,
        "guard_images": 2,
        "settings": TrainingSettings(warmup_steps=1, lr_schedule="constant", save_every=3, validate_every=2),
    }
    return RewardTuneConfig(**(values | changes))


FALLING = {"seed": 8, "learning_rate": 1.2e-2, "guard_diversity": 0.95}
"""Changes of `config` with which pictures grow alike at step 6, and better in the eyes of the reward."""


def rows(root, event=None):
    path = root / "r" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if row.get("event") == event]


def seen(score, diversity):
    """Four pictures; the held-out term is ten times the other."""
    raw = {"good": [score - 1, score, score, score + 1], "held out": [10 * score] * 4}
    return GuardMeasurement(
        raw, {"good": [min(one, 5.0) for one in raw["good"]], "held out": [0.0] * 4}, {"diversity": diversity}
    )


CHECKS = [(1.0, 0.4), (2.0, 0.36), (3.0, 0.30), (9.0, 0.2), (2.5, 0.35), (2.5, 0.5)]
"""Scores and diversities: the fourth is the best reward and far too uniform."""


@pytest.mark.parametrize(
    ("floor", "action", "stop", "best", "fell"),
    [
        (0.7, "stop", 30, 20, 30),
        (0.7, "keep best", None, 20, 30),
        (0.8, "stop", 20, 10, 20),
        (0.8, "keep best", None, 40, 20),  # the later one of two equals is not better
        (0.95, "stop", 10, 0, 10),
        (0.95, "keep best", None, 50, 10),
        (0.1, "stop", None, 30, None),
    ],
)
def test_the_first_check_below_the_floor_ends_a_run_and_the_best_one_above_it_is_kept(floor, action, stop, best, fell):
    guard = Guard(GuardRule(floor, action), None, {"good": 2.0, "held out": 0.0}, {"good": 0.5, "held out": 1.0})
    for number, check in enumerate(CHECKS):
        row = guard.update(10 * number, seen(*check))
        if guard.should_stop:
            break
    assert (row["step"] if guard.should_stop else None) == stop
    assert (guard.state.best_step, guard.state.first_step_below) == (best, fell)
    assert guard.rule.chooses(guard.should_stop) == (stop is not None or action == "keep best")
    again = Guard(guard.rule, None, {}, {})
    again.state = type(guard.state)(**json.loads(json.dumps(vars(guard.state))))
    assert again.state == guard.state and again.should_stop == guard.should_stop


def test_the_rewards_of_two_checks_compare_on_the_scale_of_the_first():
    guard = Guard(GuardRule(0.5), None, {"good": 2.0, "held out": 0.0}, {"good": 0.5, "held out": 1.0})
    first, second = guard.update(0, seen(1.0, 0.4)), guard.update(10, seen(6.0, 0.3))
    scale = math.sqrt((PRIOR_COUNT * 0.5**2 + 2.0) / (PRIOR_COUNT + 4))  # squares of 0, 1, 1, 2 about 1 sum up to 2
    assert first["reward"] == pytest.approx(2 * 1.0 / scale)
    assert second["reward"] == pytest.approx(2 * 5.0 / scale)  # 5, 6, 6, 7, each counted up to its target of 5
    assert (second["good"], second["held out"], second["diversity"]) == pytest.approx((6.0, 60.0, 0.3))
    assert second["gains"]["good"] == pytest.approx(5.0 / scale)
    assert second["gains"]["held out"] == pytest.approx(50 / math.sqrt(16 / 20))
    assert second["shares"] == pytest.approx({"diversity": 0.75}) and second["held_out"] == ["held out"]
    with pytest.raises(ValueError, match="diversity of the guard's pictures is 1e-08 at the start"):
        Guard(GuardRule(0.5), None, {"good": 1.0}, {"good": 1.0, "held out": 1.0}).update(0, seen(1.0, 1e-8))


def test_variety_is_that_of_each_prompts_pictures():
    axes = torch.eye(3)
    found = measure_variety(
        torch.stack([axes[:2], axes[[2, 2]]])
    )  # one prompt's pictures all different, the other's equal
    assert found["diversity"] == pytest.approx(0.5)
    assert found["vendi"] == pytest.approx(2**1.5)  # eigenvalues 1/2, 1/4, 1/4
    assert found["distance"] == pytest.approx(5 / 6)


def test_held_out_prompts_come_first_and_none_twice():
    held_out, training = [Prompt("c")], [Prompt("a"), Prompt("c"), Prompt("a"), Prompt("b"), Prompt("d")]
    assert guard_prompts(training, held_out, config(guard_prompts=3)) == ["c", "a", "b"]
    assert guard_prompts(training, held_out, config(guard_diversity=0.0)) == []


class Copies(Callbacks):
    """Keeps the runs' folder as it is on the disk at some moments, as a process that is killed then leaves it."""

    def __init__(self, root):
        self.root, self.step, self.left, self.said = root, 0, [], []

    def keep(self):
        self.left.append(self.root.with_name(f"killed {len(self.left)}"))
        shutil.copytree(self.root, self.left[-1])

    def before_step(self, step):
        self.step = step
        if step in (1, 5):  # just after the guard's checks at 0, where no state is saved yet, and at 4
            self.keep()

    def on_text(self, text):
        self.said.append(text)
        if self.step == 4 and len(self.left) == 1 and "guard's pictures (2/4)" in text:
            self.keep()


def results(root):
    names = ("status.json", "metrics.jsonl", "tuned.safetensors")
    return [(root / "r" / name).read_bytes() for name in names]


@pytest.mark.slow
def test_a_run_ends_where_its_pictures_grow_alike_also_when_it_is_killed_and_can_go_on(tiny_model, tmp_path):
    whole, left = tmp_path / "whole", Copies(tmp_path / "whole")
    tuned = tune(tiny_model, reward(), PROMPTS, config(**FALLING), whole, left)
    checks, status = rows(whole, "guard"), json.loads(results(whole)[0])
    fallen = [row["step"] for row in checks if row["shares"]["diversity"] < 0.95]
    assert fallen == [6] == [status["guard"]["fell_at"]] and len(rows(whole)) == status["step"] == 6
    assert status["result"] == "guard" and status["best_step"] == 4
    assert max(checks[:-1], key=lambda row: row["reward"])["step"] == 4 and checks[-1]["reward"] > checks[2]["reward"]
    assert left.said[-1].endswith("below 95 %; the result is that of step 4") and len(left.left) == 3
    about = read_tensors(tuned.path)[1]["retune.run"]
    assert json.loads(about)["best_step"] == 4
    shorter = tune(
        tiny_model, reward(), PROMPTS, config(**FALLING | {"steps": 4, "guard_diversity": 0.01}), tmp_path / "shorter"
    )
    assert all(torch.equal(value, shorter.unet[name]) for name, value in tuned.unet.items())
    for root in left.left:
        tune(tiny_model, reward(), PROMPTS, config(**FALLING), root)
        assert results(root) == results(whole)

    again = Copies(whole)
    tune(tiny_model, reward(), PROMPTS, config(**FALLING), whole, again)
    (said,) = again.said
    assert said.startswith("run r is finished; reading its result; the guard ended it: diversity is ")
    fresh = tmp_path / "fresh"
    for root in (whole, fresh):
        tune(tiny_model, reward(), PROMPTS, config(**FALLING, guard_action="keep best"), root)
    assert results(whole) == results(fresh) and len(rows(whole)) == 7
    status = json.loads(results(whole)[0])
    allowed = [row for row in rows(whole, "guard") if row["shares"]["diversity"] >= 0.95]
    assert status["guard"]["stopped"] is False and status["guard"]["fell_at"] == 6
    assert status["best_step"] == max(allowed, key=lambda row: row["reward"])["step"] != 6


def test_a_best_file_of_a_step_that_the_run_has_not_come_to_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "r" / "state"
    tune(tiny_model, reward(), PROMPTS, config(steps=2, guard_action="keep best"), tmp_path)
    tensors, _ = read_tensors(folder / "guarded.safetensors")
    write_tensors(folder / "guarded.safetensors", tensors, {"step": "9"})
    (tmp_path / "r" / "tuned.safetensors").unlink()
    with pytest.raises(ValueError, match="guarded.safetensors is of step 9; expected step 2"):
        tune(tiny_model, reward(), PROMPTS, config(steps=2, guard_action="keep best"), tmp_path)


def test_what_a_run_without_a_guard_was_it_stays():
    ours, before = identity(config()), former_identity(config())
    assert "guard_action" not in ours and ours["guard_diversity"] == 0.6
    assert (before["guard_diversity"], before["guard_prompts"], before["guard_images"]) == (0.0, 4, 4)
    assert config(guard_diversity=0.0).guard_rule is None
    settings = TrainingSettings(result="best", validation_fraction=0.3)
    with pytest.raises(ValueError, match="result is 'best' and guard_action is 'keep best'"):
        config(guard_action="keep best", settings=settings)
    assert config(guard_action="stop", settings=settings).guard_rule.floor == 0.6


def test_what_a_guard_did_is_said_in_words():
    def words(first_step_below, stopped, **status):
        return describe_guard(
            {"guard": {"floor": 0.8, "share": 0.715, "fell_at": first_step_below, "stopped": stopped}, **status}
        )

    assert describe_guard({"state": "finished", "result": "last"}) == ""
    assert words(8, True, result="guard", best_step=6) == (
        "; the guard ended it: diversity is 72 % of the start's, below 80 %; the result is that of step 6"
    )
    assert words(2, True, result="guard", best_step=0).endswith("; the result is that of step 0, untuned")
    chose = "; the guard chose among its checks: diversity fell below 80 % of the start's"
    assert words(8, False, result="guard", best_step=4) == f"{chose} at step 8; the result is that of step 4"
    assert words(None, False, result="guard", best_step=4) == f"{chose} never; the result is that of step 4"
    assert words(None, False, result="last") == "; its guard found diversity at 72 % of the start's"


def test_a_collapse_of_the_demo_model_is_caught(tmp_path):
    """A high learning rate on one reward: it rises with every check, while the pictures grow alike and fit less."""
    from retune.training.commands.open_model import ModelConfig, build_model

    model = build_model(ModelConfig(model="demo", device="cpu"))
    settings = TrainingSettings(warmup_steps=1, lr_schedule="constant", validate_every=2)
    changes = {"train": "text encoder", "learning_rate": 7e-4, "batch_size": 4, "sampling_steps": 6, "cfg": 2.5}
    changes |= {"width": 64, "height": 64, "guard_images": 4, "settings": settings}
    tune(model, reward(), [Prompt(text) for text in DRAWN], config(**changes), tmp_path)
    checks, status = rows(tmp_path, "guard"), json.loads(results(tmp_path)[0])
    assert status["guard"]["stopped"] and status["step"] == checks[-1]["step"] < 7
    assert checks[-1]["shares"]["diversity"] < 0.6 <= min(row["shares"]["diversity"] for row in checks[:-1])
    for name, falls in (("reward", False), ("demo aesthetic", False), ("demo CLIP", True)):
        values = [row[name] for row in checks]
        assert values == sorted(values, reverse=falls), name
    assert status["best_step"] == checks[-2]["step"]
