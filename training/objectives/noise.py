"""The draws of a denoising objective: timesteps and noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..config.training_settings import TrainingSettings


def draw_timestep(settings: TrainingSettings, total: int, random: torch.Generator) -> int:
    """A training timestep in min_timestep..max_timestep, below `total`.

    With u uniform in 0..1 and n standard normal, its position in that range, 0 (clean) to 1 (noise), is

        uniform       u
        logit-normal  sigmoid(timestep_mean + timestep_std n) (Esser et al. 2024, arXiv 2403.03206, eq. 19)
        high noise    1 - u^3, Beta(1, 1/3) (T2I-Adapter, arXiv 2302.08453, section 3.4; ai-toolkit's "content")
        low noise     u^3, Beta(1/3, 1) (ai-toolkit's "style"); OneTrainer's BETA draws the same family
    """
    low, high = settings.min_timestep, min(settings.max_timestep, total - 1)
    if settings.timestep_sampling == "logit-normal":
        normal = torch.randn((), generator=random, dtype=torch.float64)
        share = (settings.timestep_mean + settings.timestep_std * normal).sigmoid()
    else:
        share = torch.rand((), generator=random, dtype=torch.float64)
        if settings.timestep_sampling != "uniform":
            share = 1 - share**3 if settings.timestep_sampling == "high noise" else share**3
    return min(low + int(share * (high - low + 1)), high)


def draw_noise(shape: torch.Size | tuple[int, ...], settings: TrainingSettings, random: torch.Generator) -> Tensor:
    """Noise (C, h, w): standard normal; with an offset per channel and pyramid noise where the settings ask for it."""
    noise = torch.randn(shape, generator=random)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn((shape[0], 1, 1), generator=random)
    if settings.multires_iterations:
        noise = pyramid_noise(noise, settings.multires_iterations, settings.multires_discount, random)
    return noise


def pyramid_noise(noise: Tensor, iterations: int, discount: float, random: torch.Generator) -> Tensor:
    """Multi-resolution noise: adds noise of ever coarser grids to `noise` and scales the sum to unit std.

    As `pyramid_noise_like` in sd-scripts' library/custom_train_functions.py (after Whitaker's "Multi-Resolution
    Noise"): layer i has its sides divided by r^i, with r drawn uniformly in 2..4 for each layer, and is weighted by
    discount^i. A layer that is one cell wide or high is the last. sd-scripts scales a batch by its common std, this
    function each sample by its own.

    Args:
        noise: (C, h, w).
        iterations: number of layers, at most.
        discount: weight of each layer relative to the next finer one.
        random: for all draws.
    """
    channels, height, width = noise.shape
    for i in range(iterations):
        ratio = 2 + 2 * torch.rand((), generator=random, dtype=torch.float64).item()
        size = max(1, int(height / ratio**i)), max(1, int(width / ratio**i))
        layer = torch.randn((1, channels, *size), generator=random)
        noise = noise + discount**i * functional.interpolate(layer, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return noise / noise.std()
