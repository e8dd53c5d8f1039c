"""The pictures that a guard measures: fixed prompts from fixed noise, their scores, and how different they are."""

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
"""Equal for all runs, so that their figures can be compared."""


def build_guard(
    config: RewardTuneConfig, reward: CombinedReward, measure: Callable[[], GuardMeasurement]
) -> Guard | None:
    """The guard of a reward tuning, or None where none is asked for. measure: `measure_pictures` with its arguments."""
    if config.guard_rule is None:
        return None
    weights = {name: term.weight for name, term in reward.terms.items()}
    priors = {name: term.reward.typical_scale for name, term in reward.terms.items()}
    return Guard(config.guard_rule, measure, weights, priors)


def guard_prompts(training: Sequence[Prompt], held_out: Sequence[Prompt], config: RewardTuneConfig) -> list[str]:
    """The first `config.guard_prompts` different prompts, held-out ones before those that are trained on."""
    if not config.guard_rule:
        return []
    distinct = dict.fromkeys(prompt.text for prompt in itertools.chain(held_out, training))
    return list(itertools.islice(distinct, config.guard_prompts))


@torch.no_grad()
def measure_pictures(
    model: TextToImage,
    reward: CombinedReward,
    config: RewardTuneConfig,
    prompts: Sequence[str],
    text_of: TextOf,
    on_batch: Callable[[int, int], None],
) -> GuardMeasurement:
    """Draws `config.guard_images` pictures of each prompt, as training draws them, and scores them.

    Picture i is drawn from noise i at every step of every run, and cut to 0..1, as saved pictures are. No batch is
    larger than a training batch. No random state and no running scale changes.

    Args:
        model: draws.
        reward: scores.
        config: size, sampler steps, cfg and number of pictures.
        prompts: from `guard_prompts`.
        text_of: prompt -> conditioning.
        on_batch: called with (done, total) after every sampler step and every batch of scores; may raise to cancel.
    """
    drawn = [prompt for prompt in prompts for _ in range(config.guard_images)]
    batch_size = max(1, config.batch_size // world().size)  # the memory of one process: the main one draws alone
    latents = draw_latents(
        model,
        drawn,
        width=config.width,
        height=config.height,
        steps=config.sampling_steps,
        cfg=config.cfg,
        seed=NOISE_SEED,
        batch_size=batch_size,
        text_of=functools.cache(text_of),
        on_batch=on_batch,
    )
    scores: dict[str, list[Tensor]] = {name: [] for name in reward.terms}
    embeddings = []
    for start in range(0, len(drawn), batch_size):
        end = min(start + batch_size, len(drawn))
        images = model.autoencoder.pixels(torch.stack(latents[start:end])).clamp(0, 1)
        for name, values in reward.evaluate(images, drawn[start:end]).raw.items():
            scores[name].append(values.float().cpu())
        embeddings.append(reward.image_embeddings(images).float().cpu())
        on_batch(end, len(drawn))
    raw = {name: torch.cat(batches) for name, batches in scores.items()}
    return GuardMeasurement(
        raw={name: values.tolist() for name, values in raw.items()},
        shaped={name: reward.terms[name].shaped(values).tolist() for name, values in raw.items()},
        variety=measure_variety(torch.cat(embeddings).unflatten(0, (len(prompts), config.guard_images))),
    )


def measure_variety(embeddings: Tensor) -> dict[str, float]:
    """How different pictures are.

    Args:
        embeddings: (P, S, D) of length 1, of S >= 2 pictures of each of P prompts.

    Returns:
        "diversity": mean over prompts of the `spread` of their pictures, 0 (all equal) to 1. "vendi", "distance": Vendi
        score and mean 1 - cosine of all P S pictures, which count differences between prompts too.
    """
    spreads = [Diversity.of(pictures).spread for pictures in embeddings]
    whole = Diversity.of(embeddings.flatten(0, 1))
    return {"diversity": sum(spreads) / len(spreads), "vendi": whole.vendi, "distance": whole.distance}
