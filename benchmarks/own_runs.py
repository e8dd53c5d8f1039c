"""Retune's own variants: whole runs as from the command line, with their loading, caches, metrics and saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.commands.open_model import build_model
from ..training.commands.train import holding, visitors_of
from ..training.config.embedding import EmbeddingConfig
from ..training.config.lora import LoraConfig
from ..training.config.model import ModelConfig
from ..training.config.reward import RewardTuneConfig
from ..training.config.run import RunConfig, TrainModelConfig
from ..training.config.training_settings import TrainingSettings
from ..training.data.cache import LatentCache, TextCache
from ..training.data.prompts import Prompt
from ..training.models.protocols import TextToImage
from ..training.recipes.lora import train_lora
from ..training.recipes.reward import tune
from ..training.recipes.textual_inversion import train_embedding
from ..training.recipes.unet import train_model
from ..training.rewards.combined import CombinedReward, Term
from ..training.rewards.load import RewardConfig, load_reward
from .lora_runs import LAYERS
from .processes import Case
from .recorder import CAPTION, LOADING, PREPARING, TRAINING, Marks, Recorder, captions_of, pictures

NEVER = 10**6
"""Steps between two saved states: more than a variant has."""
TOKEN = "<bench>"
REWARD_STEPS = 5
"""Sampler steps of the reward variants, the largest K."""


def settings_of(precision: str, **more: Any) -> TrainingSettings:
    """The settings of diffusers' scripts: a constant rate, no weighting, clipping at 1, no dropped captions."""
    plain = {"lr_schedule": "constant", "warmup_steps": 0, "loss_weighting": "none", "caption_dropout": 0.0}
    return TrainingSettings(precision=precision, save_every=NEVER, **(plain | more))


def run_of(case: Case, config: type[RunConfig], settings: TrainingSettings, **fields: Any) -> RunConfig:
    """The config of a run of one step that is not timed and `case.rounds` that are."""
    common = {"run_name": "bench", "steps": case.rounds + 1, "batch_size": case.batch_size, "resume": "restart"}
    return config(settings=settings, **(common | {"learning_rate": 1e-4} | fields))


def open_model(case: Case, recorder: Recorder, config: RunConfig) -> TextToImage:
    """The model as a command line opens it for a run."""
    recorder.begin(LOADING)
    described = ModelConfig(model=case.model, device=case.device)
    model = build_model(described, **holding(config), visiting=visitors_of(config, None))
    recorder.begin(PREPARING)
    return model


def run_lora(case: Case, recorder: Recorder, precision: str, every_layer: bool = False, **settings: Any) -> None:
    """Adapters of the attention layers, as diffusers' script has them; or of every layer, as ComfyUI's node."""
    layers = {"targets": "attention"}
    if every_layer:
        layers = {"targets": "regex", "target_regex": LAYERS, "algorithm": "LoCon"}
    config = run_of(case, LoraConfig, settings_of(precision, **settings), rank=case.rank, alpha=case.rank, **layers)
    model = open_model(case, recorder, config)
    trained = train_lora(model, pictures(case), config, Path(case.work), Marks(recorder))
    recorder.trained = sum(value.numel() for name, value in trained.tensors.items() if not name.endswith("alpha"))


def run_finetune(case: Case, recorder: Recorder, precision: str, **settings: Any) -> None:
    config = run_of(case, TrainModelConfig, settings_of(precision, **settings), train="whole UNet")
    model = open_model(case, recorder, config)
    recorder.trained = sum(p.numel() for p in model.denoiser.network.parameters())
    train_model(model, pictures(case), config, Path(case.work), Marks(recorder))


def run_embedding(case: Case, recorder: Recorder, precision: str) -> None:
    config = run_of(case, EmbeddingConfig, settings_of(precision), token=TOKEN, template="object")
    model = open_model(case, recorder, config)
    recorder.trained = sum(vocabulary.table.shape[1] for vocabulary in model.text_encoder.vocabularies.values())
    train_embedding(model, pictures(case), config, Path(case.work), Marks(recorder))


def run_reward(case: Case, recorder: Recorder, precision: str, gradient_steps: int, batch_size: int) -> None:
    """Steps of tuning a LoRA of the UNet by the demo's aesthetic head; the batch is the variant's own."""
    sizes = {"width": case.pixels, "height": case.pixels, "sampling_steps": REWARD_STEPS, "batch_size": batch_size}
    more = {"gradient_steps": gradient_steps, "lora_rank": case.rank, "lora_alpha": case.rank, "train": "UNet LoRA"}
    config = run_of(case, RewardTuneConfig, settings_of(precision), **sizes, **more)
    model = open_model(case, recorder, config)
    reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
    reward.network.to(model.denoiser.device)
    tune(model, reward, [Prompt(CAPTION)], config, Path(case.work), Marks(recorder))


@dataclass(frozen=True)
class Encoding:
    """Filling the caches of latents and texts anew, once a round."""

    model: TextToImage
    case: Case

    def latents(self, number: int) -> None:
        folder = Path(self.case.work) / f"latents {number}"
        LatentCache(folder, self.model.autoencoder.encode, "bench").fill(pictures(self.case))

    def texts(self, number: int) -> None:
        folder, captions = Path(self.case.work) / f"texts {number}", captions_of(self.case)
        encoder = self.model.text_encoder
        TextCache(folder, lambda texts: encoder.backbone(encoder.tokenize(texts)), "bench").fill(captions)


def run_encoding(case: Case, recorder: Recorder, part: str) -> None:
    """part: "latents" or "texts"."""
    recorder.begin(LOADING)
    model = build_model(ModelConfig(model=case.model, device=case.device))
    encode = getattr(Encoding(model, case), part)
    recorder.begin(TRAINING)
    for number in range(case.rounds + 1):
        encode(number)
        recorder.step()
