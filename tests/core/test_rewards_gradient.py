"""Gradients of rewards: everywhere, exact, per image, none to their weights; and what they cost in memory."""

import math

import pytest
import torch
from retune.training.loop.precision import autocast
from retune.training.rewards.clip_towers import Towers, tower_state
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.rewards.preprocess import centre_crop, clamp_straight_through
from torch.utils._python_dispatch import TorchDispatchMode

from .conftest import seeded
from .test_rewards import PROMPTS, VISION, noise


@pytest.mark.parametrize("kind", ["demo aesthetic", "demo CLIP"])
def test_gradient_reaches_every_value_and_those_outside_0_to_1(kind):
    reward = load_reward(RewardConfig(kind=kind))
    images = (3 * noise(2, 96, 160) - 1).requires_grad_()  # two thirds of the values are below 0 or above 1
    reward.scores(images, PROMPTS[:2]).sum().backward()
    gradient = centre_crop(images.grad, 96)  # the rest of a wide picture is cut off
    assert torch.isfinite(images.grad).all() and (gradient != 0).float().mean() > 0.999
    outside = (centre_crop(images.detach(), 96) - 0.5).abs() > 0.5
    assert 0.5 < gradient[outside].abs().mean() / gradient[~outside].abs().mean() < 2
    assert torch.equal(reward.scores(images, PROMPTS[:2]), reward.scores(images.clamp(0, 1), PROMPTS[:2]))


def test_gradient_equals_finite_differences():
    reward = load_reward(RewardConfig(kind="demo aesthetic"))
    reward.network.double()
    images = (0.25 + 0.5 * noise(1, 150, 130).double()).requires_grad_()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).double()
    reward.scores(images, PROMPTS[:1]).sum().backward()
    with torch.no_grad():
        up, down = (reward.scores(images + sign * 1e-5 * direction, PROMPTS[:1]) for sign in (1, -1))
    assert ((up - down) / 2e-5).item() == pytest.approx((images.grad * direction).sum().item(), rel=1e-5)


def test_clamp_straight_through_limits_values_and_keeps_the_gradient():
    x = torch.tensor([-0.5, 0.25, 1.5], requires_grad=True)
    y = clamp_straight_through(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.25, 1.0] and x.grad.tolist() == [1.0, 1.0, 1.0]


def test_each_image_is_scored_by_its_own_prompt():
    reward, images = load_reward(RewardConfig(kind="demo CLIP")), noise(3, 128, 128)
    together = reward.scores(images, PROMPTS)
    alone = torch.cat([reward.scores(images[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (reward.scores(images, PROMPTS[::-1])[0] - together[0]).abs() > 1e-3
    for wrong in (PROMPTS[:2], "one text", []):
        with pytest.raises(ValueError, match="prompts are .* for 3 images"):
            reward.scores(images, wrong)


def test_nothing_of_a_reward_trains_and_autocast_does_not_reach_it():
    reward, images = load_reward(RewardConfig(kind="demo aesthetic")), noise(2, 128, 128)
    assert not any(p.requires_grad for p in reward.network.parameters()) and not reward.network.training
    plain = reward.scores(images, PROMPTS[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.scores(images, PROMPTS[:2]), plain)


class WeightCasts(TorchDispatchMode):
    """Counts the bytes of a network's matrices that are cast, but for a head's."""

    def __init__(self, network):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in network.parameters() if p.ndim > 1 < len(p)}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._to_copy and args[0].untyped_storage().data_ptr() in self.weights:
            self.bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["demo aesthetic", "demo CLIP"])
def test_a_copy_in_half_precision_has_half_the_bytes_and_casts_none_of_them(kind):
    """Inside of a run's autocast, under which its backward pass runs too."""
    reward, images = load_reward(RewardConfig(kind=kind)), noise(3, 128, 128)
    before = [p.detach().clone() for p in reward.network.parameters()]
    half = reward.copied_in(torch.bfloat16)
    assert all(torch.equal(p, value) for p, value in zip(reward.network.parameters(), before, strict=True))
    assert half.fingerprint == reward.fingerprint
    sizes = [sum(p.nbytes for p in one.network.parameters()) for one in (half, reward)]
    pointers = [{p.untyped_storage().data_ptr() for p in one.network.parameters()} for one in (half, reward)]
    assert sizes[0] < 0.6 * sizes[1] and not pointers[0] & pointers[1]

    def scored(one, around):
        leaf, kept = images.clone().requires_grad_(), {}
        own = {p.untyped_storage().data_ptr() for p in one.network.parameters()}
        shapes = {s for p in one.network.parameters() if p.ndim > 1 for s in (p.shape, p.shape[::-1])}

        def keep(tensor):
            if tensor.shape in shapes and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.shape
            return tensor

        with autocast(around, torch.device("cpu")), WeightCasts(one.network) as casts:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                scores = one.scores(leaf, PROMPTS)
            scores.sum().backward()
        assert not casts.bytes, casts.bytes
        assert not kept, kept
        assert scores.dtype == torch.float32, scores.dtype
        return scores.detach(), leaf.grad.flatten()

    (found, gradient), (expected, wanted) = scored(half, "bf16"), scored(reward, "fp32")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * reward.typical_scale)
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.99
    assert not torch.equal(found, expected)


def saved_bytes(towers, pixels):
    """Bytes of the tensors that autograd keeps for the backward pass, weights left out; and the gradient."""
    weights, saved = {p.untyped_storage().data_ptr() for p in towers.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    pixels = pixels.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = towers.image_embeddings(pixels)[:, 0].sum()
    total.backward()
    return sum(saved.values()), pixels.grad


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_checkpointing_keeps_less_gives_the_same_gradient_and_memory_figures_are_honest(act):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"num_hidden_layers": 12, "image_size": 96, "patch_size": 8, "hidden_act": act}
    network = seeded(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | sizes)))
    towers = Towers(tower_state(network.state_dict()), {"vision_config": VISION | sizes})
    gradients, saved, estimates = [], [], []
    for enabled in (False, True, False):
        towers.checkpoint(enabled)
        size, gradient = saved_bytes(towers, noise(4, 96, 96))
        gradients.append(gradient)
        saved.append(size)
        estimates.append(towers.activation_bytes(4))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert saved[1] < 0.3 * saved[0] and saved[2] == saved[0]
    assert saved[0] < estimates[0] < 1.5 * saved[0]
    assert saved[0] - saved[1] == pytest.approx(estimates[0] - estimates[1], rel=0.1)
    assert towers.activation_bytes(4, gradient=False) < estimates[1]


def test_nan_is_an_error_that_names_the_reward():
    reward, images = load_reward(RewardConfig(kind="demo CLIP")), noise(2, 128, 128)
    images[1, 0, 5, 5] = math.nan
    with pytest.raises(ValueError, match="demo CLIP gives NaN or infinity for 1 of 2"):
        reward.scores(images, PROMPTS[:2])
