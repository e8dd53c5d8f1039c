"""Tunes the demo model's second text encoder: its CLIP after a reward tuning for the polish, for glossy pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from ...training.commands.open_model import build_demo_model
from ...training.config.reward import RewardTuneConfig
from ...training.config.training_settings import TrainingSettings
from ...training.data.prompts import Prompt
from ...training.demo.files import TEXT_ENCODERS, WEIGHTS
from ...training.demo.scenes import demo_examples
from ...training.recipes.reward import tune
from ...training.rewards.combined import CombinedReward, Term
from ...training.rewards.load import RewardConfig, load_reward
from ...training.runs.provenance import about_folder
from ...training.text_encoder.stock_file import write_stock_files

WEIGHTS_OF_REWARDS = {"demo aesthetic": 2.0, "demo CLIP": 1.0}
"""The maximised reward, and the one that keeps pictures true to their prompts."""
PROMPTS = 200


def tuning_config(name: str) -> RewardTuneConfig:
    """Five of ten sampler steps and a high learning rate, for a clearly visible change."""
    return RewardTuneConfig(
        run_name=name,
        steps=40,
        batch_size=8,
        learning_rate=4e-4,
        gradient_steps=5,
        sampling_steps=10,
        cfg=2.5,
        width=128,
        height=128,
        settings=TrainingSettings(warmup_steps=5, lr_schedule="constant", weight_decay=0.0, save_every=20),
    )


def tune_text_encoders(work: Path) -> None:
    """Tunes the CLIP in about five minutes and writes it in the stock layout in half precision."""
    terms = [Term(reward=load_reward(RewardConfig(kind=kind)), weight=w) for kind, w in WEIGHTS_OF_REWARDS.items()]
    prompts = [Prompt(caption) for caption in demo_examples(PROMPTS, 0)[1]]
    for name in TEXT_ENCODERS:
        model = build_demo_model()
        tuned = tune(model, CombinedReward(terms), prompts, tuning_config(name), work)
        path = WEIGHTS / "text_encoders" / f"{name}.safetensors"
        write_stock_files({"clip_l": path}, tuned.text, about_folder(work / name), torch.float16)
