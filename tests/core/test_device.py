"""Every trainer on a device that is not the CPU, simulated: nothing is made on the wrong one, and the host reads the
device once for each step."""

import ast
import json
from pathlib import Path

import pytest
import torch
from retune.training.commands.open_model import with_t5
from retune.training.common import transfer
from retune.training.common.callbacks import Callbacks
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.model import ModelConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.prompts import Prompt
from retune.training.recipes.lora import train_lora
from retune.training.recipes.reward import tune
from retune.training.recipes.textual_inversion import train_embedding
from retune.training.recipes.unet import train_model
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.text_encoder.fit import EncoderStates, fit_projection
from retune.training.text_encoder.scale import token_std

TRAINING = Path(__file__).resolve().parents[2] / "training"
FLOAT64 = {
    "commands/lora_files.py": "tensors of files, on the CPU",
    "common/fingerprint.py": "positions of samples, made on the CPU",
    "data/prompts.py": "weights of prompts and draws, on the CPU",
    "evaluation/statistics.py": "scores, which were lists of numbers",
    "formats/lora_difference.py": "singular values of a file's tensors, on the CPU",
    "models/noise_levels.py": "tables of noise levels, computed once on the CPU",
    "models/recast.py": "a comparison: autocast leaves the type alone",
    "objectives/losses.py": "weights of a batch's noise levels from the table on the CPU",
    "objectives/noise.py": "draws from generators of the CPU",
    "plots/score_histogram.py": "numbers of a chart",
    "plots/token_histogram.py": "numbers of a chart",
    "rewards/augment.py": "draws from generators of the CPU",
    "rewards/diversity.py": "embeddings that were brought to the CPU",
    "rewards/heads.py": "weights of a file, on the CPU",
    "text_encoder/distil.py": "the report, of states that are on the CPU",
    "text_encoder/fit.py": "states that were brought to the CPU",
    "text_encoder/scale.py": "states that were brought to the CPU",
}
"""Files of training/ that compute in float64, and why no device sees it: Apple's GPUs have no such type."""
PROMPTS = [Prompt("a red circle"), Prompt("two small blue squares")]


def run(**changes):
    settings = {"warmup_steps": 0, "validation_fraction": 0.3, "validate_every": 2, "save_every": 2, "ema_decay": 0.9}
    settings |= changes.pop("settings", {})
    samples = SamplePrompts(prompts=("a red circle",), every=2, steps=2, cfg=2.0, width=32, height=32)
    common = {"run_name": "r", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "samples": samples}
    return common | {"settings": TrainingSettings(**settings)} | changes


def whole(model, root, callbacks):
    return train_model(model, pictures(), TrainModelConfig(**run(train="whole UNet")), root, callbacks)


def cross_attention(model, root, callbacks):
    settings = {"loss": "huber", "noise_offset": 0.1, "input_perturbation": 0.1, "multires_iterations": 2}
    return train_model(
        model, pictures(), TrainModelConfig(**run(train="cross-attention", settings=settings)), root, callbacks
    )


def t5(model, root, callbacks):
    """The projection trains along."""
    return train_model(model, pictures(), TrainModelConfig(**run(train="cross-attention K/V")), root, callbacks)


def lora(model, root, callbacks):
    chosen = LoraConfig(**run(rank=2, algorithm="LoCon", targets="all", dropout=0.1, text_encoder_learning_rate=1e-3))
    return train_lora(model, pictures(), chosen, root, callbacks)


def dora(model, root, callbacks):
    return train_lora(model, pictures(), LoraConfig(**run(rank=2, algorithm="DoRA", dropout=0.1)), root, callbacks)


def embedding(model, root, callbacks):
    chosen = EmbeddingConfig(**run(token="<it>", vectors=2, lora_rank=2, initial_text="circle", norm="vocabulary"))
    return train_embedding(model, pictures("a <it>"), chosen, root, callbacks)


def reward_of(model, root, callbacks, **changes):
    terms = [Term(reward=load_reward(RewardConfig(kind=kind))) for kind in ("demo aesthetic", "demo CLIP")]
    reward = CombinedReward(terms)
    reward.network.to(model.denoiser.device)
    fixed = {"sampling_steps": 2, "gradient_steps": 1, "width": 32, "height": 32, "lora_rank": 2}
    config = RewardTuneConfig(**run() | fixed | changes)
    dataset = pictures() if config.method == "direct" else None
    return tune(model, reward, PROMPTS, config, root, callbacks, dataset=dataset)


def reward(model, root, callbacks):
    return reward_of(model, root, callbacks, train="text encoder", drift_constraint=0.1, eps_constraint=0.1)


def direct_reward(model, root, callbacks):
    return reward_of(model, root, callbacks, train="UNet LoRA", method="direct")


DENOISING = [whole, cross_attention, t5, lora, dora, embedding]
REWARDS = [reward, direct_reward]


def pictures(caption="a red circle"):
    random = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 32, 32, generator=random) for _ in range(6)]
    return from_images(images, [caption] * 6, resolution=None)


def move(model, device):
    encoder = model.text_encoder
    text = [encoder.model, encoder.projection] if encoder.projection is not None else [encoder.network]
    for network in (model.denoiser.network, model.autoencoder.network, *text):
        network.to(device)


def rows(root):
    return [json.loads(line) for line in (root / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Counted(Callbacks):
    """What a device counts within each optimizer step."""

    def __init__(self, device):
        self.device, self.reads, self.casts, self.waits = device, [], [], []

    def before_step(self, step):
        self.device.reset()

    def on_step(self, info):
        self.reads.append(dict(self.device.reads))
        self.casts.append(dict(self.device.casts))
        self.waits.append(self.device.waits)


def uses_float64(source):
    """Whether code (not its comments and docstrings) names the type, or asks for it by `double`."""
    names = (getattr(node, "attr", None) or getattr(node, "id", None) for node in ast.walk(ast.parse(source)))
    return bool({"float64", "double"} & set(names))


def test_float64_is_where_no_device_sees_it():
    found = {
        path.relative_to(TRAINING).as_posix()
        for path in TRAINING.rglob("*.py")
        if uses_float64(path.read_text(encoding="utf-8"))
    }
    assert found == FLOAT64.keys()
    moved_late = [path.name for path in TRAINING.rglob("*.py") if ".double().cpu()" in path.read_text(encoding="utf-8")]
    assert not moved_late, "cast on the device before it is brought to the CPU"


@pytest.mark.parametrize("trainer", DENOISING + REWARDS, ids=lambda trainer: trainer.__name__)
def test_a_run_on_a_device_is_that_on_the_cpu(tiny_model, write_t5_folder, device, tmp_path, trainer, monkeypatch):
    """With validation, samples, saved states and result. Attention is computed in another order of additions. Copies to
    the device are those to a CUDA device, for which the host need not wait."""
    monkeypatch.setattr(transfer, "STAGING", ("cuda", "lazy"))
    model, counted = tiny_model, Counted(device)
    if trainer is t5:
        folder = write_t5_folder(tmp_path / "t5")
        model = with_t5(model, ModelConfig(model="", t5=folder, projection="timestep resampler"))
    trainer(model, tmp_path / "cpu", Callbacks())
    move(model, "lazy")
    trainer(model, tmp_path / "device", counted)
    for there, here in zip(rows(tmp_path / "device"), rows(tmp_path / "cpu"), strict=True):
        assert there.keys() == here.keys()
        for name in ("loss", "grad_norm", "reward"):
            assert there.get(name) == (pytest.approx(here[name], rel=1e-3) if name in here else None)
    assert [sum(reads.values()) for reads in counted.reads] == [1, 1], counted.reads
    assert counted.waits == [0, 0]
    if trainer in DENOISING:
        assert not any(dtype.is_floating_point for casts in counted.casts for dtype, _ in casts)


def test_a_projection_is_fitted_and_scaled_on_a_device(tiny_model, write_t5_folder, device, tmp_path):
    config = ModelConfig(model="", t5=write_t5_folder(tmp_path / "t5"), target_std=1.0)
    model, prompts = with_t5(tiny_model, config), [f"{number} red circles" for number in range(10)]

    def measured():
        states = EncoderStates(model.text_encoder, before_projection=True)
        reference = EncoderStates(tiny_model.text_encoder, before_projection=False)
        _, report = fit_projection(states, reference, prompts)
        return report.explained, token_std(model.text_encoder, prompts)

    before = measured()
    tiny_model.text_encoder.network.to("lazy")
    move(model, "lazy")
    assert measured() == pytest.approx(before, rel=1e-3)
