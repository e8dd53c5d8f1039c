"""Reward tuning through ComfyUI: the core's numbers, results as patches, nothing left behind."""

import gc
import json
from contextlib import nullcontext

import pytest
import torch
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.prompts import Prompt
from retune.training.rewards.load import RewardConfig

PROMPTS = [Prompt("a red circle on the left"), Prompt("two small blue squares")]


@pytest.fixture
def judge(comfyui):
    from retune.nodes.bridge.rewards import ManagedReward

    with torch.inference_mode():
        return ManagedReward.open(RewardConfig(kind="demo aesthetic"), weight=1.0)


def config(**changes):
    values = {
        "run_name": "r",
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "gradient_steps": 2,
        "sampling_steps": 3,
        "cfg": 2.0,
        "width": 64,
        "height": 64,
        "lora_rank": 2,
        "settings": TrainingSettings(warmup_steps=1),
    }
    return RewardTuneConfig(**(values | changes))


def state_of(*patchers):
    return [{k: v.clone() for k, v in patcher.model.state_dict().items()} for patcher in patchers]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


@pytest.mark.parametrize("train", ["text encoder", "UNet LoRA"])
def test_both_implementations_tune_alike(demo, core_demo, judge, tmp_path, train):
    from retune.nodes.bridge.reward_tuning import ready_to_tune
    from retune.training.recipes.reward import tune
    from retune.training.rewards.combined import CombinedReward

    model, clip, vae = demo
    chosen = config(train=train, settings=TrainingSettings(warmup_steps=1, optimizer="SGD"))
    core = tune(core_demo, CombinedReward(judge.terms), PROMPTS, chosen, tmp_path / "core")
    patchers = (model, clip.patcher, vae.patcher)
    before = state_of(*patchers)
    with torch.inference_mode(), ready_to_tune(model, clip, vae, judge) as (view, rewards):
        ours = tune(view, rewards, PROMPTS, chosen, tmp_path / "comfyui")
    assert losses(tmp_path / "comfyui") == pytest.approx(losses(tmp_path / "core"), rel=1e-3)
    for name in ("text", "lora"):
        found, expected = getattr(ours, name), getattr(core, name)
        common = found.keys() & expected.keys()
        assert len(common) == len(expected)
        for key in common:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5, msg=key)
    after = state_of(*patchers)
    assert all(
        torch.equal(new[key], value) for old, new in zip(before, after, strict=True) for key, value in old.items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for p in patchers for m in p.model.modules())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_run_in_bf16_holds_the_reward_in_bf16_for_itself_alone(demo, judge, monkeypatch, error):
    from comfy.model_management import loaded_models
    from retune.nodes.reward_tune import RetuneRewardTune
    from retune.training.rewards.combined import CombinedReward

    score, dtypes, before = CombinedReward.value_and_gradient, [], state_of(judge.patchers[0])

    def scored(self, *arguments):
        dtypes.append({p.dtype for name, p in self.network.named_parameters() if name.endswith("fc1.weight")})
        if error is not None:
            raise error
        return score(self, *arguments)

    monkeypatch.setattr(CombinedReward, "value_and_gradient", scored)
    node, chosen = RetuneRewardTune.PREPARE_CLASS_CLONE(None), config(steps=1)
    names = ("steps", "batch_size", "learning_rate", "gradient_steps", "sampling_steps", "cfg", "width", "height")
    values = {name: getattr(chosen, name) for name in names} | {"method": "last K", "seed": 0, "lora_rank": 2}
    values |= {
        "train": "UNet LoRA",
        "run_name": f"in bf16 {error is None}",
        "clip_constraint": 0.0,
        "prompts": "a red circle",
    }
    values["settings"] = TrainingSettings(warmup_steps=0, precision="bf16")
    with torch.inference_mode(), pytest.raises(error) if error else nullcontext():
        run = node.execute(*demo, judge, **values).args[3]
        assert json.loads((run / "config.json").read_text())["identity"]["settings"]["precision"] == "bf16"
    assert dtypes and all(found == {torch.bfloat16} for found in dtypes)
    (after,) = state_of(judge.patchers[0])
    assert all(
        after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before[0].items()
    )
    gc.collect()
    assert not [p for p in loaded_models() if p.model is not judge.patchers[0].model and hasattr(p.model, "towers")]


@pytest.mark.parametrize("train", ["text encoder", "text encoder LoRA", "UNet", "UNet LoRA"])
def test_the_node_hands_out_what_was_tuned(demo, judge, sampled, train):
    from retune.nodes.reward_tune import RetuneRewardTune

    model, clip, vae = demo
    node = RetuneRewardTune.PREPARE_CLASS_CLONE(None)
    names = ("steps", "batch_size", "learning_rate", "gradient_steps", "sampling_steps", "cfg", "width", "height")
    chosen = config()
    values = {name: getattr(chosen, name) for name in names} | {"method": "last K", "seed": 0, "lora_rank": 2}
    values |= {"train": train, "run_name": f"tuned {train} of a test", "clip_constraint": 0.0}
    values["prompts"] = "\n".join(prompt.text for prompt in PROMPTS)

    def encoded(one):
        return one.encode_from_tokens(one.tokenize("a red circle on the left"))

    with torch.inference_mode():
        tuned_model, tuned_clip, lora, run = node.execute(model, clip, vae, judge, **values).args
        assert torch.equal(encoded(tuned_clip), encoded(clip)) == train.startswith("UNet")
        assert torch.equal(sampled(tuned_model, clip), sampled(model, clip)) == train.startswith("text")
    assert bool(lora) == train.endswith("LoRA")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("train", ["text encoder LoRA", "UNet"])
def test_direct_tuning_and_constraints_are_the_cores(demo, core_demo, judge, pictures, tmp_path, train):
    from retune.nodes.bridge.reward_tuning import ready_to_tune
    from retune.training.recipes.reward import tune
    from retune.training.rewards.combined import CombinedReward

    drift = 2.0 if train.startswith("text") else 0.0
    settings = TrainingSettings(warmup_steps=1, optimizer="SGD")
    chosen = config(train=train, method="direct", eps_constraint=3.0, drift_constraint=drift, settings=settings)
    tune(core_demo, CombinedReward(judge.terms), [], chosen, tmp_path / "core", dataset=pictures)
    with torch.inference_mode(), ready_to_tune(*demo, judge) as (view, rewards):
        before = state_of(demo[0], demo[1].patcher)
        tune(view, rewards, [], chosen, tmp_path / "comfyui", dataset=pictures)
    assert losses(tmp_path / "comfyui") == pytest.approx(losses(tmp_path / "core"), rel=1e-3)
    after = state_of(demo[0], demo[1].patcher)
    assert all(torch.equal(new[k], v) for old, new in zip(before, after, strict=True) for k, v in old.items())


def test_a_guard_chooses_the_result_and_the_node_says_so(demo, judge, sampled, monkeypatch):
    """One step far too large: the best weights are either those after it or the start's, as the guard's rows say."""
    from retune.nodes.reward_tune import RetuneRewardTune
    from retune.nodes.ui.progress import NodeCallbacks

    said = []
    monkeypatch.setattr(NodeCallbacks, "_send_text", lambda self, text: said.append(text))
    model, clip, vae = demo
    names = ("batch_size", "gradient_steps", "sampling_steps", "cfg", "width", "height", "lora_rank")
    values = {name: getattr(config(), name) for name in names} | {"method": "last K", "seed": 0, "steps": 1}
    values |= {"train": "UNet LoRA", "run_name": "guarded in a test", "clip_constraint": 0.0, "learning_rate": 5.0}
    values |= {"guard_diversity": 0.9, "guard_action": "keep best", "guard_prompts": 1, "guard_images": 3}
    before = state_of(model, clip.patcher, vae.patcher)
    with torch.inference_mode():
        node = RetuneRewardTune.PREPARE_CLASS_CLONE(None)
        tuned_model, *_, run = node.execute(model, clip, vae, judge, prompts="a red circle", **values).args
        changed = not torch.equal(sampled(tuned_model, clip), sampled(model, clip))
    asked, status = (json.loads((run / name).read_text()) for name in ("config.json", "status.json"))
    assert {name: asked["config"][name] for name in values if name.startswith("guard")} == {
        name: value for name, value in values.items() if name.startswith("guard")
    }
    checks = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in checks if row.get("event") == "guard")
    better = last["reward"] > first["reward"] and last["shares"]["diversity"] >= 0.9
    assert status["best_step"] == int(better) and changed == better
    assert said[-1].startswith("run guarded in a test is finished after 1 steps; the guard chose among its checks")
    after = state_of(model, clip.patcher, vae.patcher)
    assert all(torch.equal(new[key], old[key]) for new, old in zip(after, before, strict=True) for key in old)


def test_the_projection_of_a_t5_is_tuned(demo, judge):
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.nodes.reward_tune import RetuneRewardTune
    from retune.training.text_encoder.projection import Projection

    model, _, vae = demo
    with torch.inference_mode():
        clip = load_t5_clip("demo", Projection(96, 128, seed=3))
        chosen = config()
        names = ("steps", "batch_size", "learning_rate", "gradient_steps", "sampling_steps", "cfg", "width", "height")
        values = {name: getattr(chosen, name) for name in names} | {"method": "one step", "seed": 0}
        values |= {"train": "projection", "run_name": "tuned projection of a test", "clip_constraint": 0.0}
        node = RetuneRewardTune.PREPARE_CLASS_CLONE(None)
        tuned = node.execute(model, clip, vae, judge, prompts="a red circle", **values).args[1]
        ours, before = (one.encode_from_tokens(one.tokenize("a red circle")) for one in (tuned, clip))
    assert not torch.equal(ours, before)


def test_what_is_refused(judge):
    from retune.nodes.bridge.reward_tuning import prompt_list, reward_with_constraint

    with pytest.raises(ValueError, match="clip_constraint is 0.5 and constraint is no reward of kind CLIP"):
        reward_with_constraint(judge, 0.5, judge, None)
    with pytest.raises(ValueError, match="reward is empty"):
        reward_with_constraint(None, 0.0, None, None)
    assert prompt_list(" \n", "") == []
    assert [term.weight for term in reward_with_constraint(judge, 0.0, None, judge).terms] == [1.0, 0.0]
