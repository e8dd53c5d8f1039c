"""Reward tuning in ComfyUI: everything on its device, and results back as patches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...training.data.prompts import Prompt, read_prompts
from ...training.models.parameters import frozen
from ...training.models.protocols import TextToImage
from ...training.recipes.reward import TunedModel
from ...training.rewards.combined import CombinedReward, Term
from ...training.rewards.reward import ClipReward
from ..common.inputs import expect_given
from ..common.weights import is_dynamic, with_text_weights, with_unet_weights
from .lora_patches import Row, apply_loras, lora_of
from .rewards import ManagedReward, expect_reward
from .text_encoder import with_projection
from .view import text_to_image


def prompt_list(prompts: str, file: str) -> Sequence[Prompt]:
    """The lines of a text, then the prompts of a file if one is named."""
    typed = [Prompt(line.strip()) for line in prompts.splitlines() if line.strip()]
    read = read_prompts(Path(file.strip())) if file.strip() else []
    return [*typed, *read] if typed else read


def tuned_by(reward, weight: float, constraint, held_out) -> ManagedReward:
    """What is maximised, the constraint at its weight (0: left out), and a reward that is logged alone.

    Raises ValueError for a weight without a constraint, and for one that does not read prompts.
    """
    expect_reward(reward)
    parts = [reward]
    if weight:
        if not isinstance(constraint, ManagedReward) or not isinstance(constraint.terms[0].reward, ClipReward):
            raise ValueError(
                f"clip_constraint is {weight:g} and constraint is no reward of kind CLIP; expected one from Load "
                "Reward (CLIP, PickScore, HPSv2 or demo CLIP), or clip_constraint 0."
            )
        parts.append(weighted(constraint, weight))
    if held_out is not None:
        parts.append(weighted(held_out, 0.0))
    return ManagedReward.joined(parts, reward.augmentation)


def weighted(reward: ManagedReward, weight: float) -> ManagedReward:
    """The same rewards, all at one weight."""
    terms = [Term(reward=t.reward, weight=weight, target=t.target, form=t.form) for t in reward.terms]
    return ManagedReward(terms, reward.patchers)


@contextmanager
def tuning(model, clip, vae, judge: ManagedReward) -> Iterator[tuple[TextToImage, CombinedReward]]:
    """The model view and the rewards, ready to tune while entered: VAE and rewards stay loaded beside the UNet."""
    expect_given(vae=vae)
    vae = _plain_vae(vae)
    with text_to_image(model, clip, vae) as view:
        view.denoiser.keep_loaded += [vae.patcher, *dict.fromkeys(judge.patchers)]
        view.denoiser.load()  # makes ordinary tensors of inference tensors, before anything is frozen
        rewards = judge.combined()
        with frozen([vae.first_stage_model, rewards.network]):
            yield view, rewards


def _plain_vae(vae):
    """The VAE; under dynamic VRAM a copy of its own, since there weights come and go while a module runs."""
    if not is_dynamic(vae.patcher):
        return vae
    plain = copy.copy(vae)
    plain.patcher = vae.patcher.clone(disable_dynamic=True)
    plain.first_stage_model = plain.patcher.model
    return plain


def applied(model, clip, found: TunedModel, name: str) -> tuple:
    """MODEL and CLIP with a run's result as patches on clones; the inputs where it changed nothing of theirs."""
    if found.unet:
        model = with_unet_weights(model, found.unet)
    if found.text:
        clip = with_text_weights(clip, found.text)
    if found.lora:
        model, clip, _ = apply_loras(model, clip, [Row(lora_of(name, found.lora), 1.0, 1.0)])
    return model, with_projection(clip, found.projection)
