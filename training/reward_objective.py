"""What a reward tuning minimises: minus the reward of pictures drawn from prompts, differentiated through the sampler.

One step of TextCraftor (arXiv 2403.18978, algorithm 1): prompts become pictures by guided DDIM from noise, the pictures
a reward, and its gradient goes back through the last sampler steps into what trains. With the gradient stopped at the
UNet's input each of those steps is gone through on its own (see `rollout`), and the reward and the decoder before them,
so that no two graphs are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .data.prompts import PromptSlot
from .distributed import world
from .generators import generator
from .model import Conditioning, TextToImage
from .objectives import Loss
from .reward_config import RewardTuneConfig
from .rewards.combined import CombinedReward, CombinedScores
from .rollout import Heard, clean_step, ddim_chain, first_latent, joint_end, rollout, stepwise_gradient
from .sampling import initial_noise


class Spoken(NamedTuple):
    """A prompt as the objective works on it: with its encoding and the empty prompt's, unless what trains is in it."""

    prompt: str
    positive: Conditioning | None = None
    negative: Conditioning | None = None


class RewardObjective:
    """Objective: loss_i = - total reward of picture i.

    wanted: the parameters that train. text_trains: whether the text encoder is among them; the empty prompt of the
    guidance is then heard with it too, as it is in use.
    """

    def __init__(
        self,
        model: TextToImage,
        reward: CombinedReward,
        config: RewardTuneConfig,
        wanted: Callable[[], Sequence[nn.Parameter]],
        *,
        text_trains: bool,
        pulse: Callable[[], None] = lambda: None,
    ):
        self.model, self.reward, self.config, self._wanted = model, reward, config, wanted
        self._text_trains, self._pulse = text_trains, pulse
        self.chain = ddim_chain(model.denoiser, config.sampling_steps)
        self._seen: tuple[int, list[CombinedScores]] = (0, [])

    def load(self, slots: list[PromptSlot]) -> list[Spoken]:
        """Prompts, encoded already unless the text encoder trains: encoding may move models about."""
        if self._text_trains:
            return [Spoken(slot.prompt) for slot in slots]
        with torch.no_grad():
            empty = self._read("")
            return [Spoken(slot.prompt, self._read(slot.prompt), empty) for slot in slots]

    def __call__(self, batch: list[tuple[int, Spoken]], step: int) -> Loss:
        self._settle(step)
        indices, spoken = [index for index, _ in batch], [Spoken(*one) for _, one in batch]
        prompts = [one.prompt for one in spoken]
        heard, noise = self._heard(spoken), self._noise(indices, step)
        scores, pull = self._pull(heard, noise, prompts, (step, indices[0]))
        self._seen[1].extend(world().gathered(_on_cpu(scores)))
        value = -scores.total.detach()
        return Loss(value + (pull - pull.detach()) / len(value), scores.means())

    def _pull(
        self, heard: Heard, noise: Tensor, prompts: list[str], draw: tuple[int, int]
    ) -> tuple[CombinedScores, Tensor]:
        """The scores, and a number whose gradient is that of minus their sum. draw: the step and the first index."""
        denoiser, config = self.model.denoiser, self.config
        cut, parameters = heard.detached(), list(self._wanted())
        states = rollout(denoiser, first_latent(denoiser, noise, self.chain), self.chain, cut, self._pulse)
        last, chosen = self._chosen(draw[0])
        wanted = [*cut.tensors, *parameters]
        random = generator(config.seed, "reward augmentation", *draw)
        if config.method == "one step":
            scores, gradients = self._through_one(states, chosen[0], cut, prompts, wanted, random)
        elif config.stop_gradient:
            scores, end = self._end_gradient(states[-1], prompts, random)
            gradients = stepwise_gradient(denoiser, states, self.chain, chosen, cut, end, wanted, self._pulse)
        else:
            scores, gradients = self._through_all(states, last, cut, prompts, wanted, random)
        live = [*heard.tensors, *parameters]
        pull = sum((one * -gradient).sum() for one, gradient in zip(live, gradients, strict=True))
        return scores, pull

    def _chosen(self, step: int) -> tuple[int, list[int]]:
        """How many of the last steps, and which, gradients go through; drawn once a step where the method draws."""
        most, count = self.config.gradient_steps, len(self.chain)
        if self.config.method != "last K":
            most = 1 + torch.randint(most, (), generator=generator(self.config.seed, "gradient steps", step)).item()
        chosen = range(count - most, count)
        return most, [chosen[0]] if self.config.method == "one step" else list(chosen)

    def _end_gradient(
        self, latents: Tensor, prompts: list[str], random: torch.Generator
    ) -> tuple[CombinedScores, Tensor]:
        """The scores of the pictures behind latents, and the gradient of their sum at the latents."""
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_(True)
            images = self.model.autoencoder.pixels(leaf)
            scores, at_images = self.reward.value_and_gradient(images, prompts, random)
            (gradient,) = torch.autograd.grad(images, leaf, at_images.to(images))
        return scores, gradient

    def _through_one(self, states, number: int, heard: Heard, prompts, wanted, random):
        """Through the clean latent that one step's output stands for."""
        single = clean_step(self.model.denoiser, self.chain[number])
        clean = rollout(self.model.denoiser, states[number], [single], heard)[-1]
        scores, end = self._end_gradient(clean, prompts, random)
        gradients = stepwise_gradient(self.model.denoiser, [states[number], clean], [single], [0], heard, end, wanted)
        return scores, gradients

    def _through_all(self, states, last: int, heard: Heard, prompts, wanted, random):
        """Through all of the last steps together, what the UNet reads of the picture included."""
        with torch.enable_grad():
            end = joint_end(self.model.denoiser, states, self.chain, last, heard, False, self._pulse)
            scores, at_end = self._end_gradient(end, prompts, random)
            found = torch.autograd.grad(end, wanted, at_end, allow_unused=True)
        return scores, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    def _heard(self, spoken: Sequence[Spoken]) -> Heard:
        """What guidance reads of prompts, encoded now if they are not."""
        device = self.model.denoiser.device
        positive = [self._read(one.prompt) if one.positive is None else one.positive for one in spoken]
        if self.config.cfg == 1.0:
            return Heard(Conditioning.cat(positive).to(device))
        first = spoken[0].negative
        negative = self._read("") if first is None else first
        both = (Conditioning.cat(positive).to(device), Conditioning.cat([negative] * len(spoken)).to(device))
        return Heard(*both, self.config.cfg)

    def _read(self, text: str) -> Conditioning:
        encoder = self.model.text_encoder
        return encoder.encode(encoder.tokenize([text]))

    def _noise(self, indices: list[int], step: int) -> Tensor:
        denoiser, cells = self.model.denoiser, self.model.autoencoder.downscale
        height, width = self.config.height // cells, self.config.width // cells
        seed = self.config.seed
        shape = (denoiser.latent_channels, height, width)
        noise = [torch.randn(shape, generator=generator(seed, "noise", step, i)) for i in indices]
        return torch.stack(noise).to(denoiser.device)

    def _settle(self, step: int) -> None:
        """Takes an earlier step's scores into the running scales."""
        number, scores = self._seen
        if step != number:
            for one in scores:
                self.reward.observe(one)
            self._seen = (step, [])

    def state(self) -> dict[str, Any]:
        """The running scales, all finished steps taken in."""
        self._settle(-1)
        return self.reward.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._seen = (0, [])
        self.reward.load_state(state)

    @torch.no_grad()
    def validation(self, loaded: list[Spoken]) -> float:
        """Minus the mean total over held-out prompts, each from its own fixed noise; touches no random state."""
        denoiser, cells = self.model.denoiser, self.model.autoencoder.downscale
        size = (self.config.height // cells, self.config.width // cells)
        total = 0.0
        for number, one in enumerate(loaded):
            noise = initial_noise(denoiser, *size, 0, number)[None].to(denoiser.device)
            heard = self._heard([one])
            end = rollout(denoiser, first_latent(denoiser, noise, self.chain), self.chain, heard, self._pulse)[-1]
            total -= self.reward.scores(self.model.autoencoder.pixels(end), [one.prompt]).item()
        return total / len(loaded)


def _on_cpu(scores: CombinedScores) -> CombinedScores:
    raw, normalised = ({name: one.cpu() for name, one in part.items()} for part in (scores.raw, scores.normalised))
    return CombinedScores(scores.total.detach().cpu(), raw, normalised)
