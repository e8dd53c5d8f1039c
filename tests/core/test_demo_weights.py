"""What the shipped demo model can do, measured on combinations that training never drew."""

from dataclasses import replace

import pytest
import torch
from retune.benchmarks.demo_model import IDEAL, draw_and_judge, paired_gain
from retune.benchmarks.word_study import captions_with
from retune.tools.build_demo.loras import draw_with_lora
from retune.tools.build_demo.scorer import aesthetic, embeddings, image_embeddings, load_scorer, scorer_figures
from retune.tools.build_demo.scorer import tokens_of as scorer_tokens
from retune.tools.build_demo.t5 import probe
from retune.tools.build_demo.unet import clip_tokenizer
from retune.tools.build_demo.vae import pictures
from retune.training.commands.demo import DRAW_OPTIONS, held_out_captions
from retune.training.commands.open_model import build_demo_model
from retune.training.common.callbacks import Callbacks
from retune.training.common.rng import generator
from retune.training.demo.files import WEIGHTS
from retune.training.demo.judge import alignment, drawn_shape
from retune.training.demo.scenes import QUALITY_WORDS, caption, held_out_scenes, with_words
from retune.training.demo.warmth import with_warm_edges
from retune.training.sampling.generate import draw

LOW = ["flat", "dim", "plain"]
ALIGNED, HEADROOM = 0.92, 0.2
"""Least alignment of 100 captions, and least distance of the aesthetic from the best picture there can be."""


def test_all_weights_fit_in_24_megabytes():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 24e6


@pytest.mark.slow
def test_reconstructions_are_read_right():
    vae = build_demo_model().autoencoder
    scenes = held_out_scenes(100, 77)
    images = pictures(scenes, 77).float() / 255
    with torch.no_grad():
        rebuilt = torch.cat([vae.decode(vae.encode(batch)) for batch in images.split(10)])
    assert alignment(rebuilt, scenes)["alignment"] >= 0.96


@pytest.mark.slow
def test_the_model_with_its_clip_follows_captions_and_words_of_quality():
    model, callbacks = build_demo_model(), Callbacks()
    scenes = held_out_scenes(100, 1)
    plain = draw_and_judge(model, scenes, callbacks, "plain")
    assert plain.figures["alignment"] >= ALIGNED
    half = len(scenes) // 2
    words = [with_words(scene, list(IDEAL) if i < half else LOW) for i, scene in enumerate(scenes)]
    drawn = draw_and_judge(model, words, callbacks, "words of quality")
    assert all(drawn.figures[word] >= 0.8 for word in QUALITY_WORDS)
    gain, error = paired_gain(*(replace(one, scores=one.scores[:half]) for one in (plain, drawn)))
    assert gain - 2 * error >= 1 and drawn.figures["alignment"] >= plain.figures["alignment"] - 0.05


@pytest.mark.slow
def test_the_loras_bring_their_style_and_their_figure():
    captions = held_out_captions(40)
    images = draw_with_lora("warm edges", captions)
    assert with_warm_edges(images) >= 0.9 and alignment(images, captions)["alignment"] >= 0.7
    figures = draw_with_lora("crescents", captions_with("figure", 20))
    assert sum(drawn_shape(image) == "crescent" for image in figures) >= 16


def test_the_t5_tells_the_attributes_apart():
    assert min(probe().values()) >= 0.97


def test_the_scorer_finds_the_caption_and_the_head_the_qualities():
    figures = scorer_figures(100)
    assert figures["top1"] >= 0.5 and figures["top5"] >= 0.9 and figures["r2"] >= 0.8
    assert figures["agreement of attributes"] >= 0.9 and figures["agreement of words"] >= 0.9


def test_the_aesthetic_head_leaves_headroom_above_the_ideal_prompt():
    scenes = [with_words(scene, IDEAL) for scene in held_out_scenes(8, 1)]
    captions = [caption(scene, generator(1, "ideal", i)) for i, scene in enumerate(scenes)]
    images = torch.stack(draw(build_demo_model(), captions, **DRAW_OPTIONS | {"steps": 8}))
    best = [replace(scene, polish=1.0, light=1.0, richness=1.0) for scene in scenes]
    assert aesthetic(pictures(best, 9)).mean() > aesthetic(images).mean() + HEADROOM


def test_the_scorer_prefers_the_true_caption():
    scenes = held_out_scenes(30, 5)
    texts = [caption(scene, generator(5, "text", i)) for i, scene in enumerate(scenes)]
    with torch.no_grad():
        text = embeddings(load_scorer(), None, scorer_tokens(clip_tokenizer(), texts))[1]
    likeness = image_embeddings(pictures(scenes, 5)) @ text.T
    assert likeness.diagonal().mean() > likeness.mean() + 0.2
