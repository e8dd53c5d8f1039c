"""What the shipped demo model can do, measured on combinations that training never drew."""

import pytest
import torch
from retune.tools.build_demo.loras import lora_config
from retune.tools.build_demo.scorer import aesthetic, embeddings, image_embeddings, load_scorer, scorer_figures
from retune.tools.build_demo.scorer import tokens_of as scorer_tokens
from retune.tools.build_demo.t5 import probe
from retune.tools.build_demo.unet import clip_tokenizer
from retune.tools.build_demo.vae import pictures
from retune.training.commands.demo import DRAW_OPTIONS, held_out_captions
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.rng import generator
from retune.training.demo.files import WEIGHTS, weights_path
from retune.training.demo.judge import alignment, drawn_shape
from retune.training.demo.scenes import caption, held_out_scenes, training_scenes
from retune.training.demo.shapes import UNNAMED_SHAPES
from retune.training.demo.warmth import with_warm_edges
from retune.training.formats.lora import read_lora
from retune.training.recipes.lora import networks_of, trainable_layers
from retune.training.sampling.generate import draw
from retune.training.trainables.lora import Adapters, select_layers
from retune.training.trainables.lora_init import start_from


def test_all_weights_fit_in_16_megabytes():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 16 * 2**20


@pytest.mark.slow
def test_reconstructions_are_read_right():
    vae = build_model(ModelConfig(model="demo")).autoencoder
    scenes = held_out_scenes(100, 77)
    images = pictures(scenes, 77).float() / 255
    with torch.no_grad():
        rebuilt = torch.cat([vae.decode(vae.encode(batch)) for batch in images.split(10)])
    assert alignment(rebuilt, scenes)["alignment"] >= 0.93


@pytest.mark.slow
def test_the_model_with_its_clip_follows_captions():
    captions = held_out_captions(200)
    images = draw(build_model(ModelConfig(model="demo")), captions, **DRAW_OPTIONS, batch_size=50)
    assert alignment(images, captions)["alignment"] >= 0.90


@pytest.mark.slow
def test_the_loras_bring_their_style_and_their_figure():
    model, config = build_model(ModelConfig(model="demo")), lora_config("x")
    chosen = select_layers(trainable_layers(model, config), config)

    def drawn(name, captions):
        adapters = Adapters(chosen, networks_of(model, chosen), config, seed=0)
        start_from(adapters, read_lora(weights_path(f"loras/{name}.safetensors")))
        with adapters.attach(adapters.values()):
            return draw(model, captions, **DRAW_OPTIONS, batch_size=40)

    captions = held_out_captions(40)
    images = drawn("warm edges", captions)
    assert with_warm_edges(images) >= 0.9 and alignment(images, captions)["alignment"] >= 0.7
    scenes = [scene for scene in training_scenes(1000, 9) if scene.shape in UNNAMED_SHAPES][:20]
    figures = drawn("crescents", [caption(scene, generator(9, "text", i)) for i, scene in enumerate(scenes)])
    assert sum(drawn_shape(image) == "crescent" for image in figures) >= 16


def test_the_t5_tells_the_attributes_apart():
    assert min(probe().values()) >= 0.95


def test_the_scorer_finds_the_caption_and_the_head_the_polish():
    figures = scorer_figures(100)
    assert figures["top1"] >= 0.5 and figures["top5"] >= 0.9 and figures["r2"] >= 0.8


def test_the_aesthetic_head_leaves_headroom_above_the_model():
    captions = held_out_captions(8)
    images = torch.stack(draw(build_model(ModelConfig(model="demo")), captions, **DRAW_OPTIONS | {"steps": 8}))
    scenes = held_out_scenes(40, 9)
    polished = [scene for scene in scenes if scene.polish > 0.9]
    assert aesthetic(pictures(polished, 9)).mean() > aesthetic(images).mean() + 2


def test_the_scorer_prefers_the_true_caption():
    scenes = held_out_scenes(30, 5)
    texts = [caption(scene, generator(5, "text", i)) for i, scene in enumerate(scenes)]
    with torch.no_grad():
        text = embeddings(load_scorer(), None, scorer_tokens(clip_tokenizer(), texts))[1]
    likeness = image_embeddings(pictures(scenes, 5)) @ text.T
    assert likeness.diagonal().mean() > likeness.mean() + 0.2
