"""What is minimised: the denoising objective, with the weightings the field uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import TrainingSettings
from .generators import generator
from .model import Conditioning, Denoiser


@dataclass(frozen=True)
class Loss:
    """per_sample: (B,) differentiable, already weighted. parts: further figures to log, plain numbers."""

    per_sample: Tensor
    parts: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What a run minimises. `load` runs before the trained weights are attached, so it may move models about."""

    def load(self, slots: list) -> list: ...

    def __call__(self, batch: list[tuple[int, Any]], step: int) -> Loss:
        """The loss of (index, loaded slot) pairs, where index numbers the sample within optimiser step `step`."""
        ...

    def validation(self, loaded: list) -> float: ...


def snr_weight(sigma: Tensor, settings: TrainingSettings, prediction_type: str) -> Tensor:
    """Loss weight per noise level, with SNR = 1 / sigma^2 for eps and v models.

    min-SNR (Hang et al. 2023, arXiv 2303.09556, section 3.4): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v.
    debiased (Yu et al. 2023, arXiv 2310.08442, eq. 9): 1 / sqrt(SNR) with SNR capped at 1000; 1 / (SNR + 1) for v.
    """
    if settings.loss_weighting == "none":
        return torch.ones_like(sigma)
    if prediction_type == "flow":
        raise ValueError(
            f"loss_weighting is {settings.loss_weighting!r} on a flow model; expected 'none'. "
            "The SNR weightings are defined for eps and v models."
        )
    snr = sigma.double() ** -2
    if settings.loss_weighting == "debiased":
        weight = 1 / (snr + 1) if prediction_type == "v" else snr.clamp(max=1000) ** -0.5
    else:
        weight = snr.clamp(max=settings.snr_gamma) / (snr + 1 if prediction_type == "v" else snr)
    return weight.to(sigma.dtype)


def distance(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean over everything but the batch: squared, absolute, or Huber error (knee 0.1), in fp32."""
    prediction, target = prediction.float(), target.float()
    match kind:
        case "mse":
            error = (prediction - target) ** 2
        case "l1":
            error = (prediction - target).abs()
        case _:
            error = torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.1) / 0.1
    return error.flatten(1).mean(1)


def draw_timestep(settings: TrainingSettings, total: int, random: torch.Generator) -> int:
    """One training timestep in min_timestep..max_timestep."""
    low, high = settings.min_timestep, min(settings.max_timestep, total - 1)
    if settings.timestep_sampling == "uniform":
        share = torch.rand((), generator=random, dtype=torch.float64)
    else:  # Esser et al. 2024, arXiv 2403.03206, eq. 19 with m = 0, s = 1
        share = torch.randn((), generator=random, dtype=torch.float64).sigmoid()
    return min(low + int(share * (high - low + 1)), high)


class DenoisingObjective:
    """Objective: predict eps, v or the flow at a drawn noise level, from the latent and its caption.

    latent_of(slot) -> (C, h, w); text_of(caption) -> Conditioning before the projection, batch 1; project maps a batch
    of those to what the denoiser listens to. All draws of sample `index` in a step come from generators named by it.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: TrainingSettings,
        seed: int,
        *,
        latent_of: Callable,
        text_of: Callable[[str], Conditioning],
        project: Callable[[Conditioning, Tensor], Conditioning],
    ):
        self.denoiser, self.settings, self.seed = denoiser, settings, seed
        self.latent_of, self.text_of, self.project = latent_of, text_of, project

    def load(self, slots: list) -> list[tuple[str, Tensor]]:
        """(caption, latent) pairs."""
        return [(slot.example.caption, self.latent_of(slot)) for slot in slots]

    def __call__(self, batch: list[tuple[int, tuple[str, Tensor]]], step: int) -> Loss:
        indices = [index for index, _ in batch]
        latents = torch.stack([latent for _, (_, latent) in batch]).to(self.denoiser.device)
        captions = [self._caption(caption, step, index) for index, (caption, _) in batch]
        total = len(self.denoiser.sigmas)
        times = [draw_timestep(self.settings, total, generator(self.seed, "timestep", step, i)) for i in indices]
        states = Conditioning.cat(self.text_of(c) for c in captions).to(self.denoiser.device)
        conditioning = self.project(states, torch.tensor(times) / (total - 1))
        noise = torch.stack([self._noise(latents.shape[1:], step, i) for i in indices]).to(latents)
        return Loss(self._error(latents, noise, torch.tensor(times), conditioning, step, indices))

    def _caption(self, caption: str, step: int, index: int) -> str:
        drop = torch.rand((), generator=generator(self.seed, "caption dropout", step, index)).item()
        return "" if drop < self.settings.caption_dropout else caption

    def _noise(self, shape: torch.Size, step: int, index: int) -> Tensor:
        random = generator(self.seed, "noise", step, index)
        noise = torch.randn(shape, generator=random)
        if self.settings.noise_offset:
            noise = noise + self.settings.noise_offset * torch.randn((shape[0], 1, 1), generator=random)
        return noise

    def _error(self, latents, noise, times, conditioning, step, indices) -> Tensor:
        sigma = self.denoiser.sigmas[times].to(latents)
        entering = noise
        if self.settings.input_perturbation:
            extra = [torch.randn(noise.shape[1:], generator=generator(self.seed, "perturb", step, i)) for i in indices]
            entering = noise + self.settings.input_perturbation * torch.stack(extra).to(noise)
        noisy = self.denoiser.add_noise(latents, entering, sigma)
        prediction = self.denoiser.predict(noisy, sigma, conditioning)
        error = distance(prediction, self.denoiser.target(latents, noise, sigma), self.settings.loss)
        return error * snr_weight(sigma, self.settings, self.denoiser.prediction_type)

    @torch.no_grad()
    def validation(self, loaded: list[tuple[str, Tensor]], levels: int = 4) -> float:
        """Unweighted loss over fixed noise at `levels` inner timesteps (kohya's recipe); touches no random state."""
        total, losses = len(self.denoiser.sigmas), []
        inner = torch.linspace(0, total - 1, levels + 2)[1:-1].round().long()
        for index, (caption, one) in enumerate(loaded):
            latent = one[None].to(self.denoiser.device).expand(levels, -1, -1, -1)
            text = self.text_of(caption).to(self.denoiser.device)
            conditioning = self.project(Conditioning.cat([text] * levels), inner / (total - 1))
            shape = latent.shape[1:]
            noise = [torch.randn(shape, generator=generator(0, "validation", index, i)) for i in range(levels)]
            noise = torch.stack(noise).to(latent)
            sigma = self.denoiser.sigmas[inner].to(latent)
            prediction = self.denoiser.predict(self.denoiser.add_noise(latent, noise, sigma), sigma, conditioning)
            losses.append(distance(prediction, self.denoiser.target(latent, noise, sigma), "mse").mean().item())
        return sum(losses) / len(losses)
