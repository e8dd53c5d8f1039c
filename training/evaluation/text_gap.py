"""What a validation loss alone does not tell: whether the text is used, and at which noise levels the model fails.

Held-out images, fixed noise and fixed levels; no random state is touched, so equal weights give equal numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.rng import generator
from ..models.protocols import Conditioning

if TYPE_CHECKING:
    from ..objectives.denoising import DenoisingObjective, TrainingSample

BANDS = 5
"""Equal ranges of training timesteps, from nearly clean to nearly pure noise."""
MAX_EVAL_IMAGES = 32
"""Held-out images that are looked at, the first ones: each costs two passes of the denoiser over BANDS levels."""


@torch.no_grad()
def evaluate(objective: DenoisingObjective, loaded: Sequence[TrainingSample], bands: int = BANDS) -> dict[str, Any]:
    """Further figures of a validation; {} for fewer than two held-out images.

    loaded: as `DenoisingObjective.load` gives them; (caption, latent) pairs will do. "bands": unweighted squared error,
    as in the validation loss, per range of timesteps, the least noise first; each image has one timestep in each.
    "text_gap": that error with the captions shuffled among the images minus the error with the true ones, same noise
    and levels: near 0 for a model that does not read its text. It is left out when all captions are equal.
    """
    loaded = list(loaded)[:MAX_EVAL_IMAGES]
    if len(loaded) < 2:
        return {}
    captions = [caption for caption, *_ in loaded]
    own = torch.stack([_errors(objective, i, one[0], one, bands) for i, one in enumerate(loaded)])
    figures: dict[str, Any] = {"bands": own.mean(0).tolist()}
    if len(set(captions)) > 1:
        others = zip(shuffled(captions), loaded, strict=True)
        other = torch.stack([_errors(objective, i, caption, one, bands) for i, (caption, one) in enumerate(others)])
        figures = {"text_gap": (other - own).mean().item(), **figures}
    return figures


def shuffled(captions: Sequence[str]) -> list[str]:
    """The captions in an order in which no place keeps its words, as far as their repetitions allow; always the same.

    Equal captions are put side by side and all are moved on by the largest number of equal ones.
    """
    drawn = torch.randperm(len(captions), generator=generator(0, "shuffled captions", len(captions))).tolist()
    groups = list(dict.fromkeys(captions[i] for i in drawn))
    order = sorted(drawn, key=lambda i: groups.index(captions[i]))
    step, result = max(Counter(captions).values()), list(captions)
    for place, index in enumerate(order):
        result[index] = captions[order[(place + step) % len(order)]]
    return result


def _errors(objective: DenoisingObjective, index: int, caption: str, shown: TrainingSample, bands: int) -> Tensor:
    """(bands,) errors of one image under a caption; noise and timesteps depend on the image's index only."""
    objective.pulse()
    denoiser, (_, latent, *more) = objective.denoiser, shown
    latents = latent[None].to(denoiser.device).expand(bands, -1, -1, -1)
    sources = [generator(0, "evaluation", index, band) for band in range(bands)]
    total = len(denoiser.sigmas)
    times = [_timestep(total, band, bands, source) for band, source in enumerate(sources)]
    states = Conditioning.cat([objective.text_of(caption).to(denoiser.device)] * bands)
    conditioning = objective.project(states, torch.tensor(times) / (total - 1))
    noise = torch.stack([torch.randn(latent.shape, generator=source) for source in sources]).to(latents)
    sigma = denoiser.sigmas[times].to(latents)
    prediction = denoiser.predict(denoiser.add_noise(latents, noise, sigma), sigma, conditioning)
    return objective.squared_error(prediction, denoiser.target(latents, noise, sigma), *more[:1]).cpu()


def _timestep(total: int, band: int, bands: int, source: torch.Generator) -> int:
    """A timestep drawn evenly in a band of 0..total-1."""
    low, high = total * band // bands, total * (band + 1) // bands
    return int(torch.randint(low, high, (), generator=source))
