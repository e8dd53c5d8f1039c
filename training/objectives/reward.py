"""Objective of reward tuning: minus the reward of pictures drawn from prompts, differentiated through the sampler.

One step of TextCraftor (arXiv 2403.18978, algorithm 1): guided DDIM draws pictures of prompts from noise, rewards score
them, and the gradient passes through the last sampler steps to the trained weights. With the gradient stopped at the
UNet's input each sampler step is differentiated alone (see `rollout`), after decoder and reward, so that no two graphs
are in memory at a time. Large pictures are differentiated one by one (`GRAPH_PIXELS`), and the decoder's activations
are recomputed, so that peak memory does not grow with the batch. Constraints are in `regularizers`, training on images
instead of prompts in `reward_on_images`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.distributed import world
from ..common.rng import generator
from ..common.transfer import upload
from ..config.reward import RewardTuneConfig
from ..data.prompts import PromptSlot
from ..models.protocols import Conditioning, TextToImage
from ..models.recompute import recomputed
from ..rewards.augment import draw_augmentation
from ..rewards.combined import CombinedReward, CombinedScores
from ..sampling.ddim import initial_noise
from ..sampling.guidance import Guidance
from ..sampling.rollout import (
    Step,
    add_gradients,
    clean_step,
    ddim_chain,
    first_latent,
    joint_end,
    on_device,
    rollout,
    stepwise_gradient,
    zeros_for_none,
)
from ..trainables.base import Trainable
from .objective import Loss
from .regularizers import OutputConstraint, drift
from .rehearsal import encoded, rehearsed_gradients

GRAPH_PIXELS = 512 * 512
"""Pixels of the pictures that one graph of decoder, rewards or UNet holds, unless one picture has more."""
KEPT_ENCODINGS = 64
"""Prompts whose encoding by the frozen text encoder is kept, the latest ones: a text encoder that visits the device, or
that ComfyUI unloads, does not come back for them."""


class PromptSample(NamedTuple):
    """A prompt, loaded: with its encoding and the empty prompt's by the frozen text encoder, where they are needed."""

    prompt: str
    positive: Conditioning | None = None
    negative: Conditioning | None = None
    latent: Tensor | None = None
    """(C, h, w), where the prompt is an image's caption."""
    weight: float = 1.0
    """Factor of its loss."""


class Chain(NamedTuple):
    """A sampler's trajectory: latents before each step and at the end, the steps, and the numbers of those steps that
    gradients pass through."""

    states: list[Tensor]
    steps: list[Step]
    chosen: list[int]


class RewardObjective:
    """Objective: loss_i = - total reward of picture i + the weighted constraints.

    Args:
        model: draws the pictures.
        reward: scores them.
        config: method, size, sampler steps and constraints.
        trainable: its parameters get the gradient.
        text_trains: whether the text encoder is among them; the empty prompt of the guidance is then encoded anew too,
            as it is when the tuned model is used.
        pulse: called before each sampler step; may raise to cancel.
    """

    guided = True
    """Whether training pictures are drawn with guidance, at the config's cfg."""

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
        self._is_constrained = bool(config.eps_constraint or config.drift_constraint)
        self._cfg = config.cfg if self.guided else 1.0
        self.chain = on_device(ddim_chain(model.denoiser, config.sampling_steps), model.denoiser.device)
        reward.reset()
        self._images_at_once = max(1, GRAPH_PIXELS // (config.width * config.height))
        self._encode_frozen = lru_cache(KEPT_ENCODINGS)(self._encode)
        self._step_scores: list[list[list[float]]] = []
        """Raw scores of the latest step, (terms, B) of each batch, which the running scales have not counted yet."""
        self._step = 0
        """Its number."""

    def load(self, slots: list[PromptSlot]) -> list[PromptSample]:
        """Prompts, encoded by the frozen text encoder where that is needed: encoding may move models."""
        if self._text_trains and not self._is_constrained:
            return [PromptSample(slot.prompt) for slot in slots]
        with torch.no_grad():
            empty = self._encode_frozen("")  # one by one, so that the last bits are the same in every batch
            return [PromptSample(slot.prompt, self._encode_frozen(slot.prompt), empty) for slot in slots]

    def __call__(self, batch: list[tuple[int, PromptSample]], step: int) -> Loss:
        self._observe_scores(step)
        indices, samples = [index for index, _ in batch], [PromptSample(*sample) for _, sample in batch]
        guidance = self._guidance_now(samples, self._cfg)
        scores, surrogate, parts = self._surrogate(guidance, indices, samples, step)
        value = -scores.total.detach()
        if "eps_mse" in parts:
            value = value + self.config.eps_constraint * parts["eps_mse"].to(value)
        if self.config.drift_constraint:
            parts["drift"] = drift(guidance, self._frozen_guidance(samples, self._cfg))
            value = value + self.config.drift_constraint * parts["drift"].to(value)
        loss = value * _weights(samples, value.device).to(value) + (surrogate - surrogate.detach()) / len(value)
        figures = scores.means() | {name: part.detach().mean() for name, part in parts.items()}
        return Loss(loss, figures, torch.stack([raw.to(value) for raw in scores.raw.values()]))

    def _surrogate(
        self, guidance: Guidance, indices: list[int], samples: list[PromptSample], step: int
    ) -> tuple[CombinedScores, Tensor, dict[str, Tensor]]:
        """Draws and scores pictures, and carries the gradient back to the conditioning and the trained parameters.

        Where the text encoder trains, all of its gradient passes through the conditioning.

        Returns:
            The scores; a number whose gradient is that of minus their weighted sum and of the output constraint; and
            (B,) figures of the output constraint.
        """
        detached, crops = guidance.detached(), self._augmentation(indices, step)
        chain = self._draw(indices, samples, step, detached)
        scores, at_end = self._end_gradient(chain.states[-1], [sample.prompt for sample in samples], crops)
        at_end = at_end * _weights(samples, at_end.device).to(at_end).view(-1, 1, 1, 1)
        return scores, *self._back_propagate(guidance, detached, chain, at_end, samples)

    def _back_propagate(
        self, guidance: Guidance, detached: Guidance, chain: Chain, at_end: Tensor, samples: Sequence[PromptSample]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The second and third result of `_surrogate`, from the gradient at the chain's end."""
        parameters = [] if self._text_trains else list(self._trainable.parameters.values())
        constraint = self._output_constraint(samples, len(chain.chosen))
        back_propagate = self._joint_gradients if self._is_joint else self._stepwise_gradients
        gradients = back_propagate(chain, detached, at_end, [*detached.tensors, *parameters], constraint)
        pairs = zip([*guidance.tensors, *parameters], gradients, strict=True)
        surrogate = -sum(torch.dot(tensor.flatten(), gradient.flatten()) for tensor, gradient in pairs)
        return surrogate, {} if constraint is None else {"eps_mse": constraint.error}

    def rehearsal(self, sample: Any, count: int, parameters: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
        sample, held = PromptSample(*sample), 0
        if self._text_trains:
            texts, sizes = zip(*(encoded(partial(self._encode, text)) for text in (sample.prompt, "")), strict=True)
            sample, held = sample._replace(positive=texts[0], negative=texts[1]), count * sizes[0] + sizes[1]
        return {
            "activations": lambda: self._rehearse([sample] * count, held, parameters),
            "decode": lambda: self._rehearse_decoding(count, held),
        }

    def _rehearse(self, samples: list[PromptSample], held: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of a batch; held: bytes of the text encoder's graph."""
        graph = torch.empty(held, dtype=torch.uint8, device=self.model.denoiser.device)
        guidance, chain = self._frozen_guidance(samples, self._cfg).detached(), self._rehearsed_chain(len(samples))
        parts = 1 if len(chain.chosen) > 1 and not self._is_joint else 2  # the first pass of all makes the totals
        at_end = torch.zeros_like(chain.states[-1][: parts * self._images_at_once])
        surrogate, _ = self._back_propagate(guidance, guidance.detached(), chain, at_end, samples)
        return rehearsed_gradients(surrogate, guidance.tensors, parameters, graph)

    def _rehearsed_chain(self, count: int) -> Chain:
        """Latents as a rollout holds them; of steps that are differentiated one by one, two have all their memory."""
        denoiser, method = self.model.denoiser, self.config.method
        shape = (count, denoiser.latent_channels, *self._latent_size)
        states = [torch.zeros(shape, device=denoiser.device) for _ in range(len(self.chain) + 1)]
        if method == "one step":
            return Chain(states[-2:], [clean_step(denoiser, self.chain[-1].sigma)], [0])
        steps = self.config.gradient_steps if self._is_joint else min(2, self.config.gradient_steps)
        return Chain(states, self.chain, list(range(len(self.chain) - steps, len(self.chain))))

    def _rehearse_decoding(self, count: int, held: int) -> tuple[Tensor, Tensor]:
        graph = torch.empty(held, dtype=torch.uint8, device=self.model.denoiser.device)
        part = count if self.reward.compares_images else min(count, self._images_at_once)
        shape = (part, self.model.denoiser.latent_channels, *self._latent_size)
        leaf, images = self._pixels(torch.zeros(shape, device=self.model.denoiser.device))
        self.reward.rehearse(images)
        return graph, torch.autograd.grad(images, leaf, torch.zeros_like(images))[0]

    def _draw(self, indices: list[int], samples: list[PromptSample], step: int, guidance: Guidance) -> Chain:
        """The trajectory of the prompts' pictures, as the sampler draws them."""
        denoiser, noise = self.model.denoiser, self._noise(indices, step)
        states = rollout(denoiser, first_latent(denoiser, noise, self.chain), self.chain, guidance, self._pulse)
        chosen = self._chosen_steps(step)
        if self.config.method != "one step":
            return Chain(states, self.chain, chosen)
        noisy, single = states[chosen[0]], clean_step(denoiser, self.chain[chosen[0]].sigma)
        return Chain(rollout(denoiser, noisy, [single], guidance), [single], [0])

    def _chosen_steps(self, step: int) -> list[int]:
        """The sampler steps that gradients pass through; drawn anew at each step where the method draws."""
        chosen, count = self.config.gradient_steps, len(self.chain)
        if self.config.method != "last K":
            random = generator(self.config.seed, "gradient steps", step)
            chosen = 1 + torch.randint(chosen, (), generator=random).item()
        last = range(count - chosen, count)
        return [last[0]] if self.config.method == "one step" else list(last)

    def _output_constraint(self, samples: list[PromptSample], count: int) -> OutputConstraint | None:
        if not self.config.eps_constraint:
            return None
        denoiser, frozen = self.model.denoiser, self._frozen_guidance(samples, self._cfg)
        weights = self.config.eps_constraint * _weights(samples, denoiser.device)
        return OutputConstraint(denoiser, frozen, self._trainable.disabled, weights, count)

    def _parts(self, count: int) -> list[slice]:
        """A batch of `count` images in parts that have one graph each."""
        return [slice(start, start + self._images_at_once) for start in range(0, count, self._images_at_once)]

    def _end_gradient(self, latents: Tensor, prompts: list[str], draws: Tensor) -> tuple[CombinedScores, Tensor]:
        """The scores of decoded latents, and the gradient of their sum with respect to the latents."""
        parts = self._parts(len(latents))
        if self.reward.compares_images and len(parts) > 1:
            return self._compared_gradient(latents, prompts, draws)
        pairs = [self._decoded_gradient(latents[part], prompts[part], draws[part]) for part in parts]
        scores, gradients = zip(*pairs, strict=True)
        return CombinedScores.cat(scores), torch.cat(gradients)

    def _decoded_gradient(self, latents: Tensor, prompts: list[str], draws: Tensor) -> tuple[CombinedScores, Tensor]:
        """`_end_gradient` in one graph, in which the decoder's activations are recomputed."""
        leaf, images = self._pixels(latents)
        scores, at_images = self.reward.value_and_gradient(images, prompts, draws)
        (gradient,) = torch.autograd.grad(images, leaf, at_images.to(images))
        return scores, gradient

    def _compared_gradient(self, latents: Tensor, prompts: list[str], draws: Tensor) -> tuple[CombinedScores, Tensor]:
        """`_end_gradient` of rewards that compare images: all pictures are scored together, without the decoder's
        graph, then decoded again one by one."""
        parts = self._parts(len(latents))
        with torch.no_grad():
            images = torch.cat([self.model.autoencoder.pixels(latents[part]) for part in parts])
        scores, at_images = self.reward.value_and_gradient(images, prompts, draws)
        return scores, torch.cat([self._latent_gradient(latents[part], at_images[part]) for part in parts])

    def _latent_gradient(self, latents: Tensor, at_images: Tensor) -> Tensor:
        """The gradient at latents from that at their pictures."""
        leaf, images = self._pixels(latents)
        return torch.autograd.grad(images, leaf, at_images.to(images))[0]

    def _pixels(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The latents as a leaf, and their pictures with the graph from there, of which the blocks' inputs are kept."""
        autoencoder = self.model.autoencoder
        with torch.enable_grad(), recomputed(autoencoder.network):
            leaf = latents.detach().requires_grad_(True)
            return leaf, autoencoder.pixels(leaf)

    @property
    def _is_joint(self) -> bool:
        return not self.config.stop_gradient and self.config.method in ("last K", "random K")

    def _stepwise_gradients(
        self,
        chain: Chain,
        guidance: Guidance,
        at_end: Tensor,
        inputs: Sequence[Tensor],
        constraint: OutputConstraint | None,
    ) -> list[Tensor]:
        """Gradients of `inputs` step by step, stopped at the latent that the UNet reads. at_end: at the chain's end."""

        def constraint_gradient(number: int, images: slice, output: Tensor) -> Tensor:
            return constraint.gradient(chain.states[number], chain.steps[number], output, images)

        of_output, parts = constraint and constraint_gradient, self._parts(len(at_end))
        return stepwise_gradient(self.model.denoiser, *chain, guidance, at_end, inputs, of_output, self._pulse, parts)

    def _joint_gradients(
        self,
        chain: Chain,
        guidance: Guidance,
        at_end: Tensor,
        inputs: Sequence[Tensor],
        constraint: OutputConstraint | None,
    ) -> list[Tensor]:
        """Gradients of `inputs` through all of the last steps together, the latents that the UNet reads included; the
        constraint still treats the latents as given."""
        total: list[Tensor | None] = [None] * len(inputs)
        for part in self._parts(len(at_end)):
            total = add_gradients(total, self._joint_part(chain, guidance, at_end[part], inputs, part))
        gradients = zeros_for_none(inputs, total)
        if constraint is None:
            return gradients
        constrained = self._stepwise_gradients(chain, guidance, torch.zeros_like(at_end), inputs, constraint)
        return [gradient + other for gradient, other in zip(gradients, constrained, strict=True)]

    def _joint_part(
        self, chain: Chain, guidance: Guidance, at_end: Tensor, inputs: Sequence[Tensor], images: slice
    ) -> tuple[Tensor | None, ...]:
        """`_joint_gradients` of some of the batch's images, whose gradient at the end is `at_end`; None for zeros."""
        states, steps = [x[images] for x in chain.states], [step.images(images) for step in chain.steps]
        with torch.enable_grad():
            guidance, last = guidance.images(images), len(chain.chosen)
            end = joint_end(self.model.denoiser, states, steps, last, guidance, False, self._pulse)
            return torch.autograd.grad(end, inputs, at_end, allow_unused=True)

    def _guidance_now(self, samples: Sequence[PromptSample], cfg: float) -> Guidance:
        """Conditioning of prompts by the text encoder as it is now, with the empty prompt's in one batch."""
        if not self._text_trains:
            return self._frozen_guidance(samples, cfg)
        count, empty = len(samples), [] if cfg == 1.0 else [""]
        texts = self._encode(*(sample.prompt for sample in samples), *empty)
        return self._guidance(texts.prompts(slice(count)), texts.prompts(slice(count, None)) if empty else None, cfg)

    def _frozen_guidance(self, samples: Sequence[PromptSample], cfg: float) -> Guidance:
        """Conditioning of prompts by the frozen text encoder."""
        positive = Conditioning.cat(sample.positive for sample in samples)
        return self._guidance(positive, None if cfg == 1.0 else samples[0].negative, cfg)

    def _guidance(self, positive: Conditioning, negative: Conditioning | None, cfg: float) -> Guidance:
        device = self.model.denoiser.device
        empty = None if negative is None else Conditioning.cat([upload(negative, device)] * len(positive))
        return Guidance(upload(positive, device), empty, cfg)

    def _encode(self, *texts: str) -> Conditioning:
        encoder = self.model.text_encoder
        return encoder.encode(encoder.tokenize(list(texts)))

    def _noise(self, indices: list[int], step: int) -> Tensor:
        """(B, C, h, w), of sample i from generator (seed, "noise", step, i)."""
        shape, seed = (self.model.denoiser.latent_channels, *self._latent_size), self.config.seed
        noise = [torch.randn(shape, generator=generator(seed, "noise", step, i)) for i in indices]
        return upload(torch.stack(noise), self.model.denoiser.device)

    def _augmentation(self, indices: list[int], step: int) -> Tensor:
        """(B, 4) draws for the rewards: this process's rows of those of the whole batch."""
        size, first = self.config.batch_size, indices[0] // self.config.batch_size * self.config.batch_size
        random = generator(self.config.seed, "reward augmentation", step, first)
        return draw_augmentation(size, random)[[index - first for index in indices]]

    @property
    def _latent_size(self) -> tuple[int, int]:
        downscale = self.model.autoencoder.downscale
        return self.config.height // downscale, self.config.width // downscale

    def _observe_scores(self, step: int) -> None:
        """Counts the scores of an earlier step in the running scales."""
        if step != self._step:
            for scores in self._step_scores:
                self.reward.observe(dict(zip(self.reward.terms, scores, strict=True)))
            self._step, self._step_scores = step, []

    def observe(self, values: list[list[list[float]]]) -> None:
        """Keeps the raw scores of a step's batches, those of all processes, for `_observe_scores`.

        Raises ValueError for scores that are no finite numbers.
        """
        for of_processes in map(world().all_gather, values):
            for scores in of_processes:
                self.reward.expect_finite(dict(zip(self.reward.terms, scores, strict=True)))
            self._step_scores.extend(of_processes)

    def state(self) -> dict[str, Any]:
        """The running scales after all finished steps."""
        self._observe_scores(-1)
        return self.reward.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._step, self._step_scores = 0, []
        self.reward.load_state(state)

    @torch.no_grad()
    def validation(self, loaded: list[PromptSample]) -> float:
        """Minus the mean total over held-out prompts, each from its own fixed noise, in fixed scales; draws from no
        global random state."""
        denoiser, total = self.model.denoiser, 0.0
        for number, sample in enumerate(loaded):
            noise = initial_noise(denoiser, *self._latent_size, 0, number)[None].to(denoiser.device)
            guidance = self._guidance_now([sample], self.config.cfg)
            end = rollout(denoiser, first_latent(denoiser, noise, self.chain), self.chain, guidance, self._pulse)[-1]
            total -= self.reward.comparable(self.model.autoencoder.pixels(end), [sample.prompt]).item()
        return total / len(loaded)


def _weights(samples: Sequence[PromptSample], device: torch.device) -> Tensor:
    return upload(torch.tensor([sample.weight for sample in samples]), device)
