"""Reward nodes through the real ComfyUI: scores equal the core's, files are listed, errors name what is wanted."""

import json
from pathlib import Path

import folder_paths
import pytest
import torch
from retune.nodes.bridge.score import prompt_of_each
from retune.nodes.reward import RetuneCombineRewards, RetuneDiversity, RetuneLoadReward, RetuneScoreImages
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.diversity import diversity
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.rewards.score import score_images
from safetensors.torch import save_file

WORKFLOW = Path(__file__).parents[1] / "workflows" / "score_images.json"
PROMPTS = ["a red circle on the left", "two small blue squares", "a green star"]


@pytest.fixture
def images(comfyui):
    """An IMAGE batch as nodes get it: made under inference mode, (B, H, W, C)."""
    with torch.inference_mode():
        return torch.rand(3, 100, 140, 3, generator=torch.Generator().manual_seed(0))


def load(kind, file="none", weight=1.0, **more):
    with torch.inference_mode():
        return RetuneLoadReward.execute(kind, file, weight, **more).args[0]


def core(kind, **term):
    return Term(reward=load_reward(RewardConfig(kind=kind)), **term)


def score(images, prompts, reward):
    with torch.inference_mode():
        text, mean, chart = RetuneScoreImages.execute(images, "\n".join(prompts), reward).args
    return json.loads(text), mean, chart


@pytest.mark.parametrize("kind", ["demo aesthetic", "demo CLIP"])
def test_scores_are_the_cores(images, kind):
    found, mean, chart = score(images, PROMPTS, load(kind, weight=3.0))
    plain = images.clone().movedim(-1, 1)
    wanted = core(kind).reward.scores(plain, PROMPTS)
    torch.testing.assert_close(torch.tensor(found["scores"]), wanted, rtol=0, atol=1e-6)
    assert mean == found["mean"] == pytest.approx(wanted.mean().item())
    assert found["std"] == pytest.approx(wanted.std(correction=0).item(), rel=1e-4) and found["reward"] == kind
    assert chart.shape == (1, 480, 720, 3) and chart.std() > 0.05


def test_a_combination_scores_by_weight_target_and_scale(images):
    first, second = load("demo aesthetic", weight=2.0), load("demo CLIP", weight=0.5, limit="hinge", target=0.1)
    with torch.inference_mode():
        given = {"reward0": first, "reward1": second, "reward2": None}
        both = RetuneCombineRewards.execute(given, 0.8, 1.0).args[0]
    assert both.augmentation.smallest_crop == 0.8
    found, _, _ = score(images, PROMPTS, both)
    terms = [core("demo aesthetic", weight=2.0), core("demo CLIP", weight=0.5, target=0.1)]
    wanted = score_images(CombinedReward(terms), list(images.clone().movedim(-1, 1)), PROMPTS)
    assert found == json.loads(json.dumps(wanted.as_dict())) and set(found["terms"]) == {"demo aesthetic", "demo CLIP"}
    assert score(images, PROMPTS, both)[0] == found  # running scales do not move


def test_diversity_is_the_cores(images):
    with torch.inference_mode():
        vendi, report = RetuneDiversity.execute(images, load("demo CLIP")).args
    assert vendi == pytest.approx(diversity(images.clone().movedim(-1, 1), core("demo CLIP").reward).vendi)
    assert "3 images" in report


def test_a_loaded_reward_is_managed_and_trains_images_afterwards(images):
    """Loaded and scored under inference mode, it must still give gradients."""
    import comfy.model_management

    reward = load("demo CLIP")
    score(images, PROMPTS, reward)
    assert reward.patchers[0] in [loaded.model for loaded in comfy.model_management.current_loaded_models]
    weights = sum(p.nbytes for p in reward.terms[0].reward.network.parameters())
    assert reward.patchers[0].model_size() == pytest.approx(weights, rel=0.01)
    reward.load(3, gradient=True)
    with torch.inference_mode(False):
        _, gradient = reward.combined().value_and_gradient(images.clone().movedim(-1, 1), PROMPTS)
    assert gradient.any()
    comfy.model_management.unload_all_models()
    assert score(images, PROMPTS, reward)[0]["scores"]


def test_copies_for_a_run_in_half_precision_are_managed_and_the_reward_stays_as_it_was(images):
    import comfy.model_management

    reward = load("demo CLIP")
    expected = score(images, PROMPTS, reward)
    both = type(reward).joined([reward, reward])
    assert both.in_half(torch.float32) is both
    with torch.inference_mode():
        half = both.in_half(torch.bfloat16)
    assert half.patchers[0] is half.patchers[1] and half.terms[0].reward is half.terms[1].reward
    half.load(3, gradient=True)
    loaded = [each.model for each in comfy.model_management.current_loaded_models]
    assert half.patchers[0] in loaded and reward.patchers[0] not in loaded
    assert half.patchers[0].loaded_size() == half.patchers[0].model_size() < 0.6 * reward.patchers[0].model_size()
    with torch.inference_mode(False):
        scores, gradient = half.combined().value_and_gradient(images.clone().movedim(-1, 1), PROMPTS)
    wanted = torch.tensor(expected[0]["scores"])
    torch.testing.assert_close(scores.raw["demo CLIP"], wanted, rtol=0, atol=0.1 * half.terms[0].reward.typical_scale)
    assert gradient.any() and score(images, PROMPTS, reward)[0] == expected[0]


def test_files_of_the_reward_folder_are_offered_and_read(images):
    folder = Path(folder_paths.models_dir) / "retune_rewards"
    folder.mkdir(exist_ok=True)
    tower = Path(folder_paths.get_folder_paths("clip_vision")[0])
    tower.mkdir(parents=True, exist_ok=True)
    core_clip = core("demo CLIP").reward.network
    save_file({"weight": torch.full((1, 64), 2.0), "bias": torch.ones(1)}, folder / "head.safetensors")
    (folder / "notes.txt").touch()
    state = {name: tensor.contiguous() for name, tensor in core_clip.vision.state_dict().items()}
    save_file(state, tower / "tower.safetensors")
    inputs = {i.id: i for i in RetuneLoadReward.define_schema().inputs}
    assert inputs["file"].options == ["none", "head.safetensors"]
    assert "tower.safetensors" in inputs["image_tower"].options
    reward = load("aesthetic", "head.safetensors", image_tower="tower.safetensors")
    embeddings = reward.combined().image_embeddings(images.clone().movedim(-1, 1))
    wanted = 1 + 2 * embeddings.sum(-1)
    torch.testing.assert_close(torch.tensor(score(images, [], reward)[0]["scores"]), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("aesthetic", "improved-aesthetic-predictor.*models/retune_rewards"),
        ("PickScore", "yuvalkirstain/PickScore_v1.*models/retune_rewards"),
        ("HPSv2", "xswu/HPSv2.*models/retune_rewards"),
    ],
)
def test_a_missing_file_is_named_with_source_and_folder(comfyui, kind, wanted):
    with pytest.raises(ValueError, match=wanted):
        load(kind)


def test_prompts_are_one_for_all_or_one_each(images):
    assert prompt_of_each("one\n", 2, True) == ["one", "one"] and prompt_of_each("a\n\nb", 2, True) == ["a", "b"]
    assert prompt_of_each("", 2, False) == ["", ""]
    for lines in ([], PROMPTS[:2]):
        with pytest.raises(ValueError, match=f"prompts are {len(lines)} lines for 3 images"):
            score(images, lines, load("demo CLIP"))
    with pytest.raises(ValueError, match="reward is empty"):
        RetuneCombineRewards.execute({})


def test_the_workflow_runs_in_comfyui(comfyui_server):
    outputs = comfyui_server.run(json.loads(WORKFLOW.read_text(encoding="utf-8")))
    found = json.loads(outputs["7"]["text"][0])
    assert len(found["scores"]) == 12 and set(found["terms"]) == {"demo aesthetic", "demo CLIP"}
    assert "Vendi score" in outputs["8"]["text"][0] and len(outputs["5"]["images"]) == 1
