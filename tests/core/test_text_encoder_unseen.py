"""The scale measured on some prompts holds on others: the demo's T5 over 200 captions that it was not measured on."""

import pytest
import torch
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.rng import generator
from retune.training.demo.files import weights_path
from retune.training.demo.scenes import caption, training_scenes
from retune.training.text_encoder.fit import EncoderStates, fit_projection
from retune.training.text_encoder.projection import Projection
from retune.training.text_encoder.scale import PROMPTS, scale_to, token_statistics
from retune.training.text_encoder.t5 import load_t5
from retune.training.text_encoder.t5_file import read_t5_config

TARGET = 0.2
T5 = weights_path("t5.safetensors")


def captions(seed, count, without=()):
    """Different captions of demo scenes, none of those in `without`."""
    scenes = training_scenes(2 * count, seed)
    found = dict.fromkeys(caption(scene, generator(seed, "caption", i)) for i, scene in enumerate(scenes))
    return [text for text in found if text not in without][:count]


@pytest.fixture(scope="module")
def unseen():
    return captions(5, 200)


def t5(kind="orthogonal"):
    return load_t5(T5, Projection(read_t5_config(T5)["d_model"], 128, kind))


def prompt_std(encoder, prompts):
    """std of each prompt as a share of the target."""
    return torch.tensor(token_statistics(encoder, prompts).prompt_std) / TARGET


@pytest.mark.parametrize("kind", ["orthogonal", "truncate", "mlp", "resampler"])
def test_within_one_percent_of_the_target_over_200_unseen_captions(kind, unseen):
    assert len(set(unseen)) == 200 and not set(unseen) & set(seen := captions(0, 100, unseen))
    scaled, report = scale_to(t5(kind), TARGET, seen)
    shares = prompt_std(scaled, unseen)
    assert shares.mean().item() == pytest.approx(1, abs=0.01)
    assert shares.std().item() < 0.01
    assert report.after.std == pytest.approx(TARGET, rel=1e-5)


@pytest.mark.parametrize("kind", ["orthogonal", "truncate", "mlp", "resampler"])
def test_the_built_in_prompts_are_near_it_although_this_t5_knows_few_of_their_words(kind, unseen):
    """Words that the demo's T5 never read are up to 1.2 % louder than its captions."""
    assert not set(unseen) & set(PROMPTS)
    shares = prompt_std(scale_to(t5(kind), TARGET)[0], unseen)
    assert shares.mean().item() == pytest.approx(1, abs=0.015)
    assert shares.std().item() < 0.01


@pytest.fixture(scope="module")
def clip():
    return EncoderStates(build_model(ModelConfig(model="demo")).text_encoder, before_projection=False)


@pytest.mark.parametrize("method", ["ridge", "mean-covariance"])
def test_a_fitted_projection_keeps_to_it_when_measured_on_captions_of_the_same_kind(method, clip, unseen):
    """It makes some tokens louder than others, so that single captions differ, and other kinds of prompts do too."""
    seen = captions(0, 100, unseen)
    plain = t5()
    fit = fit_projection(EncoderStates(plain, before_projection=True), clip, seen, method=method)[0]
    shares = prompt_std(scale_to(plain.with_projection(fit), TARGET, seen)[0], unseen)
    assert shares.mean().item() == pytest.approx(1, abs=0.03)
    assert shares.std().item() > 0.01
