"""Text gap and loss per noise level: by closed form, by hand on a real UNet, and beside a run's validation loss."""

from collections import Counter

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.evaluation.text_gap import BANDS, MAX_EVAL_IMAGES, evaluate, shuffled
from retune.training.loop.loop import Loop
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.recipes import denoising
from retune.training.recipes.unet import train_model
from retune.training.runs.folder import RunFolder

CAPTIONS = ["a red circle", "two small blue squares", "a green star, white background"]


class Reader:
    """A denoiser whose text is the latent itself: with the true caption it finds the noise exactly."""

    device, prediction_type = torch.device("cpu"), "eps"
    sigmas = torch.linspace(0.1, 10, 1000)

    def add_noise(self, latent, noise, sigma):
        return latent + sigma.view(-1, 1, 1, 1) * noise

    def target(self, latent, noise, sigma):
        return noise

    def predict(self, noisy, sigma, conditioning):
        return (noisy - conditioning.context.view_as(noisy)) / sigma.view(-1, 1, 1, 1)


def objective(denoiser, text_of, project=lambda states, time: states):
    return DenoisingObjective(denoiser, TrainingSettings(), 7, latent_of=None, text_of=text_of, project=project)


def examples(count, captions=CAPTIONS, size=4):
    random = torch.Generator().manual_seed(5)
    return [(captions[i % len(captions)], torch.randn(4, size, size, generator=random)) for i in range(count)]


def levels(index, total=1000):
    """(timestep, noise) of an image in each band, drawn as the module's text says."""
    found = []
    for band in range(BANDS):
        source = generator(0, "evaluation", index, band)
        time = int(torch.randint(total * band // BANDS, total * (band + 1) // BANDS, (), generator=source))
        found.append((time, source))
    return found


def test_the_gap_of_a_perfect_reader_has_a_closed_form():
    loaded = examples(3)
    latents = dict(loaded)
    figures = evaluate(objective(Reader(), lambda c: Conditioning(latents[c].reshape(1, 1, -1))), loaded)
    assert figures["bands"] == pytest.approx([0.0] * BANDS, abs=1e-6)
    wrong, expected = shuffled([c for c, _ in loaded]), []
    for index, (_, latent) in enumerate(loaded):
        error = (latent - latents[wrong[index]]).square().mean()
        expected += [(error / Reader.sigmas[time] ** 2).item() for time, _ in levels(index)]
    assert figures["text_gap"] == pytest.approx(sum(expected) / len(expected), rel=1e-3) and figures["text_gap"] > 0.01


def unet_objective(tiny_model):
    encoder = tiny_model.text_encoder

    def text_of(caption):
        with torch.no_grad():
            return encoder.encode(encoder.tokenize([caption]))

    return objective(tiny_model.denoiser, text_of)


def test_a_unet_is_measured_as_by_hand(tiny_model):
    loaded, task = examples(4, size=8), unet_objective(tiny_model)
    figures, denoiser, errors = evaluate(task, loaded), tiny_model.denoiser, {True: [], False: []}
    wrong = shuffled([caption for caption, _ in loaded])
    for index, (caption, latent) in enumerate(loaded):
        for time, source in levels(index):
            noise, sigma = torch.randn(latent.shape, generator=source)[None], denoiser.sigmas[[time]]
            noisy = latent[None] + sigma * noise
            for true, words in ((True, caption), (False, wrong[index])):
                with torch.no_grad():
                    output = denoiser.predict(noisy, sigma, task.text_of(words))
                errors[true].append((output - noise).square().mean().item())
    by_band = torch.tensor(errors[True]).view(4, BANDS).mean(0).tolist()
    assert figures["bands"] == pytest.approx(by_band, rel=1e-4)
    gap = (sum(errors[False]) - sum(errors[True])) / len(errors[True])
    assert figures["text_gap"] == pytest.approx(gap, abs=2e-6) and abs(gap) > 1e-5


def test_a_unet_that_does_not_read_has_no_gap(tiny_model):
    for name, parameter in tiny_model.denoiser.network.named_parameters():
        if ".attn2.to_out.0." in name:
            torch.nn.init.zeros_(parameter)
    assert evaluate(unet_objective(tiny_model), examples(4, size=8))["text_gap"] == pytest.approx(0.0, abs=1e-7)


def test_no_random_state_is_touched_and_numbers_repeat(tiny_model):
    task, loaded = unet_objective(tiny_model), examples(3, size=8)
    state = torch.get_rng_state()
    before = task.validation(loaded)
    first = evaluate(task, loaded)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(task, loaded) == first and task.validation(loaded) == before


def test_what_cannot_be_measured_is_left_out():
    task = objective(Reader(), lambda caption: Conditioning(torch.zeros(1, 1, 64)))
    assert evaluate(task, []) == {} == evaluate(task, examples(1))
    assert list(evaluate(task, examples(3, ["same"]))) == ["bands"]
    more = examples(MAX_EVAL_IMAGES + 5)
    assert evaluate(task, more) == evaluate(task, more[:MAX_EVAL_IMAGES])


@pytest.mark.parametrize("counts", [(1, 1), (1,) * 9, (3, 2, 2), (2, 2), (4, 1, 3), (3, 1)])
def test_shuffled_captions_go_to_other_images(counts):
    captions = [f"caption {i}" for i, count in enumerate(counts) for _ in range(count)]
    captions = [captions[i] for i in torch.randperm(len(captions), generator=torch.Generator().manual_seed(1))]
    got = shuffled(captions)
    assert Counter(got) == Counter(captions) and got == shuffled(captions)
    kept = sum(one == other for one, other in zip(got, captions, strict=True))
    assert kept == max(0, 2 * max(counts) - len(captions))  # what no order can avoid


def test_a_run_logs_them_beside_the_same_validation_loss(tiny_model, pictures, tmp_path, monkeypatch):
    settings = TrainingSettings(warmup_steps=1, validation_fraction=0.5, validate_every=2)
    run = TrainModelConfig(run_name="r", steps=2, batch_size=2, learning_rate=1e-3, settings=settings)
    seen = []
    original = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda self, *a, **k: (seen.append(k), original(self, *a, **k))[1])
    trained = train_model(tiny_model, pictures, run, tmp_path / "with")
    assert len(seen[0]["validation"]) >= 2
    monkeypatch.setattr(denoising, "evaluate", lambda *_: {})
    plain = train_model(tiny_model, pictures, run, tmp_path / "without")
    rows = [RunFolder(tmp_path / side / "r").rows() for side in ("with", "without")]
    figures = [row for row in rows[0] if row.get("event") == "validation"]
    assert [row["step"] for row in figures] == [0, 2]
    assert all(len(row["bands"]) == BANDS and min(row["bands"]) > 0 and "text_gap" in row for row in figures)
    assert figures[0]["bands"] != figures[1]["bands"]
    bare = [{key: value for key, value in row.items() if key not in ("bands", "text_gap")} for row in rows[0]]
    assert bare == rows[1]
    assert all(torch.equal(value, plain.unet[name]) for name, value in trained.unet.items())
