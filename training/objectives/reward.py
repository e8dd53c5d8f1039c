"""What a reward tuning minimises: minus the reward of pictures drawn from prompts, differentiated through the sampler.

One step of TextCraftor (arXiv 2403.18978, algorithm 1): prompts become pictures by guided DDIM from noise, the pictures
a reward, and its gradient goes back through the last sampler steps into what trains. With the gradient stopped at the
UNet's input each of those steps is gone through on its own (see `rollout`), and the reward and the decoder before them,
so that no two graphs are in memory at a time. The constraints are in `reward_constraint`, training on images instead of
prompts in `direct_objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.distributed import world
from ..common.rng import generator
from ..config.reward import RewardTuneConfig
from ..data.prompts import PromptSlot
from ..models.protocols import Conditioning, TextToImage
from ..rewards.combined import CombinedReward, CombinedScores
from ..sampling.ddim import initial_noise
from ..sampling.guidance import Guidance
from ..sampling.rollout import Step, clean_step, ddim_chain, first_latent, joint_end, rollout, stepwise_gradient
from ..trainables.base import Trainable
from .denoising import Loss
from .regularizers import NearFrozen, drift


class PromptSample(NamedTuple):
    """A prompt as the objective works on it: with its and the empty prompt's encoding by the frozen text encoder, where
    they are wanted; `latent` (C, h, w) and `weight` only where an image belongs to it."""

    prompt: str
    positive: Conditioning | None = None
    negative: Conditioning | None = None
    latent: Tensor | None = None
    weight: float = 1.0


class Chain(NamedTuple):
    """Latents before each step and the end, the steps, and the numbers of those that gradients go through."""

    states: list[Tensor]
    steps: list[Step]
    chosen: list[int]


class RewardObjective:
    """Objective: loss_i = - total reward of picture i, and what the constraints add.

    trainable: whose parameters get the gradient. text_trains: whether the text encoder is among them; the empty prompt
    of the guidance is then heard with it too, as it is in use. pulse: called before each sampler step.
    """

    guided = True
    """Whether training hears the empty prompt as well, at the config's cfg."""

    def __init__(
        self,
        model: TextToImage,
        reward: CombinedReward,
        config: RewardTuneConfig,
        trainable: Trainable,
        *,
        text_trains: bool,
        pulse: Callable[[], None] = lambda: None,
    ):
        self.model, self.reward, self.config, self._trainable = model, reward, config, trainable
        self._text_trains, self._pulse = text_trains, pulse
        self._compares = bool(config.eps_constraint or config.drift_constraint)
        self._cfg = config.cfg if self.guided else 1.0
        self.chain = ddim_chain(model.denoiser, config.sampling_steps)
        reward.reset()
        self._seen: tuple[int, list[CombinedScores]] = (0, [])

    def load(self, slots: list[PromptSlot]) -> list[PromptSample]:
        """Prompts, encoded by the frozen text encoder where that is wanted: encoding may move models about."""
        if self._text_trains and not self._compares:
            return [PromptSample(slot.prompt) for slot in slots]
        with torch.no_grad():
            empty = self._read("")
            return [PromptSample(slot.prompt, self._read(slot.prompt), empty) for slot in slots]

    def __call__(self, batch: list[tuple[int, PromptSample]], step: int) -> Loss:
        self._settle(step)
        indices, spoken = [index for index, _ in batch], [PromptSample(*one) for _, one in batch]
        heard = self._now(spoken, self._cfg)
        scores, pull, parts = self._pull(heard, indices, spoken, step)
        self._seen[1].extend(world().all_gather(_on_cpu(scores)))
        value = -scores.total.detach()
        if "eps_mse" in parts:
            value = value + self.config.eps_constraint * parts["eps_mse"].to(value)
        if self.config.drift_constraint:
            parts["drift"] = drift(heard, self._frozen(spoken, self._cfg))
            value = value + self.config.drift_constraint * parts["drift"].to(value)
        loss = value * _weights(spoken).to(value) + (pull - pull.detach()) / len(value)
        return Loss(loss, scores.means() | {name: part.mean().item() for name, part in parts.items()})

    def _pull(
        self, heard: Guidance, indices: list[int], spoken: list[PromptSample], step: int
    ) -> tuple[CombinedScores, Tensor, dict[str, Tensor]]:
        """The scores, a number whose gradient is that of minus their weighted sum, and (B,) figures of constraints, of
        which it has the gradient as well.

        Where the text encoder trains, all of its gradient comes through what is heard.
        """
        cut = heard.detached()
        parameters = [] if self._text_trains else list(self._trainable.parameters.values())
        chain = self._drawn(indices, spoken, step, cut)
        near = self._near(spoken, len(chain.chosen))
        wanted, prompts = [*cut.tensors, *parameters], [one.prompt for one in spoken]
        random = generator(self.config.seed, "reward augmentation", step, indices[0])
        scores, end = self._end_gradient(chain.states[-1], prompts, random)
        end = end * _weights(spoken).to(end).view(-1, 1, 1, 1)
        gradients = self._joint if self._is_joint else self._stepwise
        live = [*heard.tensors, *parameters]
        pairs = zip(live, gradients(chain, cut, end, wanted, near), strict=True)
        pull = -sum(torch.dot(one.flatten(), gradient.flatten()) for one, gradient in pairs)
        return scores, pull, {} if near is None else {"eps_mse": near.error}

    def _drawn(self, indices: list[int], spoken: list[PromptSample], step: int, heard: Guidance) -> Chain:
        """Pictures of the prompts, as the sampler draws them."""
        denoiser, noise = self.model.denoiser, self._noise(indices, step)
        states = rollout(denoiser, first_latent(denoiser, noise, self.chain), self.chain, heard, self._pulse)
        chosen = self._chosen(step)
        if self.config.method != "one step":
            return Chain(states, self.chain, chosen)
        noisy, single = states[chosen[0]], clean_step(denoiser, self.chain[chosen[0]].sigma)
        return Chain(rollout(denoiser, noisy, [single], heard), [single], [0])

    def _chosen(self, step: int) -> list[int]:
        """The sampler steps that gradients go through; drawn once a step where the method draws."""
        most, count = self.config.gradient_steps, len(self.chain)
        if self.config.method != "last K":
            most = 1 + torch.randint(most, (), generator=generator(self.config.seed, "gradient steps", step)).item()
        chosen = range(count - most, count)
        return [chosen[0]] if self.config.method == "one step" else list(chosen)

    def _near(self, spoken: list[PromptSample], count: int) -> NearFrozen | None:
        if not self.config.eps_constraint:
            return None
        frozen, weights = self._frozen(spoken, self._cfg), self.config.eps_constraint * _weights(spoken)
        return NearFrozen(self.model.denoiser, frozen, self._trainable.disabled, weights, count)

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

    @property
    def _is_joint(self) -> bool:
        return not self.config.stop_gradient and self.config.method in ("last K", "random K")

    def _stepwise(self, chain: Chain, heard: Guidance, end: Tensor, wanted, near: NearFrozen | None) -> list[Tensor]:
        """Step by step, the gradient stopped at what the UNet reads of the picture."""
        of_output = near and (lambda number, out: near.gradient(chain.states[number], chain.steps[number], out))
        return stepwise_gradient(self.model.denoiser, *chain, heard, end, wanted, of_output, self._pulse)

    def _joint(self, chain: Chain, heard: Guidance, end: Tensor, wanted, near: NearFrozen | None) -> list[Tensor]:
        """Through all of the last steps together, what the UNet reads of the picture included; the constraint still
        takes the picture as given."""
        states, steps, chosen = chain
        with torch.enable_grad():
            last = joint_end(self.model.denoiser, states, steps, len(chosen), heard, False, self._pulse)
            found = torch.autograd.grad(last, wanted, end, allow_unused=True)
        found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
        if near is None:
            return found
        held = self._stepwise(chain, heard, torch.zeros_like(end), wanted, near)
        return [one + other for one, other in zip(found, held, strict=True)]

    def _now(self, spoken: Sequence[PromptSample], cfg: float) -> Guidance:
        """What guidance reads of prompts, as the text encoder says it now."""
        if not self._text_trains:
            return self._frozen(spoken, cfg)
        positive = [self._read(one.prompt) for one in spoken]
        return self._guidance(positive, None if cfg == 1.0 else self._read(""), cfg)

    def _frozen(self, spoken: Sequence[PromptSample], cfg: float) -> Guidance:
        """What guidance reads of prompts, as the frozen text encoder said it."""
        return self._guidance([one.positive for one in spoken], None if cfg == 1.0 else spoken[0].negative, cfg)

    def _guidance(self, positive: list[Conditioning], negative: Conditioning | None, cfg: float) -> Guidance:
        device = self.model.denoiser.device
        empty = None if negative is None else Conditioning.cat([negative] * len(positive)).to(device)
        return Guidance(Conditioning.cat(positive).to(device), empty, cfg)

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
    def validation(self, loaded: list[PromptSample]) -> float:
        """Minus the mean total over held-out prompts, each from its own fixed noise, in scales that stay; touches no
        random state."""
        denoiser, cells = self.model.denoiser, self.model.autoencoder.downscale
        size = (self.config.height // cells, self.config.width // cells)
        total = 0.0
        for number, one in enumerate(loaded):
            noise = initial_noise(denoiser, *size, 0, number)[None].to(denoiser.device)
            heard = self._now([one], self.config.cfg)
            end = rollout(denoiser, first_latent(denoiser, noise, self.chain), self.chain, heard, self._pulse)[-1]
            total -= self.reward.comparable(self.model.autoencoder.pixels(end), [one.prompt]).item()
        return total / len(loaded)


def _weights(spoken: Sequence[PromptSample]) -> Tensor:
    return torch.tensor([one.weight for one in spoken])


def _on_cpu(scores: CombinedScores) -> CombinedScores:
    raw, normalised = ({name: one.cpu() for name, one in part.items()} for part in (scores.raw, scores.normalised))
    return CombinedScores(scores.total.detach().cpu(), raw, normalised)
