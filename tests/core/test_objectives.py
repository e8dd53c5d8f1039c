"""The denoising objective against numbers computed by hand and by diffusers."""

import dataclasses
from statistics import NormalDist

import pytest
import torch
from retune.training.common.rng import derive_seed, generator
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.order import Slot
from retune.training.models.diffusers import SD1_SCHEDULER
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective, TrainingSample
from retune.training.objectives.losses import check_objective, distance, huber_threshold, mask_weights, snr_weight
from retune.training.objectives.noise import draw_timestep

PLAIN = TrainingSettings(loss_weighting="none", caption_dropout=0.0)


def weights(kind, prediction, times, gamma=5.0):
    """From diffusers' SNR, by the papers' formulas."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    snr = compute_snr(DDPMScheduler(**SD1_SCHEDULER), times)
    capped = torch.minimum(snr, torch.full_like(snr, gamma if kind == "min-SNR" else 1000.0))
    table = {
        ("min-SNR", "eps"): capped / snr,
        ("min-SNR", "v"): capped / (snr + 1),
        ("debiased", "eps"): 1 / capped.sqrt(),
        ("debiased", "v"): 1 / (snr + 1),
        ("none", "eps"): torch.ones_like(snr),
    }
    return table[kind, prediction]


@pytest.mark.parametrize(
    "kind, prediction", [("min-SNR", "eps"), ("min-SNR", "v"), ("debiased", "eps"), ("debiased", "v"), ("none", "eps")]
)
def test_weights_follow_the_papers(tiny_model, kind, prediction):
    times = torch.tensor([0, 1, 50, 300, 700, 999])
    settings = TrainingSettings(loss_weighting=kind, snr_gamma=3.0)
    got = snr_weight(tiny_model.denoiser.sigmas[times], settings, prediction)
    torch.testing.assert_close(got, weights(kind, prediction, times, 3.0), rtol=1e-3, atol=0)


def test_weights_by_hand():
    sigma = torch.tensor([0.1, 0.5, 2.0])  # SNR 100, 4, 0.25
    settings = TrainingSettings(loss_weighting="min-SNR", snr_gamma=5.0)
    torch.testing.assert_close(snr_weight(sigma, settings, "eps"), torch.tensor([0.05, 1.0, 1.0]))
    torch.testing.assert_close(snr_weight(sigma, settings, "v"), torch.tensor([5 / 101, 4 / 5, 0.25 / 1.25]))
    settings = dataclasses.replace(settings, loss_weighting="debiased")
    torch.testing.assert_close(snr_weight(sigma, settings, "eps"), torch.tensor([0.1, 0.5, 2.0]))
    assert snr_weight(torch.tensor([0.001]), settings, "eps").item() == pytest.approx(1000**-0.5)


def test_snr_weighting_of_a_flow_model_is_refused():
    with pytest.raises(ValueError, match="loss_weighting is 'min-SNR' on a flow model; expected 'none'"):
        snr_weight(torch.ones(1), TrainingSettings(), "flow")


def test_distances_by_hand():
    a, b = torch.tensor([[0.0, 0.05], [1.0, -1.0]]), torch.zeros(2, 2)
    torch.testing.assert_close(distance(a, b, "mse"), torch.tensor([0.00125, 1.0]))
    torch.testing.assert_close(distance(a, b, "l1"), torch.tensor([0.025, 1.0]))
    torch.testing.assert_close(distance(a, b, "huber"), torch.tensor([0.5 * 0.05**2 / 0.1 / 2, 0.95]))
    assert distance(a.half(), b.half(), "mse").dtype == torch.float32


def test_huber_losses_by_hand():
    a, b, threshold = torch.tensor([[0.3, -4.0], [0.3, 4.0]]), torch.zeros(2, 2), torch.tensor([0.5, 3.0]).double()
    expected = {
        "huber": [(0.09 / 1.0 + 4 - 0.25) / 2, (0.09 / 6 + 4 - 1.5) / 2],
        "pseudo-huber": [((0.34**0.5 - 0.5) + (16.25**0.5 - 0.5)) / 2, 6 * ((9.09**0.5 - 3) + (5 - 3)) / 2],
        "smooth-l1": [2 * ((0.34**0.5 - 0.5) + (16.25**0.5 - 0.5)) / 2, 2 * ((9.09**0.5 - 3) + (5 - 3)) / 2],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(distance(a, b, kind, threshold), torch.tensor(values))


def test_a_constant_threshold_is_plain_huber_to_the_last_bit():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 4, 8, 8, generator=random), torch.randn(3, 4, 8, 8, generator=random)
    plain = torch.nn.functional.huber_loss(a, b, reduction="none", delta=0.1) / 0.1
    threshold = huber_threshold(torch.ones(3), torch.ones(3), TrainingSettings(loss="huber"), "flow")
    assert torch.equal(distance(a, b, "huber", threshold), plain.flatten(1).mean(1))
    assert torch.equal(distance(a, b, "huber"), plain.flatten(1).mean(1))


def test_thresholds_follow_their_schedule():
    """sd-scripts: exponential exp(ln(c) t / T); snr (1 - c) / (1 + sigma)^2 + c."""
    sigma, time = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.5, 1.0])
    expected = {"constant": [0.2, 0.2, 0.2], "exponential": [1.0, 0.2**0.5, 0.2], "snr": [1.0, 0.4, 0.25]}
    for schedule, values in expected.items():
        settings = TrainingSettings(huber_schedule=schedule, huber_c=0.2)
        assert huber_threshold(sigma, time, settings, "eps").tolist() == pytest.approx(values, rel=1e-6)


def test_a_threshold_by_snr_on_a_flow_model_is_refused_where_it_counts():
    settings = TrainingSettings(loss="huber", huber_schedule="snr", loss_weighting="none")
    with pytest.raises(ValueError, match="huber_schedule is 'snr' on a flow model; expected 'constant'"):
        check_objective(settings, "flow")
    check_objective(dataclasses.replace(settings, loss="mse"), "flow")


def test_masks_by_hand():
    mask = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]])
    settings = TrainingSettings(mask_weight=0.1, mask_normalize=False)
    shape = torch.Size([2, 4, 2, 2])
    assert mask_weights([None, None], settings, shape) is None
    weights = mask_weights([mask, None], settings, shape)
    torch.testing.assert_close(weights[0], torch.tensor([[[1.0, 0.5], [0.1, 0.1]]]))
    assert torch.equal(weights[1], torch.ones(1, 2, 2))
    normal = mask_weights([mask, None], dataclasses.replace(settings, mask_normalize=True), shape)
    torch.testing.assert_close(normal, weights / torch.tensor([1.7 / 4, 1.0]).view(2, 1, 1, 1))
    error = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).expand(2, 4, 2, 2)
    got = distance(error.sqrt(), torch.zeros_like(error), "mse", weights=weights)
    torch.testing.assert_close(got, torch.tensor([(1 + 1 + 0.3 + 0.4) / 4, 2.5]))
    black = mask_weights([torch.zeros(1, 2, 2)], TrainingSettings(mask_weight=0.0), shape)
    assert torch.equal(black, torch.zeros(1, 1, 2, 2))


@torch.no_grad()
def test_the_loss_of_a_sample_counts_its_mask_and_weight(tiny_model):
    settings = dataclasses.replace(PLAIN, mask_weight=0.0)
    (index, (caption, latent)), other = batch()
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    plain = objective(tiny_model, settings)(batch(), 3).per_sample
    shown = [(index, TrainingSample(caption, latent, mask, 0.25)), other]
    got = objective(tiny_model, settings)(shown, 3).per_sample
    assert torch.equal(got[1], plain[1])
    whole = objective(tiny_model, settings)(
        [(index, TrainingSample(caption, latent, torch.ones(1, 8, 8))), other], 3
    ).per_sample
    assert torch.equal(whole, plain)
    summed = objective(tiny_model, dataclasses.replace(settings, mask_normalize=False))
    top, bottom = (summed([(index, TrainingSample(caption, latent, m))], 3).per_sample[0] for m in (mask, 1 - mask))
    torch.testing.assert_close(top + bottom, plain[0])  # the two halves of the mean
    torch.testing.assert_close(got[0], 0.25 * 2 * top)  # weight, and the mask's mean of a half


def test_masks_count_in_the_validation_loss_and_weights_do_not(tiny_model):
    task, (caption, latent) = objective(tiny_model, dataclasses.replace(PLAIN, mask_weight=0.0)), batch()[0][1]
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    plain = task.validation([(caption, latent)])
    parts = [task.validation([TrainingSample(caption, latent, m)]) for m in (mask, 1 - mask)]
    assert sum(parts) / 2 == pytest.approx(plain, rel=1e-5) and parts[0] != pytest.approx(plain, rel=1e-3)
    assert task.validation([TrainingSample(caption, latent, None, 0.1)]) == plain


def slots(caption, number, count=4):
    example = from_images([torch.zeros(8, 8, 3)], [caption]).examples[0]
    return [Slot(example, False, i, 0, number) for i in range(count)]


def varied(model, settings, seed=4):
    """An objective that notes what it encodes, with zeros for latents."""
    known, once = [], []

    def text_of(into):
        return lambda caption: into.append(caption) or Conditioning(torch.full((1, 3, 32), float(len(caption))))

    task = DenoisingObjective(
        model.denoiser,
        settings,
        seed,
        latent_of=lambda slot: torch.zeros(4, 8, 8),
        text_of=text_of(known),
        varied_text_of=text_of(once),
        project=lambda states, time: states,
    )
    return task, known, once


TAGS = "1girl, red hair, smile, hat, sky, tree"


@torch.no_grad()
def test_varied_captions_are_encoded_while_loading_and_dropped_later(tiny_model):
    settings = dataclasses.replace(PLAIN, caption_shuffle=True, keep_tokens=2, tag_dropout=0.3)
    task, known, once = varied(tiny_model, settings)
    loaded = task.load(slots(TAGS, 7))
    assert once == [one.caption for one in loaded] and len(set(once)) > 1 and not known
    assert all(caption.startswith("1girl, red hair") for caption in once)
    task(list(enumerate(loaded)), 7)
    assert not known and len(once) == 4  # nothing is encoded while weights are attached
    assert [one.caption for one in varied(tiny_model, settings)[0].load(slots(TAGS, 7))] == once
    assert [one.caption for one in task.load(slots(TAGS, 8))] != once
    dropping, known, _ = varied(tiny_model, dataclasses.replace(settings, caption_dropout=1.0))
    dropping(list(enumerate(dropping.load(slots(TAGS, 7)))), 7)
    assert known == [""] * 4


def test_captions_stay_as_they_are_outside_training_and_by_default(tiny_model):
    task, _, once = varied(tiny_model, dataclasses.replace(PLAIN, caption_shuffle=True))
    assert {one.caption for one in task.load(slots(TAGS, 0))} == {TAGS}
    plain = varied(tiny_model, dataclasses.replace(PLAIN, keep_tokens=3))[0].load(slots(TAGS, 5))
    assert {one.caption for one in plain} == {TAGS} and all(one.text is None for one in plain) and not once


def test_timesteps_stay_in_their_range_and_reach_both_ends():
    settings = TrainingSettings(min_timestep=10, max_timestep=13)
    drawn = {draw_timestep(settings, 1000, generator(0, "t", i)) for i in range(200)}
    assert drawn == {10, 11, 12, 13}
    assert draw_timestep(TrainingSettings(min_timestep=7, max_timestep=7), 1000, generator(0)) == 7


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_timesteps_are_distributed_as_promised(sampling):
    settings, count = TrainingSettings(timestep_sampling=sampling), 4000
    drawn = [draw_timestep(settings, 1000, generator(1, "t", i)) for i in range(count)]
    expected = 0.25 if sampling == "uniform" else NormalDist().cdf(-1.0986123)  # logit(1/4)
    for share in (sum(t < 250 for t in drawn) / count, sum(t >= 750 for t in drawn) / count):
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_seeds_depend_on_every_part_of_a_name():
    seeds = {derive_seed(*n) for n in [(0, "a", 1, 2), (0, "a", 12), (0, "a", 2, 1), (1, "a", 1, 2), (0, "b", 1, 2)]}
    assert len(seeds) == 5 and all(0 <= s < 2**63 for s in seeds)


def objective(model, settings, seed=4):
    """On the model itself, with captions as they are."""

    def text_of(caption):
        return Conditioning(torch.full((1, 3, 32), float(len(caption)) / 10))

    return DenoisingObjective(
        model.denoiser, settings, seed, latent_of=None, text_of=text_of, project=lambda states, time: states
    )


def batch():
    random = torch.Generator().manual_seed(0)
    return [(i, (caption, torch.randn(4, 8, 8, generator=random))) for i, caption in ((2, "one"), (5, "another"))]


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["none", "min-SNR"])
def test_loss_equals_diffusers_training_step(tiny_model, weighting):
    from diffusers import DDPMScheduler

    settings = dataclasses.replace(
        PLAIN, loss_weighting=weighting, noise_offset=0.1, input_perturbation=0.2, min_timestep=50
    )
    scheduler, seed, step = DDPMScheduler(**SD1_SCHEDULER), 4, 9
    expected = []
    for index, (caption, latent) in batch():
        t = draw_timestep(settings, 1000, generator(seed, "timestep", step, index))
        random = generator(seed, "noise", step, index)
        noise = torch.randn(4, 8, 8, generator=random) + 0.1 * torch.randn(4, 1, 1, generator=random)
        entering = noise + 0.2 * torch.randn(4, 8, 8, generator=generator(seed, "perturb", step, index))
        noisy = scheduler.add_noise(latent[None], entering[None], torch.tensor([t]))
        words = torch.full((1, 3, 32), len(caption) / 10)
        output = tiny_model.denoiser.network(noisy, torch.tensor([t]), encoder_hidden_states=words).sample
        error = (output - noise).square().mean()
        expected.append(error * weights(weighting, "eps", torch.tensor([t]))[0])
    loss = objective(tiny_model, settings)(batch(), step)
    assert loss.parts == {}
    torch.testing.assert_close(loss.per_sample, torch.stack(expected), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_sample_is_the_same_in_any_batch(tiny_model):
    settings = dataclasses.replace(PLAIN, caption_dropout=0.5, input_perturbation=0.1)
    both = objective(tiny_model, settings)(batch(), 3).per_sample
    alone = torch.cat([objective(tiny_model, settings)([one], 3).per_sample for one in batch()])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(both, objective(tiny_model, settings)(batch(), 4).per_sample)


def test_captions_are_dropped_at_their_rate(tiny_model):
    made = objective(tiny_model, dataclasses.replace(PLAIN, caption_dropout=0.3))
    dropped = sum(made._drop_caption("word", step, 0) == "" for step in range(2000)) / 2000
    assert dropped == pytest.approx(0.3, abs=0.04)
    assert all(objective(tiny_model, PLAIN)._drop_caption("word", step, 0) == "word" for step in range(50))


def test_validation_is_fixed_unweighted_and_draws_nothing_global(tiny_model):
    loaded = [content for _, content in batch()]
    state = torch.get_rng_state()
    first = objective(tiny_model, PLAIN).validation(loaded)
    other = objective(tiny_model, TrainingSettings(loss="l1", caption_dropout=1.0), seed=77).validation(loaded)
    assert first == other > 0 and torch.equal(state, torch.get_rng_state())
    parts = [objective(tiny_model, PLAIN).validation([one]) for one in loaded]
    assert parts[0] == pytest.approx(objective(tiny_model, PLAIN).validation(loaded[:1]))
