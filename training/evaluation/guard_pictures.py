"""What a guard looks at: pictures of fixed prompts from fixed noise, their scores, and how different they are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.distributed import world
from ..config.reward import RewardTuneConfig
from ..data.prompts import Prompt
from ..models.protocols import TextToImage
from ..rewards.combined import CombinedReward
from ..rewards.diversity import Diversity
from ..sampling.generate import TextOf, draw_latents
from .diversity_guard import Guard, GuardMeasurement

NOISE_SEED = 0
"""The same for all runs, so that theirs compare."""


def build_guard(config: RewardTuneConfig, reward: CombinedReward, look: Callable[[], GuardMeasurement]) -> Guard | None:
    """The guard of a reward tuning, or None where none is asked for. look: `measure_pictures` with its arguments."""
    if config.guard_rule is None:
        return None
    weights = {name: term.weight for name, term in reward.terms.items()}
    priors = {name: term.reward.typical_scale for name, term in reward.terms.items()}
    return Guard(config.guard_rule, look, weights, priors)


def guard_prompts(training: Sequence[Prompt], held_out: Sequence[Prompt], config: RewardTuneConfig) -> list[str]:
    """The first held-out prompts and, where they are too few, the first of those that are trained on; no one twice."""
    found: dict[str, None] = {}
    for prompt in itertools.chain(held_out, training):
        if not config.guard_rule or len(found) == config.guard_prompts:
            break
        found[prompt.text] = None
    return list(found)


@torch.no_grad()
def measure_pictures(
    model: TextToImage,
    reward: CombinedReward,
    config: RewardTuneConfig,
    prompts: Sequence[str],
    text_of: TextOf,
    on_batch: Callable[[int, int], None],
) -> GuardMeasurement:
    """Draws `config.guard_images` pictures of each prompt, as training draws them, and measures them.

    Picture i is drawn from noise i whatever the step and the run; all are cut to 0..1, as a saved picture is. No batch
    is larger than a training batch. text_of: as `draw_latents` takes it. on_batch(done, total) is called after every
    sampler step and every batch of scores, and may raise to cancel. Changes no random state and no running scale.
    """
    wanted = [prompt for prompt in prompts for _ in range(config.guard_images)]
    share = max(1, config.batch_size // world().size)  # the main process draws alone, with room for its share
    latents = draw_latents(
        model,
        wanted,
        width=config.width,
        height=config.height,
        steps=config.sampling_steps,
        cfg=config.cfg,
        seed=NOISE_SEED,
        batch_size=share,
        text_of=functools.cache(text_of),
        on_batch=on_batch,
    )
    raw: dict[str, list[Tensor]] = {name: [] for name in reward.terms}
    embeddings = []
    for start in range(0, len(wanted), share):
        end = min(start + share, len(wanted))
        images = model.autoencoder.pixels(torch.stack(latents[start:end])).clamp(0, 1)
        for name, scores in reward.evaluate(images, wanted[start:end]).raw.items():
            raw[name].append(scores.float().cpu())
        embeddings.append(reward.image_embeddings(images).float().cpu())
        on_batch(end, len(wanted))
    scores = {name: torch.cat(parts) for name, parts in raw.items()}
    shaped = {name: reward.terms[name].shaped(one).tolist() for name, one in scores.items()}
    return GuardMeasurement(
        {name: one.tolist() for name, one in scores.items()},
        shaped,
        variety(torch.cat(embeddings).unflatten(0, (len(prompts), config.guard_images))),
    )


def variety(embeddings: Tensor) -> dict[str, float]:
    """Of (P, S, D) embeddings of length 1, S >= 2 pictures of each of P prompts.

    diversity: mean over prompts of the `spread` of their pictures, 0 (all alike) to 1. vendi, distance: Vendi score and
    mean 1 - cosine of all P S pictures, which tell the prompts' pictures apart besides.
    """
    spreads = [Diversity.of(one).spread for one in embeddings]
    whole = Diversity.of(embeddings.flatten(0, 1))
    return {"diversity": sum(spreads) / len(spreads), "vendi": whole.vendi, "distance": whole.distance}
