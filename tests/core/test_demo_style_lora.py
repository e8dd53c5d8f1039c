"""The style that a LoRA learns from twenty pictures: there at full strength, half there at half, gone at none."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch
from retune.training.commands.demo import DRAW_OPTIONS, held_out_captions
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.config.lora import LoraConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.demo.judge import alignment
from retune.training.demo.scenes import demo_examples
from retune.training.demo.warmth import warmth, with_warm_edges
from retune.training.recipes.lora import networks_of, train_lora, trainable_layers
from retune.training.sampling.generate import draw
from retune.training.trainables.lora import Adapters, select_layers

WORKFLOW = Path(__file__).parents[1] / "workflows" / "train_style_lora.json"
SETTINGS = {"lr_schedule", "warmup_steps", "loss_weighting", "caption_dropout", "optimizer", "max_grad_norm"}


@pytest.mark.slow
def test_the_workflows_settings_teach_the_style_and_keep_the_model_listening(tmp_path):
    """Against the acceptance figures: style in 90 % of the samples, alignment at most five points lower.

    The pictures of a strength of nothing are compared bit by bit, and those of half only by their median: few suffice.
    """
    nodes = {node["class_type"]: node["inputs"] for node in json.loads(WORKFLOW.read_text(encoding="utf-8")).values()}
    run, data = nodes["RetuneTrainLora"], nodes["RetuneDemoDataset"]
    images, captions = demo_examples(data["count"], data["seed"], data["subset"], data["look"])
    names = {"steps", "batch_size", "learning_rate", "rank", "alpha", "algorithm", "targets", "run_name", "seed"}
    settings = {name: value for name, value in nodes["RetuneTrainingSettings"].items() if name in SETTINGS}
    config = LoraConfig(**{name: run[name] for name in names}, settings=TrainingSettings(**settings))
    model = build_model(ModelConfig(model="demo"))
    trained = train_lora(model, from_images(list(images), captions), config, tmp_path).tensors
    chosen = select_layers(trainable_layers(model, config), config)
    adapters = Adapters(chosen, networks_of(model, chosen), config, seed=0)

    def drawn(strength, captions):
        values = {n: v * (strength if n.endswith("lora_up.weight") else 1) for n, v in trained.items()}
        with adapters.attach({name: values[name] for name in adapters.parameters}):
            return draw(model, captions, **DRAW_OPTIONS, batch_size=20)

    held = held_out_captions(100)
    few = held[:20]
    none, half, full = drawn(0.0, few), drawn(0.5, few), drawn(1.0, held)
    plain = draw(model, held, **DRAW_OPTIONS, batch_size=20)
    assert all(torch.equal(*pair) for pair in zip(none, plain[: len(few)], strict=True))
    assert with_warm_edges(full) >= 0.9 and with_warm_edges(plain) == 0
    low, middle, high = (median(warmth(image) for image in images) for images in (plain, half, full))
    assert low + 0.02 < middle < high - 0.02
    assert alignment(full, held)["alignment"] >= alignment(plain, held)["alignment"] - 0.05
