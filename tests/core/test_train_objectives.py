"""Every option of the denoising objective in whole runs: exact after a stop, and doing what it says."""

import dataclasses
import hashlib
import json

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images, join_datasets
from retune.training.data.examples import Mask
from retune.training.recipes.unet import train_model

EVERYTHING = TrainingSettings(
    save_every=2,
    warmup_steps=0,
    validation_fraction=0.3,
    validate_every=2,
    gradient_accumulation=2,
    loss="pseudo-huber",
    huber_schedule="snr",
    timestep_sampling="high noise",
    noise_offset=0.05,
    multires_iterations=4,
    input_perturbation=0.1,
    caption_shuffle=True,
    keep_tokens=1,
    tag_dropout=0.2,
    caption_dropout=0.2,
    mask_weight=0.0,
)


def config(settings=EVERYTHING, **changes):
    values = {"run_name": "r", "steps": 4, "batch_size": 2, "learning_rate": 1e-3, "settings": settings}
    return TrainModelConfig(**(values | changes))


@pytest.fixture
def dataset():
    """Six 32x32 pictures with tags, half of them masked, and two regularisation images that count half."""
    random = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 32, 32, generator=random) for _ in range(8)]
    options = {"crop": "random", "flip": True}
    own = from_images(images[:6], ["red, circle, left, large"], 24, buckets=False, **options)
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1
    masked = [
        dataclasses.replace(e, mask=Mask("left", source=mask)) if i % 2 else e for i, e in enumerate(own.examples)
    ]
    kept = from_images(images[6:], ["blue, square"], 24, buckets=False, **options)
    kept = dataclasses.replace(kept, examples=tuple(dataclasses.replace(e, weight=0.5) for e in kept.examples))
    return join_datasets(dataclasses.replace(own, examples=tuple(masked)), kept, regularisation=True)


def digest(root):
    files = [root / "r" / name for name in ("metrics.jsonl", "model.safetensors")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


class Dies(Callbacks):
    def __init__(self, step):
        self.step = step

    def on_step(self, info):
        if info.step == self.step:
            raise KeyboardInterrupt


def test_a_run_with_every_option_is_exact_after_a_stop(tiny_model, dataset, tmp_path):
    state = torch.get_rng_state()
    train_model(tiny_model, dataset, config(), tmp_path / "whole")
    for step in (1, 3):
        root = tmp_path / f"stopped{step}"
        with pytest.raises(KeyboardInterrupt):
            train_model(tiny_model, dataset, config(), root, Dies(step))
        train_model(tiny_model, dataset, config(), root)
        assert digest(root) == digest(tmp_path / "whole")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "option",
    [
        {"loss": "mse"},
        {"huber_schedule": "exponential"},
        {"huber_c": 0.5},
        {"timestep_sampling": "low noise"},
        {"multires_iterations": 0},
        {"multires_discount": 0.9},
        {"caption_shuffle": False},
        {"keep_tokens": 0},
        {"tag_dropout": 0.9},
        {"mask_weight": 0.5},
        {"mask_normalize": False},
    ],
)
def test_each_option_changes_the_loss(tiny_model, dataset, tmp_path, option):
    def losses(settings, name):
        run = config(dataclasses.replace(settings, validation_fraction=0.0), steps=2)
        train_model(tiny_model, dataset, run, tmp_path / name)
        return [json.loads(row)["loss"] for row in (tmp_path / name / "r" / "metrics.jsonl").read_text().splitlines()]

    assert losses(EVERYTHING, "a") != losses(dataclasses.replace(EVERYTHING, **option), "b")


def test_texts_are_encoded_before_weights_are_attached(tiny_model, dataset, tmp_path, monkeypatch):
    """ComfyUI may push the UNet out for the text encoder; `after_load` brings it back before each step."""
    events = []
    backbone = tiny_model.text_encoder.backbone
    monkeypatch.setattr(tiny_model.text_encoder, "backbone", lambda t: events.append("encode") or backbone(t))
    predict = tiny_model.denoiser.predict
    monkeypatch.setattr(tiny_model.denoiser, "predict", lambda *a: events.append("predict") or predict(*a))

    class Listens(Callbacks):
        def after_load(self):
            events.append("back")

    train_model(tiny_model, dataset, config(), tmp_path, Listens())
    assert "encode" in events[events.index("predict") :]  # varied captions come up all along
    for before, after in zip(events, events[1:], strict=False):
        assert (before, after) != ("encode", "predict")
    known = list((tmp_path / ".cache" / "text").rglob("*.safetensors"))
    assert len(known) == 2  # the empty caption and that of the held-out images; no shuffled ones


def test_a_weight_of_zero_teaches_nothing(tiny_model, pictures, tmp_path):
    none = dataclasses.replace(pictures, examples=tuple(dataclasses.replace(e, weight=0.0) for e in pictures.examples))
    settings = TrainingSettings(warmup_steps=0, weight_decay=0.0)
    result = train_model(tiny_model, none, config(settings), tmp_path)
    network = {tiny_model.denoiser.canonical_name(n): p for n, p in tiny_model.denoiser.network.named_parameters()}
    assert all(torch.equal(value, network[name]) for name, value in result.unet.items())


def test_gradient_checkpointing_gives_the_same_run(tiny_model, dataset, tmp_path):
    losses = []
    for enabled in (False, True):
        run = config(dataclasses.replace(EVERYTHING, gradient_checkpointing=enabled), train="whole UNet", steps=1)
        train_model(tiny_model, dataset, run, tmp_path / str(enabled))
        rows = map(json.loads, (tmp_path / str(enabled) / "r" / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
