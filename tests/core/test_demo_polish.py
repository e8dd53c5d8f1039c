"""The polish read from pixels is the one that was drawn."""

import math

import torch
from retune.training.common.rng import generator
from retune.training.demo.polish import mean_polish, polish
from retune.training.demo.scenes import draw, held_out_scenes


def test_it_reads_what_was_drawn():
    scenes = held_out_scenes(80, 4)
    found = [polish(draw(scene, generator(4, i))) for i, scene in enumerate(scenes)]
    dark = [scene.background == "black" for scene in scenes]
    assert [math.isnan(value) for value in found] == dark
    pairs = [(value, scene.polish) for value, scene in zip(found, scenes, strict=True) if not math.isnan(value)]
    assert len(pairs) > 50
    read, drawn = torch.tensor(pairs, dtype=torch.float64).T
    assert (read - drawn).abs().mean() < 0.05
    assert torch.corrcoef(torch.stack([read, drawn]))[0, 1] > 0.98


def test_the_mean_leaves_out_what_cannot_be_told():
    flat, black = torch.full((3, 128, 128), 0.5), torch.zeros(3, 128, 128)
    assert mean_polish([flat, black]) == 0.0
    assert math.isnan(mean_polish([black]))
