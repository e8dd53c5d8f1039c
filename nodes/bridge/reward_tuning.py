"""Reward tuning on a MODEL, CLIP, VAE and rewards of ComfyUI, and its result back as patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...training.common.text import filled_lines
from ...training.data.prompts import Prompt, read_prompts
from ...training.loop.precision import DTYPES
from ...training.models.parameters import frozen
from ...training.models.protocols import TextToImage
from ...training.recipes.reward import TunedModel
from ...training.rewards.combined import CombinedReward, Term
from ...training.rewards.reward import ClipReward
from ..common.inputs import expect_given
from ..common.weights import with_text_weights, with_unet_weights
from .layers import training_layers
from .lora_patches import Row, apply_loras, lora_of
from .rewards import ManagedReward, expect_reward
from .static import static_vae
from .text_encoder import with_projection
from .view import text_to_image


def prompt_list(prompts: str, file: str) -> Sequence[Prompt]:
    """The lines of `prompts`, then the prompts of a file if one is named."""
    lines = [Prompt(line) for line in filled_lines(prompts)]
    from_file = read_prompts(Path(file.strip())) if file.strip() else []
    return [*lines, *from_file] if lines else from_file


def reward_with_constraint(reward, weight: float, constraint, held_out) -> ManagedReward:
    """The reward that a run maximises, with a constraint and a reward that is only logged as further terms.

    Args:
        reward: the RETUNE_REWARD to maximise.
        weight: of the constraint; 0 leaves it out.
        constraint: a RETUNE_REWARD of kind CLIP, which reads prompts; None is allowed with weight 0.
        held_out: a RETUNE_REWARD that is logged with weight 0, or None.

    Raises:
        ValueError: for a missing reward, and for a weight without a constraint of kind CLIP.
    """
    expect_reward(reward)
    parts = [reward]
    if weight:
        _check_constraint(constraint, weight)
        parts.append(with_weight(constraint, weight))
    if held_out is not None:
        parts.append(with_weight(held_out, 0.0))
    return ManagedReward.joined(parts, reward.augmentation)


def _check_constraint(constraint, weight: float) -> None:
    if not isinstance(constraint, ManagedReward) or not isinstance(constraint.terms[0].reward, ClipReward):
        raise ValueError(
            f"clip_constraint is {weight:g} and constraint is no reward of kind CLIP; expected one from Load "
            "Reward (CLIP, PickScore, HPSv2 or demo CLIP), or clip_constraint 0."
        )


def with_weight(reward: ManagedReward, weight: float) -> ManagedReward:
    """The same rewards, each with this weight."""
    terms = [Term(reward=t.reward, weight=weight, target=t.target, form=t.form) for t in reward.terms]
    return ManagedReward(terms, reward.patchers)


@contextmanager
def ready_to_tune(
    model, clip, vae, reward: ManagedReward, precision: str = "fp32"
) -> Iterator[tuple[TextToImage, CombinedReward]]:
    """While entered, the model and the reward, loaded together with the VAE; VAE and reward are frozen.

    precision: of the run; in half precision the reward is a copy that is held in it.
    """
    expect_given(vae=vae)
    vae, held = static_vae(vae), reward.in_half(DTYPES[precision])
    with ExitStack() as stack, text_to_image(model, clip, vae) as view:
        if held is not reward:
            stack.callback(held.unload)
        view.denoiser.keep_loaded += [vae.patcher, *dict.fromkeys(held.patchers)]
        view.denoiser.load()  # replaces inference tensors, which cannot be frozen
        rewards = held.combined()
        with frozen([vae.first_stage_model, rewards.network]), training_layers(vae.first_stage_model):
            yield view, rewards


def apply_result(model, clip, result: TunedModel, name: str) -> tuple:
    """MODEL and CLIP with a run's result as patches on clones.

    Args:
        model, clip: returned as they are where the run changed nothing of theirs.
        result: tuned UNet, text encoder, projection or LoRA weights.
        name: of the LoRA, for messages.
    """
    if result.unet:
        model = with_unet_weights(model, result.unet)
    if result.text:
        clip = with_text_weights(clip, result.text)
    if result.lora:
        model, clip, _ = apply_loras(model, clip, [Row(lora_of(name, result.lora), 1.0, 1.0)])
    return model, with_projection(clip, result.projection)
