"""Reward tuning on captioned images: the reward of the clean picture seen from one noised latent (TextCraftor's direct
fine-tuning, arXiv 2403.18978, equations 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.rng import generator
from ..data.order import Slot
from ..data.prompts import PromptSlot
from ..sampling.guidance import Guidance
from ..sampling.rollout import clean_step, rollout
from .noise import draw_noise, draw_timestep
from .reward import Chain, PromptSample, RewardObjective


class DirectObjective(RewardObjective):
    """Objective: loss_i = - total reward of picture i's clean latent, predicted from a drawn noise level in one call.

    The network is called once, without guidance. latent_of(slot) -> (C, h, w). Prompts to validate on are drawn from
    noise as in use, since the one-step picture of a noisy latent is not what anybody will see.
    """

    guided = False

    def __init__(self, *arguments, latent_of: Callable[[Slot], Tensor], **options):
        super().__init__(*arguments, **options)
        self._latent_of = latent_of

    def load(self, slots: list[Slot | PromptSlot]) -> list[PromptSample]:
        prompts = [s if isinstance(s, PromptSlot) else PromptSlot(s.example.caption, s.number, s.index) for s in slots]
        spoken = super().load(prompts)
        return [
            one
            if isinstance(slot, PromptSlot)
            else one._replace(latent=self._latent_of(slot), weight=slot.example.weight)
            for one, slot in zip(spoken, slots, strict=True)
        ]

    def _drawn(self, indices: list[int], spoken: list[PromptSample], step: int, heard: Guidance) -> Chain:
        denoiser, seed, settings = self.model.denoiser, self.config.seed, self.config.settings
        latents = torch.stack([one.latent for one in spoken]).to(denoiser.device)
        total, shape = len(denoiser.sigmas), latents.shape[1:]
        times = [draw_timestep(settings, total, generator(seed, "timestep", step, i)) for i in indices]
        noise = torch.stack([draw_noise(shape, settings, generator(seed, "noise", step, i)) for i in indices])
        sigma = denoiser.sigmas[torch.tensor(times)].to(latents)
        noisy = denoiser.add_noise(latents, noise.to(latents), sigma)
        single = clean_step(denoiser, sigma)
        return Chain(rollout(denoiser, noisy, [single], heard), [single], [0])
