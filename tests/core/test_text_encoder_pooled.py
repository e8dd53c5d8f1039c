"""T5's pooled output for SDXL: a linear map of the real tokens' mean, whatever the padding, and trainable."""

import json
from dataclasses import replace

import pytest
import torch
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.cache import TextCache
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.protocols import Conditioning
from retune.training.recipes.checks import check_fit
from retune.training.recipes.unet import train_model
from retune.training.text_encoder.file import SavedTextEncoder, read_text_encoder, save_text_encoder
from retune.training.text_encoder.fit import fit_projection
from retune.training.text_encoder.projection import Projection, read_projection, save_projection
from retune.training.text_encoder.t5 import Padding, load_t5

TEXTS = ["a red circle", "two small blue squares on a green ground, and a star", ""]
PADDINGS = [{}, {"pad": "max_tokens", "max_tokens": 60}]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory, write_t5_folder):
    return write_t5_folder(tmp_path_factory.mktemp("t5"), d_model=48, d_kv=8, d_ff=64)


def encoder(folder, width=32, pooled_width=20, padding=None, **options):
    return load_t5(
        folder, Projection(48, width, pooled_width=pooled_width, **options), padding=Padding(**padding or {})
    )


@pytest.mark.parametrize("padding", PADDINGS, ids=["tight", "padded"])
def test_pooled_is_a_map_of_the_real_tokens_mean(t5_folder, padding):
    t5 = encoder(t5_folder, padding=padding)
    tokens = t5.tokenize(TEXTS)
    batch = t5.encode(tokens)
    assert batch.pooled.shape == (3, 20)
    plain = encoder(t5_folder, pooled_width=0, padding=padding)
    assert torch.equal(batch.context, plain.encode(tokens).context) and plain.encode(tokens).pooled is None
    for row, ids in enumerate(tokens):
        states = t5.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(
            batch.pooled[row], t5.projection.pooled.weight @ states.mean(0), atol=1e-5, rtol=1e-4
        )
    scaled = t5.scaled(3.0).encode(tokens)
    assert torch.equal(scaled.pooled, batch.pooled)
    torch.testing.assert_close(scaled.context, 3 * batch.context)
    assert t5.fingerprint != plain.fingerprint  # an older cache has no mean


@pytest.mark.parametrize("padding", PADDINGS, ids=["tight", "padded"])
def test_cached_states_give_the_same_pooled_output(t5_folder, tmp_path, padding):
    t5 = encoder(t5_folder, padding=padding)
    texts = TextCache(tmp_path, lambda captions: t5.backbone(t5.tokenize(captions)), t5.fingerprint)
    assert texts.fill(TEXTS) == 3
    result = t5.project(Conditioning.cat(texts.get(caption) for caption in TEXTS))
    expected = t5.encode(t5.tokenize(TEXTS))
    torch.testing.assert_close(result.pooled, expected.pooled, atol=1e-5, rtol=1e-4)
    assert (result.mask is None) == (expected.mask is None) == bool(padding)


def test_what_stands_before_is_cached_and_comes_first(tmp_path):
    random = torch.Generator().manual_seed(0)
    projection = Projection(8, 6, pooled_width=3)
    states = {
        n: Conditioning(
            torch.randn(1, n, 8, generator=random),
            torch.randn(1, 8, generator=random),
            prefix=Conditioning(torch.randn(1, 4 * n, 6, generator=random), torch.randn(1, 5, generator=random)),
        )
        for n in (1, 3)
    }
    texts = TextCache(tmp_path, lambda captions: states[len(captions[0])], "f")
    batch = projection.project(Conditioning.cat([texts.get("a"), texts.get("abc")]).to(torch.float32))
    assert batch.context.shape == (2, 15, 6)
    for row, n in enumerate(states):
        given = states[n]
        expected = torch.cat([given.prefix.context[0], projection(given.context[0])])
        torch.testing.assert_close(batch.context[row][batch.mask[row]], expected)
        assert torch.equal(batch.pooled[row], given.prefix.pooled[0])
        without = replace(given, prefix=replace(given.prefix, pooled=None))
        torch.testing.assert_close(projection.project(without).pooled, projection.pooled(given.pooled))
    assert projection.project(states[1]).mask is None


@pytest.mark.parametrize("kind", ["orthogonal", "truncate", "mlp", "resampler"])
def test_files_keep_the_pooled_map(tmp_path, kind):
    projection = Projection(8, 6, kind, bias=True, seed=2, pooled_width=5, tokens=3, layers=2).scaled(0.37)
    save_projection(tmp_path / "p.safetensors", projection)
    loaded = read_projection(tmp_path / "p.safetensors")
    assert loaded.config() == projection.config() and loaded.pooled_width == 5
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in projection.state_dict().items())
    if kind != "truncate":
        square = loaded.pooled.weight @ loaded.pooled.weight.T
        torch.testing.assert_close(square, torch.eye(5), atol=1e-5, rtol=0)


def test_older_files_still_load():
    old = {"kind": "mlp", "in_width": 8, "width": 6, "bias": False}
    projection = Projection(8, 6, "mlp", seed=1)
    assert projection.config() == old
    loaded = Projection.from_state(old, projection.state_dict())
    assert loaded.pooled_width == 0 and loaded.tokens is None and loaded.pool(torch.zeros(1, 8)) is None


def test_a_saved_encoder_is_asked_for_what_the_model_reads(tmp_path, t5_folder):
    t5 = encoder(t5_folder)
    fields = {"padding": t5.padding, "t5_file": "t5", "t5_sha256": "0", "t5_config": {"d_model": 48}}
    save_text_encoder(
        tmp_path / "te.safetensors", SavedTextEncoder(projection=t5.projection, keeps_clip=True, **fields)
    )
    saved = read_text_encoder(tmp_path / "te.safetensors")
    saved.check_pooled(20)
    saved.check_pooled(0)
    saved.check_keep_clip(True)
    with pytest.raises(ValueError, match="te.safetensors gives a pooled output of 20; expected 1280"):
        saved.check_pooled(1280)
    with pytest.raises(ValueError, match="te.safetensors was made beside a CLIP, which is not part of its file"):
        saved.check_keep_clip(False)
    plain = SavedTextEncoder(projection=Projection(48, 32), name="old", **fields)
    with pytest.raises(ValueError, match="old gives no pooled output; expected 1280"):
        plain.check_pooled(1280)


class Made:
    """States and a pooled output made from a prompt: the latter a linear map of the mean of the former."""

    def __init__(self, weight, noise=0.0):
        self.weight, self.noise = weight, noise

    def states(self, prompt):
        random = torch.Generator().manual_seed(sum(map(ord, prompt)))
        states = torch.randn(len(prompt.split()) + 3, 6, generator=random, dtype=torch.float64)
        return states, torch.tensor([True] * (len(states) - 2) + [False] * 2)

    def pooled(self, prompt):
        states, real = self.states(prompt)
        random = torch.Generator().manual_seed(len(prompt))
        return states[real].mean(0) @ self.weight.T + 1 + self.noise * torch.randn(4, generator=random).double()


@pytest.mark.parametrize("method", ["ridge", "mean-covariance"])
def test_the_pooled_map_is_found_exactly(method):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = [f"word{i} and {i * 7 % 11} more"[: 5 + i] for i in range(60)]
    made = Made(weight)
    projection, report = fit_projection(made, made, words, ridge=1e-9, pooled_width=4, method=method)
    torch.testing.assert_close(projection.pooled.weight.double(), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(projection.pooled.bias, torch.ones(4), atol=1e-4, rtol=1e-4)
    assert report.pooled_explained == pytest.approx(1, abs=1e-6) and "100.0% of the pooled output's" in report.text()
    noisy = fit_projection(made, Made(weight * 0, noise=1.0), words, ridge=1.0, pooled_width=4)[1]
    assert noisy.pooled_explained < 0.5
    assert fit_projection(made, made, words)[1].pooled_explained is None
    with pytest.raises(ValueError, match=r"reference's pooled output is one of \(4,\); expected 1280"):
        fit_projection(made, made, words, pooled_width=1280)


@pytest.mark.parametrize("kind", ["orthogonal", "resampler"])
def test_sdxl_trains_with_t5(kind, tiny_model, sdxl_unet, pictures, t5_folder, tmp_path):
    denoiser = DiffusersDenoiser(sdxl_unet)
    assert (denoiser.context_width, denoiser.pooled_width, tiny_model.denoiser.pooled_width) == (2048, 1280, 0)
    padding = {"pad": "max_tokens", "max_tokens": 20}
    t5 = encoder(t5_folder, 2048, 1280, padding, kind=kind, tokens=5, layers=1)
    model = replace(tiny_model, denoiser=denoiser, text_encoder=t5)
    settings = TrainingSettings(warmup_steps=1)
    run = TrainModelConfig(run_name="r", steps=2, batch_size=2, learning_rate=1e-3, settings=settings)
    trained = train_model(model, pictures, run, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len([row for row in rows if "loss" in row]) == 2
    again = Projection.from_state(trained.projection_config, trained.projection)
    for name, _ in t5.projection.named_parameters():
        assert (again.state_dict()[name] - t5.projection.state_dict()[name]).abs().max() > 1e-5
    with pytest.raises(ValueError, match="text encoder gives no pooled output"):
        denoiser.predict(torch.zeros(1, 4, 8, 8), torch.ones(1), Conditioning(torch.zeros(1, 3, 2048)))


@pytest.mark.parametrize("pooled_width, found", [(0, "none"), (20, "20")])
def test_a_pooled_output_that_does_not_fit_is_refused_first(
    pooled_width, found, tiny_model, sdxl_unet, pictures, t5_folder, tmp_path
):
    t5 = encoder(t5_folder, 2048, pooled_width)
    model = replace(tiny_model, denoiser=DiffusersDenoiser(sdxl_unet), text_encoder=t5)
    run = TrainModelConfig(run_name="r", steps=2, batch_size=2)
    with pytest.raises(ValueError, match=f"pooled output is {found}; the UNet reads one of 1280"):
        train_model(model, pictures, run, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    check_fit(replace(tiny_model, text_encoder=encoder(t5_folder, 32, pooled_width)), run)  # reads none
    assert tiny_model.text_encoder.pooled_width == 0
