"""Sums of rewards: normalisation, targets, augmentation, state; and diversity against closed forms."""

import json
import math

import pytest
import torch
from retune.training.__main__ import main
from retune.training.data.images import load_image, save_png
from retune.training.rewards.augment import Augmentation, augmented, draw_augmentation
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.diversity import diversity, lpips_distance, mean_pairwise_distance, vendi_score
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.rewards.scale import PRIOR_COUNT, RunningScale

PROMPTS = ["a red circle on the left", "two small blue squares", "a green star"]


def noise(count=3, side=128, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def draws(count, seed=0):
    return draw_augmentation(count, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    """The demo's rewards: aesthetic, CLIP."""
    return [load_reward(RewardConfig(kind=kind)) for kind in ("demo aesthetic", "demo CLIP")]


def test_scale_is_the_standard_deviation_so_far_with_its_prior():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 20
    one, other = RunningScale(0.5), RunningScale(0.5)
    one.update(scores.tolist())
    for part in scores.split(7):
        other.update(part.tolist())
    squares = (scores - scores.mean()).square().sum().item()
    assert one.scale == pytest.approx(math.sqrt((PRIOR_COUNT * 0.25 + squares) / (PRIOR_COUNT + 50)), rel=1e-12)
    assert one == other and RunningScale(0.5).scale == 0.5
    with pytest.raises(ValueError, match="typical scale"):
        RunningScale(0.0)


def raw_of(scores):
    """The raw scores as numbers, as the host reads them in a step."""
    return {name: raw.tolist() for name, raw in scores.raw.items()}


def test_total_is_the_weighted_sum_of_normalised_terms(pair):
    aesthetic, clip = pair
    combined = CombinedReward([Term(reward=aesthetic, weight=2.0), Term(reward=clip, weight=-0.5)])
    images = noise()
    combined.observe(raw_of(combined.evaluate(images, PROMPTS)))
    first = combined.scales["demo aesthetic"].scale
    scores = combined.evaluate(images, PROMPTS)
    raw = {reward.name: reward.scores(images, PROMPTS) for reward in pair}
    assert list(scores.raw) == list(raw) and all(torch.equal(scores.raw[name], raw[name]) for name in raw)
    wanted = sum(w * raw[n] / combined.scales[n].scale for n, w in zip(raw, (2.0, -0.5), strict=True))
    torch.testing.assert_close(scores.total, wanted, rtol=0, atol=1e-5)
    assert combined.scales["demo aesthetic"].scale == first  # scoring changes nothing
    means = {name: mean.item() for name, mean in scores.means().items()}
    assert means["demo CLIP normalised"] == pytest.approx(means["demo CLIP"] / combined.scales["demo CLIP"].scale)


def test_one_graph_at_a_time_gives_the_joint_gradient(pair):
    terms = [Term(reward=pair[0]), Term(reward=pair[1], weight=3.0), Term(reward=pair[0], weight=0.0)]
    for augmentation in (None, Augmentation()):
        combined = CombinedReward(terms, augmentation)
        images = noise().requires_grad_()
        joint = combined.evaluate(images, PROMPTS, draws(3, 5))
        joint.total.sum().backward()
        with torch.no_grad():
            scores, gradient = combined.value_and_gradient(images, PROMPTS, draws(3, 5))
        torch.testing.assert_close(gradient, images.grad, rtol=1e-5, atol=1e-7)
        assert torch.equal(scores.total, joint.total) and not scores.total.requires_grad
        assert list(scores.raw) == ["demo aesthetic", "demo CLIP", "demo aesthetic 2"]


def test_a_term_of_weight_zero_is_logged_and_gives_no_gradient(pair):
    combined = CombinedReward([Term(reward=pair[0], weight=0.0)])
    scores, gradient = combined.value_and_gradient(noise(), PROMPTS)
    assert not gradient.any() and torch.equal(scores.raw["demo aesthetic"], pair[0].scores(noise(), PROMPTS))


def test_targets_stop_or_turn_the_gradient(pair):
    aesthetic, images = pair[0], noise()
    raw = aesthetic.scores(images, PROMPTS)
    target = raw.median().item()

    def gradient_of(**options):
        term = Term(reward=aesthetic, **options)
        scores, gradient = CombinedReward([term]).value_and_gradient(images, PROMPTS)
        return scores.total * aesthetic.typical_scale, gradient

    _, plain = gradient_of()
    total, hinge = gradient_of(target=target)
    torch.testing.assert_close(total, raw.clamp(max=target))
    total, distance = gradient_of(target=target, form="distance")
    torch.testing.assert_close(total, -(raw - target).abs())
    for i, score in enumerate(raw.tolist()):
        if score < target:
            assert torch.equal(hinge[i], plain[i]) and torch.equal(distance[i], plain[i])
        if score > target:
            assert not hinge[i].any() and torch.equal(distance[i], -plain[i])


def test_state_goes_through_json_bit_for_bit_and_names_other_rewards(pair):
    terms = [Term(reward=reward) for reward in pair]
    one, other = CombinedReward(terms), CombinedReward(terms)
    for seed in range(3):
        one.observe(raw_of(one.evaluate(noise(seed=seed), PROMPTS)))
    other.load_state(json.loads(json.dumps(one.state())))
    for combined in (one, other):
        combined.observe(raw_of(combined.evaluate(noise(seed=9), PROMPTS)))
    assert one.state() == other.state() and one.state()["demo CLIP"]["count"] == 12
    assert torch.equal(one.scores(noise(), PROMPTS), other.scores(noise(), PROMPTS))
    with pytest.raises(ValueError, match="expected demo aesthetic."):
        CombinedReward(terms[:1]).load_state(one.state())
    with pytest.raises(ValueError, match="rewards are empty"):
        CombinedReward([])
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != CombinedReward([terms[0], Term(reward=pair[1], weight=2.0)]).fingerprint


def test_augmentation_is_drawn_from_its_generator_alone(pair):
    images, augmentation = noise(2, 64), Augmentation(smallest_crop=0.5)
    state = torch.get_rng_state()
    one, same, other = (augmented(images, augmentation, draws(2, seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert one.shape == images.shape and torch.equal(one, same) and not torch.equal(one, other)
    off = augmented(images, Augmentation(smallest_crop=1, smallest_resize=1), draws(2))
    assert torch.equal(off, images)
    combined = CombinedReward([Term(reward=pair[1])], augmentation)
    plain = pair[1].scores(images, PROMPTS[:2]) / combined.scales["demo CLIP"].scale
    assert torch.equal(combined.scores(images, PROMPTS[:2]), plain)
    assert not torch.equal(combined.evaluate(images, PROMPTS[:2], draws(2)).total, plain)
    with pytest.raises(ValueError, match="smallest_crop is 0"):
        Augmentation(smallest_crop=0)


def test_crops_lie_where_they_are_drawn():
    """A picture whose value is its column: a crop of half the side spans half the range."""
    columns = torch.linspace(0, 1, 64).expand(40, 3, 64, 64)
    crops = augmented(columns, Augmentation(smallest_crop=0.5, smallest_resize=1), draws(40))
    spans = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert spans.min() > 0.45 and spans.max() < 1.01 and spans.std() > 0.1
    assert crops[:, 0, 0, 0].min() < 0.05 and crops[:, 0, 0, -1].max() > 0.95


def test_vendi_and_distance_have_their_closed_forms():
    equal, orthogonal = torch.ones(6, 8) / math.sqrt(8), torch.eye(6, 8)
    assert vendi_score(equal) == pytest.approx(1) and mean_pairwise_distance(equal) == pytest.approx(0, abs=1e-6)
    assert vendi_score(orthogonal) == pytest.approx(6) and mean_pairwise_distance(orthogonal) == pytest.approx(1)
    assert vendi_score(torch.eye(3).repeat(2, 1)) == pytest.approx(3)  # three kinds, two of each
    assert mean_pairwise_distance(torch.tensor([[1.0, 0], [-1, 0], [0, 1]])) == pytest.approx(4 / 3)
    share = torch.tensor([0.75, 0.25], dtype=torch.float64)
    wanted = math.exp(-(share * share.log()).sum().item())
    assert vendi_score(torch.eye(2)[[0, 0, 0, 1]]) == pytest.approx(wanted)


def test_diversity_of_images_on_a_rewards_tower(pair):
    images = noise(5)
    found = diversity(images, pair[1])
    assert found.vendi == pytest.approx(vendi_score(pair[1].image_embeddings(images)))
    same_images = diversity(images[:1].repeat(5, 1, 1, 1), CombinedReward([Term(reward=pair[0])]))
    assert same_images.vendi == pytest.approx(1, abs=1e-5) and same_images.distance == pytest.approx(0, abs=1e-5)
    assert found.spread == pytest.approx((found.vendi - 1) / 4)
    assert found.vendi > 1.001 and found.distance > 0.001
    assert "5 images" in found.text() and "left out" in found.text()
    with pytest.raises(ValueError, match="images are 1"):
        diversity(images[:1], pair[0])


def test_command_line_scores_files(picture_folder, tmp_path, capsys, pair):
    images = [load_image(picture_folder / f"{i}.png") for i in range(4)]
    words = [(picture_folder / f"{i}.txt").read_text(encoding="utf-8") for i in range(4)]
    flags = ["score", "--images", str(picture_folder), "--output", str(tmp_path / "out.json"), "--json", "--diversity"]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    wanted = pair[1].scores(torch.stack(images), words)
    torch.testing.assert_close(torch.tensor(found["scores"]), wanted, rtol=0, atol=1e-6)
    assert found["images"] == [f"{i}.png" for i in range(4)] and 1 < found["diversity"]["vendi"] < 4
    save_png(noise(1, 48)[0], picture_folder / "4.png")
    (picture_folder / "one.txt").write_text("a red circle\n", encoding="utf-8")
    several = ["--rewards", "demo aesthetic,weight=2", "demo CLIP,target=0.1,form=distance"]
    assert main([*flags[:3], *several, "--prompts", str(picture_folder / "one.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["scores"]) == 5 and list(found["terms"]) == ["demo aesthetic", "demo CLIP"]
    for more, wanted in [
        ([], "4.txt does not exist"),
        (["--rewards", "demo CLIP,size=3"], "has 'size'; expected activation"),
        (["--rewards", "demo CLIP,weight=much"], "expected a number"),
        (["--rewards", "best"], "kind is 'best'"),
        (["--diversity", "--rewards", "demo aesthetic"], "4.png has another size than 32 x 32"),
    ]:
        assert main([*flags[:3], *more]) == 2 and wanted in capsys.readouterr().err


def test_lpips_is_left_out_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips_distance(noise(3, 64)) is None


def test_lpips_is_the_mean_over_all_pairs(monkeypatch, tmp_path):
    lpips = pytest.importorskip("lpips")
    from torchvision.models import alexnet

    (tmp_path / "checkpoints").mkdir()
    torch.save(alexnet().state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path.parent))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images = noise(7, 64)
    network = lpips.LPIPS(net="alex", verbose=False).eval()
    with torch.no_grad():
        pairs = [network(images[i : i + 1], images[j : j + 1], normalize=True) for i in range(7) for j in range(i)]
    assert lpips_distance(images) == pytest.approx(torch.cat(pairs).mean().item(), rel=1e-5)
