"""Objective of reward tuning on captioned images: the reward of the clean picture predicted from one noised latent
(TextCraftor's direct fine-tuning, arXiv 2403.18978, equations 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.rng import generator
from ..common.transfer import upload, upload_as
from ..data.order import Slot
from ..data.prompts import PromptSlot
from ..sampling.guidance import Guidance
from ..sampling.rollout import clean_step, rollout
from .noise import draw_noise, draw_timestep
from .reward import Chain, PromptSample, RewardObjective


class DirectObjective(RewardObjective):
    """Objective: loss_i = - total reward of picture i's clean latent, predicted from a drawn noise level in one call.

    Training calls the network once, without guidance. Validation draws held-out prompts from pure noise, as the tuned
    model will be used: the one-step prediction of a noisy latent is not a picture that anybody draws.

    Args:
        latent_of: slot -> (C, h, w). The other arguments are those of RewardObjective.
    """

    guided = False

    def __init__(self, *arguments: Any, latent_of: Callable[[Slot], Tensor], **options: Any):
        super().__init__(*arguments, **options)
        self._latent_of = latent_of

    def load(self, slots: list[Slot | PromptSlot]) -> list[PromptSample]:
        prompts = [s if isinstance(s, PromptSlot) else PromptSlot(s.example.caption, s.number, s.index) for s in slots]
        pairs = zip(super().load(prompts), slots, strict=True)
        return [sample if isinstance(slot, PromptSlot) else self._with_image(sample, slot) for sample, slot in pairs]

    def _with_image(self, sample: PromptSample, slot: Slot) -> PromptSample:
        return sample._replace(latent=self._latent_of(slot), weight=slot.example.weight)

    def _rehearsed_chain(self, count: int) -> Chain:
        shape = (count, self.model.denoiser.latent_channels, *self._latent_size)
        x = torch.zeros(shape, device=self.model.denoiser.device)
        single = clean_step(self.model.denoiser, self.model.denoiser.sigmas[:1].expand(count).to(x))
        return Chain([x, x], [single], [0])

    def _draw(self, indices: list[int], samples: list[PromptSample], step: int, guidance: Guidance) -> Chain:
        """One step from the images' latents at drawn noise levels."""
        denoiser, seed, settings = self.model.denoiser, self.config.seed, self.config.settings
        latents = upload(torch.stack([sample.latent for sample in samples]), denoiser.device)
        total, shape = len(denoiser.sigmas), latents.shape[1:]
        times = [draw_timestep(settings, total, generator(seed, "timestep", step, i)) for i in indices]
        noise = torch.stack([draw_noise(shape, settings, generator(seed, "noise", step, i)) for i in indices])
        sigma = upload_as(denoiser.sigmas[torch.tensor(times)], latents)
        noisy = denoiser.add_noise(latents, upload_as(noise, latents), sigma)
        single = clean_step(denoiser, sigma)
        return Chain(rollout(denoiser, noisy, [single], guidance), [single], [0])
