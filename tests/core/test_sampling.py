"""Sampling: the DDIM of diffusers on the same network, its timesteps, and guidance written out by hand."""

import pytest
import torch
from retune.training.models.diffusers import SD1_SCHEDULER, DiffusersDenoiser
from retune.training.models.protocols import Conditioning
from retune.training.sampling.ddim import ddim_steps, initial_noise, sample, timesteps
from retune.training.sampling.generate import draw
from retune.training.sampling.guidance import Guidance, guided_latent


def reference(prediction, count):
    """diffusers' DDIM, set so that it ends at a noise level of zero."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **SD1_SCHEDULER,
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )
    scheduler.set_timesteps(count)
    return scheduler


def context(seed=0, length=5):
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 25, 30, 33, 50, 64, 100, 250, 999, 1000])
def test_timesteps_are_diffusers_trailing_ones(count):
    assert timesteps(count) == reference("epsilon", count).timesteps.tolist()


@pytest.mark.parametrize("count", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(count):
    with pytest.raises(ValueError, match=f"sampling steps is {count}; expected 1 to 1000"):
        timesteps(count)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_equals_diffusers_step_by_step(tiny_model, prediction):
    unet = tiny_model.denoiser.network
    denoiser = DiffusersDenoiser(unet, {**SD1_SCHEDULER, "prediction_type": prediction})
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler, x, latents = reference(prediction, 5), noise, []
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, encoder_hidden_states=context()).sample, t, x, eta=0.0).prev_sample
        latents.append(x)
    ours = [x for _, x in ddim_steps(denoiser, noise, Guidance(Conditioning(context())), 5)]
    alphas_cumprod = [scheduler.alphas_cumprod[t - 200].item() for t in scheduler.timesteps[:-1]] + [1.0]
    for mine, theirs, alpha in zip(ours, latents, alphas_cumprod, strict=True):  # their space is ours times sqrt(alpha)
        torch.testing.assert_close(mine * alpha**0.5, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert torch.equal(sample(denoiser, noise, Guidance(Conditioning(context())), 5), ours[-1])


@torch.no_grad()
def test_guidance_is_the_formula_and_one_means_without(tiny_model):
    denoiser, x = tiny_model.denoiser, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sigma, cond, uncond = torch.tensor([2.0, 2.0]), Conditioning(context()), Conditioning(context(1, 3))
    parts = [denoiser.denoised(x, sigma, denoiser.predict(x, sigma, c)) for c in (cond, uncond)]
    mixed = guided_latent(denoiser, x, sigma, Guidance(cond, uncond, 4.0))
    torch.testing.assert_close(mixed, parts[1] + 4.0 * (parts[0] - parts[1]), rtol=1e-4, atol=1e-4)
    assert torch.equal(guided_latent(denoiser, x, sigma, Guidance(cond, uncond, 1.0)), parts[0])


def test_sampling_is_differentiable_through_every_step(tiny_model):
    states = context().requires_grad_()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sample(tiny_model.denoiser, noise, Guidance(Conditioning(states)), 2).square().mean().backward()
    assert states.grad.abs().sum() > 0


def test_a_picture_depends_on_its_place_and_not_on_the_batch(tiny_model):
    options = {"width": 16, "height": 16, "steps": 2, "cfg": 2.0, "seed": 5}
    prompts = ["a red circle", "two small blue squares", "a red circle"]
    together = draw(tiny_model, prompts, **options)
    apart = draw(tiny_model, prompts, batch_size=1, **options)
    assert together[0].shape == (3, 16, 16)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert not torch.equal(together[0], together[2])


def test_starting_noise_is_standard_normal_and_named_by_seed_and_index(tiny_model):
    noise = initial_noise(tiny_model.denoiser, 64, 64, 1, 2)
    assert noise.shape == (4, 64, 64) and abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert torch.equal(noise, initial_noise(tiny_model.denoiser, 64, 64, 1, 2))
    assert not torch.equal(noise, initial_noise(tiny_model.denoiser, 64, 64, 2, 1))


def test_cancelling_in_a_sampler_step_goes_up(tiny_model):
    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tiny_model, ["a red circle"], width=16, height=16, steps=2, cfg=1.0, seed=0, on_batch=cancel)
