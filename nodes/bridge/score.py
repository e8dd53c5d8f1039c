"""Scores and diversity of ComfyUI's images, with rewards under its model management."""

from __future__ import annotations

import torch
from torch import Tensor

from ...training.common.text import filled_lines
from ...training.rewards.diversity import BATCH as DIVERSITY_BATCH
from ...training.rewards.diversity import Diversity, diversity
from ...training.rewards.score import BATCH, ScoreTable, score_images
from .rewards import ManagedReward, expect_reward


def score(reward: ManagedReward, images: Tensor, prompts: str) -> ScoreTable:
    """Scores images with a reward.

    Args:
        reward: a RETUNE_REWARD.
        images: an IMAGE, (B, H, W, C) in 0..1.
        prompts: one line for all images, or one for each.

    Raises:
        ValueError: for another number of lines, and for none where the reward reads prompts.
    """
    import comfy.model_management
    import comfy.utils

    expect_reward(reward)
    combined = reward.combined()
    lines = prompt_of_each(prompts, len(images), combined.reads_prompts)
    bar = comfy.utils.ProgressBar(len(images))

    def progress(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    reward.load(min(BATCH, len(images)))
    with torch.inference_mode(False):
        return score_images(combined, list(channels_first(images)), lines, progress)


def diversity_of(reward: ManagedReward, images: Tensor) -> Diversity:
    """Diversity of an IMAGE (B, H, W, C), measured on the image tower of the first reward."""
    expect_reward(reward)
    first = ManagedReward(reward.terms[:1], reward.patchers[:1])
    first.load(min(DIVERSITY_BATCH, len(images)))
    with torch.inference_mode(False):
        return diversity(channels_first(images), first.combined())


def channels_first(images: Tensor) -> Tensor:
    """(B, H, W, C) to (B, 3, H, W), without alpha, as an ordinary tensor instead of an inference tensor."""
    return images[..., :3].movedim(-1, 1).clone()


def prompt_of_each(prompts: str, count: int, needed: bool) -> list[str]:
    """A prompt for each of `count` images; empty ones where there is no line and none is `needed`."""
    lines = filled_lines(prompts)
    if not lines and not needed:
        return [""] * count
    if len(lines) not in (1, count) or not lines:
        raise ValueError(
            f"prompts are {len(lines)} lines for {count} images; expected one line for all, or one for each image."
        )
    return lines if len(lines) == count else lines * count
