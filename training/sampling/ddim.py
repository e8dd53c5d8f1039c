"""Deterministic DDIM sampling with classifier-free guidance; differentiable unless the caller forbids gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..common.rng import generator
from ..models.protocols import Conditioning, Denoiser


def timesteps(count: int, total: int = 1000) -> list[int]:
    """`count` training timesteps from the noisiest down, evenly spaced with the last training step included
    ("trailing" spacing, Lin et al. 2024, arXiv 2305.08891, table 2)."""
    if not 1 <= count <= total:
        raise ValueError(f"number of sampling steps is {count}; expected 1 to {total}.")
    return [round(total - i * total / count) - 1 for i in range(count)]


def initial_noise(denoiser: Denoiser, height: int, width: int, seed: int, index: int) -> Tensor:
    """Standard normal noise (C, height, width) in latent cells for the picture `index` of a seed."""
    shape = (denoiser.latent_channels, height, width)
    return torch.randn(shape, generator=generator(seed, "sample", index))


def guided(
    denoiser: Denoiser, noisy: Tensor, sigma: Tensor, cond: Conditioning, uncond: Conditioning | None, cfg: float
):
    """Denoised latent under classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6)."""
    if uncond is None or cfg == 1.0:
        return denoiser.denoised(noisy, sigma, denoiser.predict(noisy, sigma, cond))
    both = Conditioning.cat([cond, uncond])
    twice, sigmas = torch.cat([noisy, noisy]), torch.cat([sigma, sigma])
    positive, negative = denoiser.denoised(twice, sigmas, denoiser.predict(twice, sigmas, both)).chunk(2)
    return negative + cfg * (positive - negative)


ConditioningSchedule = Conditioning | Callable[[Tensor], Conditioning]
"""Conditioning, or what gives it for a time (a scalar): the training timestep as a share, 0 (clean) to 1."""


def ddim_steps(
    denoiser: Denoiser,
    noise: Tensor,
    cond: ConditioningSchedule,
    uncond: ConditioningSchedule | None,
    *,
    steps: int,
    cfg: float,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (step index, latent) after each DDIM step (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0).

    noise: (B, C, h, w), standard normal. In the sampler's space the step is x' = D + sigma' * (x - D) / sigma for
    eps and v models, and x' = (1 - sigma') D + sigma' * noise estimate for flow models.
    """
    flow = denoiser.prediction_type == "flow"
    total = len(denoiser.sigmas)
    times = timesteps(steps, total)
    chosen = [denoiser.sigmas[t] for t in times] + [torch.tensor(0.0)]
    sigmas = torch.stack([s.to(noise.device, noise.dtype) for s in chosen])
    x = noise * sigmas[0] if flow else noise * torch.sqrt(1 + sigmas[0] ** 2)
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        heard = [at(torch.tensor(times[i] / (total - 1))) if callable(at) else at for at in (cond, uncond)]
        clean = guided(denoiser, x, sigma.expand(len(x)), *heard, cfg)
        if flow:
            x = (1 - following) * clean + following * (x - (1 - sigma) * clean) / sigma
        else:
            x = clean + following * (x - clean) / sigma
        yield i, x


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    cond: ConditioningSchedule,
    uncond: ConditioningSchedule | None,
    *,
    steps: int,
    cfg: float,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """The clean latents (B, C, h, w) at the end of `ddim_steps`; `on_step` may raise to cancel."""
    x = noise
    for i, x in ddim_steps(denoiser, noise, cond, uncond, steps=steps, cfg=cfg):  # noqa: B007
        if on_step:
            on_step(i)
    return x
