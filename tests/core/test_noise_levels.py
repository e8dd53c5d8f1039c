"""Noise levels and parameterisations of the diffusers denoiser against diffusers' own schedulers."""

import pytest
import torch
from retune.training.models.diffusers import SD1_SCHEDULER, DiffusersDenoiser, training_sigmas
from retune.training.models.protocols import Conditioning


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_sigmas_are_those_of_diffusers(schedule):
    from diffusers import DDPMScheduler

    values = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": schedule}
    kept = DDPMScheduler(**values).alphas_cumprod.double()
    sigmas = training_sigmas(values)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (1000,) and (sigmas.diff() > 0).all()
    torch.testing.assert_close(sigmas.double(), ((1 - kept) / kept).sqrt(), rtol=1e-4, atol=0)


def test_sd1_ends_are_the_known_ones():
    sigmas = training_sigmas(SD1_SCHEDULER)
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)


@pytest.mark.parametrize("odd", [{"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2]}])
def test_schedules_it_would_get_wrong_are_refused(odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        training_sigmas({**SD1_SCHEDULER, **odd})


def test_unknown_prediction_type_is_refused(tiny_model):
    with pytest.raises(ValueError, match="prediction_type is 'sample'; expected one of epsilon, v_prediction"):
        DiffusersDenoiser(tiny_model.denoiser.network, {**SD1_SCHEDULER, "prediction_type": "sample"})


def drawn():
    random = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=random), torch.randn(3, 4, 8, 8, generator=random)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_clean_latent_back(tiny_model, prediction):
    denoiser = DiffusersDenoiser(tiny_model.denoiser.network, {**SD1_SCHEDULER, "prediction_type": prediction})
    latent, noise = drawn()
    sigma = denoiser.sigmas[[5, 400, 900]]
    clean = denoiser.denoised(denoiser.add_noise(latent, noise, sigma), sigma, denoiser.target(latent, noise, sigma))
    torch.testing.assert_close(clean, latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers(tiny_model, prediction):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD1_SCHEDULER, prediction_type=prediction)
    denoiser = DiffusersDenoiser(tiny_model.denoiser.network, {**SD1_SCHEDULER, "prediction_type": prediction})
    latent, noise = drawn()
    times = torch.tensor([5, 400, 900])
    sigma = denoiser.sigmas[times]
    scaled = denoiser.add_noise(latent, noise, sigma) / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    torch.testing.assert_close(scaled, scheduler.add_noise(latent, noise, times), rtol=1e-4, atol=1e-4)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latent, noise, times)
    torch.testing.assert_close(denoiser.target(latent, noise, sigma), target, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_predict_calls_the_network_as_diffusers_does_and_the_mask_hides(tiny_model):
    denoiser, (latent, _) = tiny_model.denoiser, drawn()
    times = torch.tensor([0, 321, 999])
    sigma = denoiser.sigmas[times]
    context = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
    theirs = denoiser.network(
        latent / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt(), times, encoder_hidden_states=context[:, :4]
    ).sample
    torch.testing.assert_close(denoiser.predict(latent, sigma, Conditioning(context[:, :4])), theirs)
    mask = torch.arange(6).expand(3, 6) < 4
    masked = denoiser.predict(latent, sigma, Conditioning(context, None, mask))
    torch.testing.assert_close(masked, theirs, rtol=1e-4, atol=1e-5)
    attended = denoiser.predict(latent, sigma, Conditioning(context))
    assert (attended - theirs).abs().max() > 1e-4


@torch.no_grad()
def test_contexts_of_unequal_length_in_one_batch_stay_exact(tiny_model):
    denoiser, (latent, _) = tiny_model.denoiser, drawn()
    random = torch.Generator().manual_seed(1)
    words = [Conditioning(torch.randn(1, n, 32, generator=random)) for n in (3, 7, 1)]
    sigma = denoiser.sigmas[[10, 500, 900]]
    together = denoiser.predict(latent, sigma, Conditioning.cat(words))
    for i, one in enumerate(words):
        alone = denoiser.predict(latent[i : i + 1], sigma[i : i + 1], one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_autoencoder_scales_and_maps_ranges_as_diffusers_does(tiny_model):
    autoencoder, vae = tiny_model.autoencoder, tiny_model.autoencoder.network
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.encode(images)
    assert autoencoder.downscale == 2 and latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents, vae.encode(images * 2 - 1).latent_dist.mean * 0.5)
    from diffusers.image_processor import VaeImageProcessor

    theirs = VaeImageProcessor().postprocess(vae.decode(latents / 0.5).sample, output_type="pt")
    torch.testing.assert_close(autoencoder.decode(latents), theirs)
