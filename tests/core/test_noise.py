"""Timesteps against their densities, pyramid noise and zero terminal SNR against the reference implementations."""

import dataclasses
from statistics import NormalDist

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.models.diffusers import SD1_SCHEDULER, DiffusersDenoiser, training_sigmas
from retune.training.models.noise_levels import zero_terminal_sigmas
from retune.training.objectives.noise import draw_noise, draw_timestep, pyramid_noise
from retune.training.recipes.unet import train_model

CUMULATIVE = {
    ("uniform", 0.0, 1.0): lambda x: x,
    ("logit-normal", 0.0, 1.0): lambda x: NormalDist().cdf(logit(x)),
    ("logit-normal", 0.8, 0.5): lambda x: NormalDist(0.8, 0.5).cdf(logit(x)),
    ("high noise", 0.0, 1.0): lambda x: 1 - (1 - x) ** (1 / 3),
    ("low noise", 0.0, 1.0): lambda x: x ** (1 / 3),
}
"""P(place in the range <= x)."""


def logit(x):
    return torch.tensor(x, dtype=torch.float64).logit().item()


@pytest.mark.parametrize("kind", CUMULATIVE)
def test_timesteps_have_their_density(kind):
    sampling, mean, std = kind
    settings = TrainingSettings(timestep_sampling=sampling, timestep_mean=mean, timestep_std=std)
    random, count = torch.Generator().manual_seed(0), 5000
    drawn = torch.tensor([draw_timestep(settings, 1000, random) for _ in range(count)])
    for low in range(0, 1000, 100):
        below, above = (CUMULATIVE[kind](min(max(x, 1e-12), 1 - 1e-12)) for x in (low / 1000, low / 1000 + 0.1))
        share, expected = ((drawn >= low) & (drawn < low + 100)).sum().item() / count, above - below
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5 + 1e-9)


@pytest.mark.parametrize("sampling", ["high noise", "low noise", "logit-normal"])
def test_every_distribution_keeps_to_its_range(sampling):
    settings = TrainingSettings(timestep_sampling=sampling, min_timestep=700, max_timestep=702)
    assert {draw_timestep(settings, 1000, generator(0, "t", i)) for i in range(300)} == {700, 701, 702}


def their_pyramid(noise, iterations, discount, random):
    """sd-scripts' recipe for a batch of one, in its own terms."""
    _, _, w, h = noise.shape
    up = torch.nn.Upsample(size=(w, h), mode="bilinear")
    total = noise.clone()
    for i in range(iterations):
        r = torch.rand((), generator=random, dtype=torch.float64).item() * 2 + 2
        wn, hn = max(1, int(w / (r**i))), max(1, int(h / (r**i)))
        total += up(torch.randn(1, noise.shape[1], wn, hn, generator=random)) * discount**i
        if wn == 1 or hn == 1:
            break
    return total / total.std()


@pytest.mark.parametrize("size", [(16, 16), (12, 40), (1, 5)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_pyramid_noise_is_that_of_sd_scripts(size, iterations):
    start = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    made = pyramid_noise(start[0], iterations, 0.4, torch.Generator().manual_seed(2))
    torch.testing.assert_close(made, their_pyramid(start, iterations, 0.4, torch.Generator().manual_seed(2))[0])
    assert made.std().item() == pytest.approx(1, abs=1e-5)


def test_pyramid_noise_is_coarser_and_off_by_default():
    plain, pyramid = TrainingSettings(), TrainingSettings(multires_iterations=8, multires_discount=0.8)
    assert torch.equal(draw_noise((4, 32, 32), plain, generator(3)), torch.randn(4, 32, 32, generator=generator(3)))
    means = [
        torch.stack([draw_noise((4, 32, 32), settings, generator(i)).mean((1, 2)) for i in range(50)]).std().item()
        for settings in (plain, pyramid)
    ]
    assert means[0] == pytest.approx(1 / 32, rel=0.2) and means[1] > 4 * means[0]


def test_zero_terminal_sigmas_are_those_of_diffusers():
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    plain = training_sigmas(SD1_SCHEDULER)
    rescaled = zero_terminal_sigmas(plain)
    expected = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    torch.testing.assert_close(rescaled[:-1].double(), expected[:-1], rtol=1e-4, atol=0)
    assert rescaled[0] == pytest.approx(plain[0].item(), rel=1e-4) and (rescaled.diff() > 0).all()
    assert rescaled[-1].item() == pytest.approx(4.8973451890853435e-08**-0.5, rel=1e-5)
    assert torch.equal(zero_terminal_sigmas(rescaled), rescaled)
    assert torch.equal(training_sigmas({**SD1_SCHEDULER, "rescale_betas_zero_snr": True}), rescaled)


def v_model(model, sigmas=None):
    denoiser = DiffusersDenoiser(model.denoiser.network, {**SD1_SCHEDULER, "prediction_type": "v_prediction"})
    return dataclasses.replace(model, denoiser=denoiser if sigmas is None else denoiser.with_sigmas(sigmas))


@torch.no_grad()
def test_other_sigmas_keep_the_network_and_its_timesteps(tiny_model):
    model = v_model(tiny_model)
    plain = model.denoiser.sigmas
    other = model.denoiser.with_sigmas(zero_terminal_sigmas(plain))
    assert other.network is model.denoiser.network and torch.equal(model.denoiser.sigmas, plain)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = other.sigmas[[400, 999]]
    noisy = other.add_noise(latent, noise, sigma)
    context = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    from retune.training.models.protocols import Conditioning

    scaled = noisy / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    theirs = other.network(scaled, torch.tensor([400, 999]), encoder_hidden_states=context).sample
    torch.testing.assert_close(other.predict(noisy, sigma, Conditioning(context)), theirs)
    torch.testing.assert_close(scaled[1], noise[1], atol=1e-3, rtol=0)  # pure noise
    goal = other.target(latent, noise, sigma)
    torch.testing.assert_close(goal[1], -latent[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(other.denoised(noisy, sigma, goal), latent, atol=2e-3, rtol=0)


def config(zero, **settings):
    options = TrainingSettings(zero_terminal_snr=zero, loss_weighting="none", warmup_steps=0, **settings)
    samples = SamplePrompts(prompts=("a red circle",), steps=2, width=32, height=32)
    return TrainModelConfig(run_name="r", steps=2, learning_rate=1e-3, settings=options, samples=samples)


def test_a_run_trains_at_the_rescaled_levels(tiny_model, pictures, tmp_path):
    model = v_model(tiny_model)
    results = {
        "switched on": train_model(model, pictures, config(True), tmp_path / "a"),
        "rescaled before": train_model(
            v_model(tiny_model, zero_terminal_sigmas(model.denoiser.sigmas)), pictures, config(True), tmp_path / "b"
        ),
        "given so": train_model(
            v_model(tiny_model, zero_terminal_sigmas(model.denoiser.sigmas)), pictures, config(False), tmp_path / "c"
        ),
        "off": train_model(model, pictures, config(False), tmp_path / "d"),
    }
    weights = {name: torch.cat([w.flatten() for w in r.unet.values()]) for name, r in results.items()}
    assert torch.equal(weights["switched on"], weights["rescaled before"])
    assert torch.equal(weights["switched on"], weights["given so"])
    assert weights["switched on"].isfinite().all() and not torch.equal(weights["switched on"], weights["off"])


def test_models_that_cannot_have_zero_terminal_snr_are_refused(tiny_model, pictures, tmp_path):
    with pytest.raises(ValueError, match="zero_terminal_snr is on for a model of eps prediction; expected v"):
        train_model(tiny_model, pictures, config(True), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_min_snr_is_warned_about(tiny_model, pictures, tmp_path, caplog):
    run = config(True)
    run = dataclasses.replace(run, steps=1, settings=dataclasses.replace(run.settings, loss_weighting="min-SNR"))
    train_model(v_model(tiny_model), pictures, run, tmp_path)
    assert "min-SNR gives pure noise no weight" in caplog.text
