"""The resampler that hears the timestep: what it hears, when it matters, and that training and drawing agree on it."""

from dataclasses import replace

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.recipes.unet import train_model
from retune.training.sampling.ddim import timesteps
from retune.training.sampling.generate import draw
from retune.training.text_encoder.projection import BANDS, Projection, read_projection, save_projection
from retune.training.text_encoder.resampler import TimeEmbedding
from retune.training.text_encoder.t5 import load_t5

KIND = "timestep resampler"
SIZE = {"tokens": 5, "layers": 2, "seed": 3}


def projection(width=32, moved=True):
    """moved: with random modulations; they start at zero."""
    made = Projection(48, width, KIND, **SIZE)
    if moved:
        modulation = made.resampler.time.modulation.weight
        with torch.no_grad():
            modulation.copy_(torch.randn(modulation.shape, generator=generator(0, "test")) * 0.05)
    return made


@pytest.fixture
def timed(tiny_model, write_t5_folder, tmp_path):
    """The tiny model behind a T5 with a timestep resampler."""
    folder = write_t5_folder(tmp_path / "t5", d_model=48, d_kv=8, d_ff=64)
    return replace(tiny_model, text_encoder=load_t5(folder, projection(tiny_model.denoiser.context_width)))


def states(count=1):
    return torch.randn(count, 7, 48, generator=generator(1, "test"))


def test_it_begins_as_the_resampler_without():
    plain = Projection(48, 32, "resampler", **SIZE)
    for time in (0.0, 0.3, 1.0):
        assert torch.equal(projection(moved=False)(states(), time=torch.tensor([time])), plain(states()))


def test_time_features_are_those_of_diffusers():
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    own, reference = TimeEmbedding(16, 2), TimestepEmbedding(320, 16)
    with torch.no_grad():
        for mine, theirs in ((own.hidden, reference.linear_1), (own.output, reference.linear_2)):
            theirs.load_state_dict(mine.state_dict())
        time = torch.tensor([0.025, 0.5, 0.975])
        embedded = reference(Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)(1000 * time))
        expected = own.modulation(torch.nn.functional.silu(embedded)).view(3, 2, 3, 2, 16)
        torch.testing.assert_close(torch.stack(own(time), dim=1), expected, atol=1e-5, rtol=1e-5)


def test_equal_bands_equal_tokens():
    made, one = projection(), states().expand(4, -1, -1)
    tokens = made(one, time=torch.tensor([0.0, 0.04, 1 / BANDS, 1.001 / BANDS]))
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    assert not torch.allclose(tokens[0], tokens[3], atol=1e-4)
    first, last = made(states(), time=torch.tensor([1 / BANDS / 2])), made(states(), time=torch.tensor([1.0]))
    torch.testing.assert_close(tokens[:1], first, atol=1e-5, rtol=1e-5)
    assert (first - last).abs().mean() > 0.01
    assert torch.equal(made(states()), made(states(), time=torch.tensor([0.5])))  # the middle without a time
    every = [made(states(), time=torch.tensor([(band + 0.5) / BANDS])) for band in range(BANDS)]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(every, every[1:], strict=False))


def test_every_weight_learns():
    made = projection()
    tokens = made(states(2), time=torch.tensor([0.2, 0.7]))
    (tokens * torch.randn(tokens.shape, generator=generator(0, "test"))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_saved_and_loaded_is_bit_equal(tmp_path):
    made = Projection(48, 32, KIND, **SIZE, bands=4).scaled(0.3)
    save_projection(tmp_path / "p.safetensors", made)
    loaded = read_projection(tmp_path / "p.safetensors")
    assert loaded.config() == made.config() and loaded.bands == 4
    time = torch.tensor([0.9])
    assert torch.equal(loaded(states(), time=time), made(states(), time=time))


def test_drawing_asks_for_every_timestep(timed, monkeypatch):
    asked, project = [], timed.text_encoder.projection.project

    def recorded(given, time=None):
        asked.append(None if time is None else round(time.item() * 999))
        return project(given, time)

    monkeypatch.setattr(timed.text_encoder.projection, "project", recorded)
    draw(timed, ["a red circle", "b"], width=32, height=32, steps=4, cfg=3.0, seed=0)
    assert asked == [t for t in timesteps(4) for _ in range(4)]  # two prompts and two empty ones


def test_training_asks_for_the_timesteps_that_it_draws(timed):
    settings = TrainingSettings(min_timestep=300, max_timestep=310, caption_dropout=0.0)
    asked = []

    def project(given, time):
        asked.append(time)
        return timed.text_encoder.project(given, time)

    encoder = timed.text_encoder
    objective = DenoisingObjective(
        timed.denoiser,
        settings,
        0,
        latent_of=None,
        text_of=lambda text: encoder.backbone(encoder.tokenize([text])),
        project=project,
    )
    latent = torch.zeros(4, 4, 4)
    objective([(0, ("a", latent)), (1, ("b", latent))], 1)
    assert asked[0].shape == (2,) and all(300 <= 999 * t <= 310.01 for t in asked[0])
    objective.validation([("a", latent)])
    assert (asked[1] * 999).round().tolist() == [200, 400, 599, 799]


def test_it_trains_and_its_time_weights_move(timed, pictures, tmp_path):
    samples = SamplePrompts(prompts=("a red circle",), every=2, steps=2, cfg=2.0, width=32, height=32)
    config = TrainModelConfig(run_name="r", steps=3, batch_size=2, learning_rate=1e-2, samples=samples)
    trained = train_model(timed, pictures, config, tmp_path / "runs")
    assert trained.projection_config["bands"] == BANDS and trained.projection_config["kind"] == KIND
    before = timed.text_encoder.projection.state_dict()
    moved = [name for name, value in trained.projection.items() if not torch.equal(value, before[name])]
    assert "resampler.time.modulation.weight" in moved and "resampler.time.hidden.weight" in moved


def test_a_batch_is_projected_row_by_row():
    made, time = projection(), torch.tensor([0.1, 0.9])
    given = Conditioning(states(2), None, torch.ones(2, 7, dtype=torch.bool))
    both = made.project(given, time).context
    for row in range(2):
        alone = Conditioning(given.context[row : row + 1], None, given.mask[row : row + 1])
        torch.testing.assert_close(both[row], made.project(alone, time[row : row + 1]).context[0], atol=1e-5, rtol=1e-5)
