"""Deterministic DDIM sampling with classifier-free guidance; differentiable unless the caller forbids gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..common.rng import generator
from ..models.protocols import Denoiser
from .guidance import Guidance, guided_latent

GuidanceSchedule = Guidance | Callable[[Tensor], Guidance]
"""Guidance, or a function of the time (a scalar): the training timestep as a share of the last one, 0 (clean) to 1."""


def timesteps(count: int, total: int = 1000) -> list[int]:
    """`count` training timesteps from the noisiest down, evenly spaced with the last training step included
    ("trailing" spacing, Lin et al. 2024, arXiv 2305.08891, table 2)."""
    if not 1 <= count <= total:
        raise ValueError(f"number of sampling steps is {count}; expected 1 to {total}.")
    return [round(total - i * total / count) - 1 for i in range(count)]


def noise_schedule(
    denoiser: Denoiser, steps: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """alpha and sigma of x = alpha * latent + sigma * noise, (steps + 1,) each: at every step's start, and 1 and 0 at
    the end. alpha is 1 - sigma for flow models and 1 for eps and v models."""
    chosen = denoiser.sigmas[timesteps(steps, len(denoiser.sigmas))]
    sigmas = torch.cat([chosen, chosen.new_zeros(1)]).to(device, dtype)
    return (1 - sigmas if denoiser.prediction_type == "flow" else torch.ones_like(sigmas)), sigmas


def initial_noise(denoiser: Denoiser, height: int, width: int, seed: int, index: int) -> Tensor:
    """Standard normal noise (C, height, width) in latent cells for the picture `index` of a seed."""
    shape = (denoiser.latent_channels, height, width)
    return torch.randn(shape, generator=generator(seed, "sample", index))


def scale_noise(denoiser: Denoiser, noise: Tensor, sigma: Tensor) -> Tensor:
    """Standard normal noise with the variance of a noisy latent at the first sigma, where a sampler starts."""
    return noise * sigma if denoiser.prediction_type == "flow" else noise * torch.sqrt(1 + sigma**2)


def ddim_steps(
    denoiser: Denoiser, noise: Tensor, guidance: GuidanceSchedule, steps: int
) -> Iterator[tuple[int, Tensor]]:
    """Yields (step index, noisy latent) after each DDIM step: x' = alpha' D + sigma' (x - alpha D) / sigma, with D the
    guided estimate of the clean latent (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0).

    Args:
        denoiser: the network and its noise levels.
        noise: (B, C, h, w), standard normal.
        guidance: conditionings of batch B and the guidance scale, or a function of the time that returns them.
        steps: their number, 1 to the number of training timesteps.
    """
    total = len(denoiser.sigmas)
    alphas, sigmas = noise_schedule(denoiser, steps, noise.dtype, noise.device)
    x = scale_noise(denoiser, noise, sigmas[0])
    for i, timestep in enumerate(timesteps(steps, total)):
        now = guidance(torch.tensor(timestep / (total - 1))) if callable(guidance) else guidance
        latent = guided_latent(denoiser, x, sigmas[i].expand(len(x)), now)
        x = alphas[i + 1] * latent + sigmas[i + 1] * (x - alphas[i] * latent) / sigmas[i]
        yield i, x


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    guidance: GuidanceSchedule,
    steps: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """The clean latents (B, C, h, w) at the end of `ddim_steps`; `on_step` may raise to cancel."""
    x = noise
    for i, x in ddim_steps(denoiser, noise, guidance, steps):  # noqa: B007
        if on_step:
            on_step(i)
    return x
