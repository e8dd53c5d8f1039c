"""Reward tuning in parts of a batch: the gradient of the whole batch, in the memory of one picture."""

from dataclasses import replace

import pytest
import torch
from retune.training.common.live_bytes import LiveBytes
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.protocols import Conditioning
from retune.training.objectives.reward import GRAPH_PIXELS, RewardObjective
from retune.training.recipes.reward import build_trainable
from retune.training.rewards.augment import Augmentation
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.sampling.guidance import Guidance
from retune.training.sampling.rollout import clean_step, rollout, stepwise_gradient

from .test_reward_tune import config, loaded, reward
from .test_rollout import double, make_guidance, noise  # noqa: F401 (a fixture)


def gradients(model, chosen, at_once, rewards, count=3):
    """The loss of each picture and the gradients of everything that trains, `at_once` pictures in a graph."""
    trainable = build_trainable(model, chosen)
    objective = RewardObjective(model, rewards, chosen, trainable, text_trains=chosen.text_trains)
    objective._images_at_once = at_once
    with trainable.attach(rng_key=(1, 0)):
        loss = objective(loaded(objective, count), 1)
        loss.per_sample.sum().backward()
    found = {name: p.grad for name, p in trainable.parameters.items() if p.grad is not None}
    return loss, found


def check_equal(one, other, tolerance=1e-6):
    (loss, found), (wanted_loss, wanted) = one, other
    torch.testing.assert_close(loss.per_sample, wanted_loss.per_sample, rtol=tolerance, atol=tolerance)
    assert loss.parts.keys() == wanted_loss.parts.keys() and found.keys() == wanted.keys()
    for name, part in loss.parts.items():
        torch.testing.assert_close(part, wanted_loss.parts[name], rtol=1e-5, atol=1e-9)
    largest = max(float(value.abs().max()) for value in wanted.values())
    assert largest > 0
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * largest, msg=name)


class DoubleDenoiser(DiffusersDenoiser):
    """Computes in float64 from text that is encoded in float32."""

    def predict(self, noisy, sigma, conditioning):
        return super().predict(noisy, sigma, conditioning.to(torch.float64))


@pytest.fixture
def double_model(tiny_model):
    """The tiny model with UNet and VAE in float64, which is also torch's default while it is used."""
    torch.set_default_dtype(torch.float64)
    tiny_model.autoencoder.network.double()
    yield replace(tiny_model, denoiser=DoubleDenoiser(tiny_model.denoiser.network.double()))
    torch.set_default_dtype(torch.float32)


def augmented_reward(*terms):
    combined = CombinedReward(terms or [*reward().terms.values()], Augmentation())
    combined.network.double()
    return combined


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "text encoder", "eps_constraint": 0.5, "drift_constraint": 0.5},
        {"train": "UNet LoRA", "eps_constraint": 0.5},
        {"train": "UNet LoRA", "stop_gradient": False},
        {"train": "text encoder", "method": "one step"},
    ],
)
def test_parts_give_the_gradient_of_the_whole_batch(double_model, changes):
    chosen = config(batch_size=3, lora_rank=2, **changes)
    whole, parts = (gradients(double_model, chosen, size, augmented_reward()) for size in (3, 2))
    check_equal(parts, whole)


class Spread:
    """The distance of a picture from the mean of its batch, which differs for every batch: a reward of variety."""

    name, fingerprint, typical_scale, reads_prompts, compares_images = "spread", "0", 1.0, False, True
    files, network = (), torch.nn.Identity()

    def scores(self, images, prompts):
        return (images - images.mean(0, keepdim=True)).square().mean((1, 2, 3))


def test_rewards_that_compare_pictures_see_the_whole_batch(double_model):
    chosen = config(train="text encoder", batch_size=3)
    terms = [Term(reward=Spread()), *reward().terms.values()]
    whole, parts = (gradients(double_model, chosen, size, augmented_reward(*terms)) for size in (3, 1))
    assert whole[0].parts["spread"] > 0
    check_equal(parts, whole)


def test_pictures_below_the_limit_share_a_graph(tiny_model):
    assert GRAPH_PIXELS == 512 * 512
    for side, count in ((64, 64), (512, 1), (1024, 1), (256, 4)):
        objective = RewardObjective(tiny_model, reward(), config(width=side, height=side), None, text_trains=False)
        assert objective._images_at_once == count
    assert [(part.start, part.stop) for part in objective._parts(2)] == [(0, 4), (4, 8)][:1]


def test_steps_with_a_noise_level_for_each_picture(double):  # noqa: F811
    """As `direct` has them: parts take their own coefficients."""
    sigma = torch.tensor([3.0, 0.5], dtype=torch.float64)
    step, guidance = clean_step(double, sigma), make_guidance().detached()
    states = rollout(double, noise(), [step], guidance)
    of_end = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    arguments = (double, states, [step], [0], guidance, of_end, guidance.tensors)
    whole, parts = (
        stepwise_gradient(*arguments, images=images) for images in ([slice(0, 2)], [slice(0, 1), slice(1, 2)])
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_some_prompts_of_a_guidance_keep_masks_and_pooled_outputs():
    texts = Conditioning(
        torch.rand(3, 2, 4), torch.rand(3, 5), torch.rand(3, 2) > 0.5, Conditioning(torch.rand(3, 1, 4))
    )
    some = Guidance(texts, None, 2.0).images(slice(1, 3))
    assert some.negative is None and some.cfg == 2.0 and len(some.positive) == len(some.positive.prefix) == 2
    for part in ("context", "pooled", "mask"):
        assert torch.equal(getattr(some.positive, part), getattr(texts, part)[1:])


def peak(model, batch, at_once, gradient_steps=2):
    """Bytes that a training step's tensors have at most."""
    chosen = config(train="UNet LoRA", batch_size=batch, lora_rank=2, gradient_steps=gradient_steps, cfg=1.0)
    with LiveBytes() as live:
        gradients(model, chosen, at_once, reward(), batch)
    return live.peak


def test_memory_is_flat_in_the_batch_and_in_k(tiny_model):
    one = peak(tiny_model, 1, 1)
    assert peak(tiny_model, 3, 1) < 1.1 * one and peak(tiny_model, 1, 1, 4) < 1.1 * one
    assert peak(tiny_model, 3, 3) > 2 * one
