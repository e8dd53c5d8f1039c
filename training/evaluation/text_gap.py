"""Figures that complete a validation loss: whether the model uses the text, and its error at each noise level.

Measured on held-out images at fixed noise and fixed levels. No global random state is used, so equal weights have equal
figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.rng import generator

if TYPE_CHECKING:
    from ..objectives.denoising import DenoisingObjective, TrainingSample

BANDS = 5
"""Equal ranges of training timesteps, from nearly clean to nearly pure noise."""
MAX_EVAL_IMAGES = 32
"""Held-out images that are measured, the first ones: each costs two passes of the denoiser over BANDS levels."""


@torch.no_grad()
def evaluate(objective: DenoisingObjective, loaded: Sequence[TrainingSample], bands: int = BANDS) -> dict[str, Any]:
    """Further figures of a validation; {} for fewer than two held-out images.

    Args:
        objective: measures.
        loaded: from `DenoisingObjective.load`; (caption, latent) pairs will do.
        bands: number of equal ranges of training timesteps; each image has one timestep in each.

    Returns:
        "bands": unweighted squared error, as in the validation loss, in each range, from the least noise on.
        "text_gap": that error with the captions shuffled among the images minus the error with the true ones, at the
        same noise and levels. It is near 0 for a model that does not use its text, and left out when all captions are
        equal.
    """
    loaded = list(loaded)[:MAX_EVAL_IMAGES]
    if len(loaded) < 2:
        return {}
    captions = [caption for caption, *_ in loaded]
    true = torch.stack([_errors(objective, i, sample[0], sample, bands) for i, sample in enumerate(loaded)])
    figures: dict[str, Any] = {"bands": true.mean(0).tolist()}
    if len(set(captions)) > 1:
        pairs = enumerate(zip(shuffled(captions), loaded, strict=True))
        wrong = torch.stack([_errors(objective, i, caption, sample, bands) for i, (caption, sample) in pairs])
        figures = {"text_gap": (wrong - true).mean().item(), **figures}
    return figures


def shuffled(captions: Sequence[str]) -> list[str]:
    """The captions in a fixed order in which no image has its own, as far as repeated captions allow.

    Equal captions are sorted side by side, and all are shifted by the largest number of equal ones.
    """
    drawn = torch.randperm(len(captions), generator=generator(0, "shuffled captions", len(captions))).tolist()
    groups = list(dict.fromkeys(captions[i] for i in drawn))
    order = sorted(drawn, key=lambda i: groups.index(captions[i]))
    step, result = max(Counter(captions).values()), list(captions)
    for place, index in enumerate(order):
        result[index] = captions[order[(place + step) % len(order)]]
    return result


def _errors(objective: DenoisingObjective, index: int, caption: str, sample: TrainingSample, bands: int) -> Tensor:
    """(bands,) errors of image `index` under a caption; noise and timesteps depend on the index only."""
    _, latent, *mask = sample
    generators = [generator(0, "evaluation", index, band) for band in range(bands)]
    total = len(objective.denoiser.sigmas)
    times = torch.tensor([_timestep(total, band, bands, random) for band, random in enumerate(generators)])
    noise = torch.stack([torch.randn(latent.shape, generator=random) for random in generators])
    return objective.squared_errors(caption, latent, times, noise, *mask[:1]).cpu()


def _timestep(total: int, band: int, bands: int, random: torch.Generator) -> int:
    """A timestep drawn uniformly in a band of 0..total-1."""
    low, high = total * band // bands, total * (band + 1) // bands
    return int(torch.randint(low, high, (), generator=random))
