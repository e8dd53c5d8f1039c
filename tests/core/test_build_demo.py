"""The parts of the program that builds the demo model which need no long training."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from retune.tools.build_demo import vae
from retune.tools.build_demo.muon import Muon, muon_and_adamw, orthogonalised
from retune.tools.build_demo.readme import write_readme
from retune.tools.build_demo.scorer import TEXT_LENGTH
from retune.tools.build_demo.text import HIDDEN_WORDS, MOST_HIDDEN, SYNONYMS, near_miss, with_hidden_words
from retune.tools.build_demo.unet import blurred_hidden_words, clip_tokenizer, tokens_of
from retune.training.common.rng import generator
from retune.training.demo.scenes import (
    ATTRIBUTES,
    QUALITIES,
    VALUES,
    caption,
    held_out_scenes,
    is_held_out,
    pick,
    training_scenes,
    with_words,
)
from retune.training.demo.shapes import NAMED_SHAPES, UNNAMED_SHAPES
from torch import nn


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 6)])
def test_orthogonalised_keeps_singular_vectors_and_sets_values_near_one(shape):
    matrix = torch.randn(shape, generator=generator(0, "matrix"), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonalised(matrix[None])[0] @ right.T
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.2)).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9


def test_a_step_of_muon_moves_every_direction_alike():
    weight = nn.Parameter(torch.zeros(4, 2, 3, 3))
    weight.grad = torch.randn(4, 2, 3, 3, generator=generator(0, "gradient"))
    Muon([weight], lr=0.1).step()
    values = torch.linalg.svdvals(weight.detach().flatten(1)) / (0.1 * 0.2 * 18**0.5)
    assert ((values > 0.6) & (values < 1.2)).all()


def test_outer_layers_and_vectors_are_trained_by_adamw():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    muon, adamw = muon_and_adamw(network, ("0", "2"), 1e-3)
    assert [p is network[1].weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 5


def test_hidden_words_stand_for_figures_alone():
    tokenizer, rng = clip_tokenizer(), generator(0, "hidden")
    scenes = training_scenes(300, 3)
    ids = tokens_of(tokenizer, [caption(scene, rng) for scene in scenes])
    hidden = with_hidden_words(tokenizer, ids, scenes, rng)
    assert hidden.shape == ids.shape and hidden.max() < len(tokenizer) + HIDDEN_WORDS
    replaced = 0
    for row, before, scene in zip(hidden, ids, scenes, strict=True):
        words = row[row >= len(tokenizer)] - len(tokenizer)
        if scene.shape in NAMED_SHAPES:
            assert torch.equal(row, before)
        elif len(words):
            replaced += 1
            assert {int(word) // SYNONYMS for word in words} == {UNNAMED_SHAPES.index(scene.shape)}
            assert len(words) <= MOST_HIDDEN and row[-1] == before[-1]
            assert "figure" not in tokenizer.decode(row[row < len(tokenizer)])
    assert 0.6 < replaced / sum(scene.shape in UNNAMED_SHAPES for scene in scenes) < 0.8


def test_noise_is_added_to_the_vectors_of_hidden_words_alone():
    class Encoder(nn.Module):
        embedding = nn.Embedding(6, 4)

        def get_input_embeddings(self):
            return self.embedding

    encoder, ids = Encoder(), torch.tensor([[0, 4], [5, 3]])
    with blurred_hidden_words(encoder, 4, generator(0, "noise")):
        noisy = encoder.embedding(ids)
    plain = encoder.embedding(ids)
    assert torch.equal((noisy != plain).any(-1), ids >= 4)


def test_a_near_miss_differs_in_one_thing_and_is_never_held_out():
    changed = set()
    for number, scene in enumerate(training_scenes(300, 5)):
        other = near_miss(scene, generator(number, "miss"))
        differences = [name for name in ATTRIBUTES if getattr(scene, name) != getattr(other, name)]
        words = [pair for pair in zip(scene.words, other.words, strict=True) if pair[0] != pair[1]]
        assert len(differences) + len(words) == 1 and not is_held_out(other)
        if words:
            (quality,) = (name for name, ends in QUALITIES.items() if set(ends) == set(words[0]))
            assert getattr(other, quality) == pytest.approx(1 - getattr(scene, quality))
            assert other == replace(scene, words=other.words, **{quality: getattr(other, quality)})
        changed |= {*differences, *(word for pair in words for word in pair)}
    assert changed >= {*ATTRIBUTES, "glossy", "dim", "rich"}


def test_words_are_near_misses_of_held_out_scenes_too():
    scenes = [with_words(scene, ["glossy", "dim"]) for scene in held_out_scenes(60, 5)]
    misses = [near_miss(scene, generator(number, "miss")) for number, scene in enumerate(scenes)]
    assert {scene.words != miss.words for scene, miss in zip(scenes, misses, strict=True)} == {True, False}


def test_no_caption_is_cut_off_in_the_scorers_text():
    tokenizer = clip_tokenizer()
    for number, scene in enumerate(training_scenes(400, 6)):
        rng = generator(number, "words")
        longest = replace(scene, count=3, position="bottom right" if "bottom right" in VALUES["position"] else "bottom")
        text = caption(with_words(longest, [pick(ends, rng) for ends in QUALITIES.values()]), rng)
        assert len(tokenizer(text).input_ids) <= TEXT_LENGTH


def test_scaled_latents_are_decoded_alike():
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(**vae.CONFIG).eval()
    images = vae.pictures(training_scenes(2, 0), 0)
    latents, moments = vae.latents_of(autoencoder, images, 1.0), autoencoder.encode(images / 127.5 - 1).latent_dist
    rebuilt = vae.decoded(autoencoder, latents, 1.0)
    vae.scale_latents(autoencoder, 3.0)
    scaled = autoencoder.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(scaled.mean, 3 * latents)
    torch.testing.assert_close(scaled.std, 3 * moments.std)
    torch.testing.assert_close(vae.decoded(autoencoder, scaled.mean, 1.0), rebuilt, rtol=1e-4, atol=1e-5)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    def train(folder, stop=None):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1))
        inputs = torch.randn(20, 3, generator=generator(0, "inputs"))

        def step(number):
            loss = network(inputs[number : number + 4]).square().mean()
            loss.backward()
            return float(loss.detach())

        def after(done):
            if done == stop:
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        optimizers = muon_and_adamw(network, ("0", "2"), 1e-2)
        vae.run_steps("toy", network, optimizers, step, 12, 1e-2, folder, after)
        return network.state_dict()

    monkeypatch.setattr(vae, "SAVE_EVERY", -1.0)
    expected = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop=7)
    found = train(tmp_path / "stopped")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_readme_lists_what_the_parts_returned(tmp_path, monkeypatch):
    monkeypatch.setattr("retune.tools.build_demo.readme.WEIGHTS", tmp_path)
    about = {"seconds": 600.0, "date": "2026-01-02", "threads": 2}
    write_readme({"vae": {"steps": 5, "loss": 0.25} | about, "figures": {"table": "| a | b |", "gain": 1.5} | about})
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| autoencoder | 2026-01-02 | 5 | 10 | loss 0.25 |" in text and "| a | b |" in text
    assert "0 h 20 min with 2 threads" in text
