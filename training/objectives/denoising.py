"""The denoising objective: predict eps, v or the flow from a noised latent and its caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.rng import generator
from ..common.transfer import upload, upload_as
from ..config.training_settings import TrainingSettings
from ..data.captions import vary_tags
from ..models.protocols import Conditioning, Denoiser
from .losses import HUBER_LOSSES, distance, huber_threshold, mask_weights, snr_weight
from .noise import draw_noise, draw_timestep
from .objective import Loss
from .rehearsal import encoded, rehearsed_gradients


class TrainingSample(NamedTuple):
    """An image and its caption, loaded."""

    caption: str
    latent: Tensor
    """(C, h, w)."""
    mask: Tensor | None = None
    """(1, h, w) in 0..1, 1 where the image counts; None: everywhere."""
    weight: float = 1.0
    """Factor of its loss."""
    text: Conditioning | None = None
    """The caption encoded, for a caption that may come only once; None: `text_of` encodes it."""


class DenoisingObjective:
    """Objective: predict eps, v or the flow at a drawn noise level, from the noised latent and its caption.

    All draws of sample `index` in a step come from generators named by step and index.

    Args:
        denoiser: predicts.
        settings: loss, weighting, noise, caption dropout.
        seed: of all draws.
        latent_of: slot -> (C, h, w).
        text_of: caption -> conditioning before the projection, batch 1.
        texts_of: captions -> `text_of` of all of them as one batch, for a text encoder that trains; None: one by one.
        project: (batch of those, training time 0..1) -> the denoiser's conditioning.
        mask_of: slot -> (1, h, w) or None.
        varied_text_of: `text_of` for captions that may come only once, or None to leave them to `text_of`.
        caption_of: (caption, batch number, place in it) -> the caption to train with; number 0 is outside of training.
            Without it an image has its own caption.
        stays: whether tag dropout keeps a tag.
        pulse: called for each image that is loaded or validated; it may raise to cancel.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: TrainingSettings,
        seed: int,
        *,
        latent_of: Callable,
        text_of: Callable[[str], Conditioning],
        texts_of: Callable[[list[str]], Conditioning] | None = None,
        project: Callable[[Conditioning, Tensor], Conditioning],
        mask_of: Callable[[Any], Tensor | None] = lambda slot: None,
        varied_text_of: Callable[[str], Conditioning | None] | None = None,
        caption_of: Callable[[str, int, int], str] | None = None,
        stays: Callable[[str], bool] = lambda tag: False,
        pulse: Callable[[], None] = lambda: None,
    ):
        self.denoiser, self.settings, self.seed = denoiser, settings, seed
        self.latent_of, self.text_of, self.project, self.mask_of = latent_of, text_of, project, mask_of
        self.texts_of, self.varied_text_of = texts_of, varied_text_of or text_of
        self.caption_of = caption_of or (lambda caption, number, index: caption)
        self.stays, self.pulse = stays, pulse

    def load(self, slots: list) -> list[TrainingSample]:
        """Latents, masks and captions; captions that vary are drawn and encoded here, while models may still move."""
        return [self._load(slot) for slot in slots]

    def _load(self, slot: Any) -> TrainingSample:
        self.pulse()
        example, text = slot.example, None
        caption = self.caption_of(example.caption, slot.number, slot.index)
        if self.settings.varies_captions and slot.number:
            caption = self._vary(caption, slot.number, slot.index)
            text = self.varied_text_of(caption)
        return TrainingSample(caption, self.latent_of(slot), self.mask_of(slot), example.weight, text)

    def _vary(self, caption: str, number: int, index: int) -> str:
        """The caption with its tags shuffled and dropped, for place `index` of batch `number`."""
        settings = self.settings
        return vary_tags(
            caption,
            keep=settings.keep_tokens,
            shuffle=generator(self.seed, "caption shuffle", number, index) if settings.caption_shuffle else None,
            dropout=settings.tag_dropout,
            random=generator(self.seed, "tag dropout", number, index),
            stays=self.stays,
        )

    def __call__(self, batch: list[tuple[int, TrainingSample]], step: int) -> Loss:
        indices = [index for index, _ in batch]
        samples = [TrainingSample(*sample) for _, sample in batch]
        device, total = self.denoiser.device, len(self.denoiser.sigmas)
        latents = upload(torch.stack([sample.latent for sample in samples]), device)
        times = [draw_timestep(self.settings, total, generator(self.seed, "timestep", step, i)) for i in indices]
        texts = upload(self._texts(samples, step, indices), device)
        conditioning = self.project(texts, torch.tensor(times) / (total - 1))
        noise = upload_as(torch.stack([self._noise(latents.shape[1:], step, i) for i in indices]), latents)
        masks = mask_weights([sample.mask for sample in samples], self.settings, latents.shape)
        error = self._error(latents, noise, torch.tensor(times), conditioning, step, indices, masks)
        return Loss(error * upload_as(torch.tensor([sample.weight for sample in samples]), error))

    def _texts(self, samples: Sequence[TrainingSample], step: int, indices: Sequence[int]) -> Conditioning:
        """The captions' conditioning before the projection, after caption dropout."""
        captions = [self._drop_caption(s.caption, step, index) for index, s in zip(indices, samples, strict=True)]
        if self.texts_of is not None:
            return self.texts_of(captions)
        return Conditioning.cat(self._text(sample, c) for sample, c in zip(samples, captions, strict=True))

    def _text(self, sample: TrainingSample, caption: str) -> Conditioning:
        return self.text_of(caption) if sample.text is None or caption != sample.caption else sample.text

    def _drop_caption(self, caption: str, step: int, index: int) -> str:
        """The caption, or "" with probability caption_dropout."""
        drop = torch.rand((), generator=generator(self.seed, "caption dropout", step, index)).item()
        return "" if drop < self.settings.caption_dropout else caption

    def _noise(self, shape: torch.Size, step: int, index: int) -> Tensor:
        return draw_noise(shape, self.settings, generator(self.seed, "noise", step, index))

    def _error(
        self,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        step: int,
        indices: Sequence[int],
        masks: Tensor | None,
    ) -> Tensor:
        """(B,) weighted errors at training timesteps `times`."""
        settings, prediction_type = self.settings, self.denoiser.prediction_type
        levels = self.denoiser.sigmas[times]
        sigma, input_noise = upload_as(levels, latents), noise
        if settings.input_perturbation:
            extra = [torch.randn(noise.shape[1:], generator=generator(self.seed, "perturb", step, i)) for i in indices]
            input_noise = noise + settings.input_perturbation * upload_as(torch.stack(extra), noise)
        noisy = self.denoiser.add_noise(latents, input_noise, sigma)
        prediction = self.denoiser.predict(noisy, sigma, conditioning)
        threshold = None
        if settings.loss in HUBER_LOSSES:
            threshold = huber_threshold(levels, times / len(self.denoiser.sigmas), settings, prediction_type)
        target, weights = (
            self.denoiser.target(latents, noise, sigma),
            None if masks is None else upload(masks, sigma.device),
        )
        error = distance(prediction, target, settings.loss, threshold, weights)
        return error * upload_as(snr_weight(levels, settings, prediction_type), error)

    def rehearsal(self, sample: Any, count: int, parameters: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
        sample = TrainingSample(*sample)
        text, held = encoded(lambda: sample.text or self.text_of(sample.caption))
        return {"activations": lambda: self._rehearse(sample.latent, text, held, count, parameters)}

    def _rehearse(
        self, latent: Tensor, text: Conditioning, held: int, count: int, parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradient of a batch of copies of a sample, by the squared error; held: bytes of a prompt's graph."""
        denoiser = self.denoiser
        graph = torch.empty(held * count, dtype=torch.uint8, device=denoiser.device)
        states = Conditioning.cat([text] * count).to(denoiser.device)
        states = replace(states, context=states.context.detach().requires_grad_(held > 0))
        latents = torch.zeros(count, *latent.shape, device=denoiser.device)
        times, noise = torch.zeros(count, dtype=torch.long), torch.zeros_like(latents)
        sigma = denoiser.sigmas[times].to(latents)
        noisy = denoiser.add_noise(latents, noise, sigma)
        prediction = denoiser.predict(noisy, sigma, self.project(states, times / 1.0))
        error = distance(prediction, denoiser.target(latents, noise, sigma), "mse")
        return rehearsed_gradients(error.sum(), [states.context] if held else [], parameters, graph)

    @torch.no_grad()
    def validation(self, loaded: list[TrainingSample], levels: int = 4) -> float:
        """Mean unweighted loss over fixed noise at `levels` inner timesteps (kohya's recipe); draws no global state.

        Masks count as in training; the samples' weights do not.
        """
        inner = torch.linspace(0, len(self.denoiser.sigmas) - 1, levels + 2)[1:-1].round().long()
        losses = []
        for index, (caption, latent, *mask) in enumerate(loaded):
            noise = [torch.randn(latent.shape, generator=generator(0, "validation", index, i)) for i in range(levels)]
            losses.append(self.squared_errors(caption, latent, inner, torch.stack(noise), *mask[:1]).mean().item())
        return sum(losses) / len(losses)

    def squared_errors(
        self, caption: str, latent: Tensor, times: Tensor, noise: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Plain squared errors of one image at given noise, without any loss weighting.

        Args:
            caption: to denoise with.
            latent: (C, h, w).
            times: (L,) training timesteps.
            noise: (L, C, h, w).
            mask: (1, h, w) in 0..1, or None.

        Returns:
            (L,) means over the image.
        """
        self.pulse()
        denoiser, levels = self.denoiser, len(times)
        latents = latent[None].to(denoiser.device).expand(levels, -1, -1, -1)
        states = Conditioning.cat([self.text_of(caption).to(denoiser.device)] * levels)
        conditioning = self.project(states, times / (len(denoiser.sigmas) - 1))
        noise, sigma = noise.to(latents), denoiser.sigmas[times].to(latents)
        prediction = denoiser.predict(denoiser.add_noise(latents, noise, sigma), sigma, conditioning)
        target, weights = denoiser.target(latents, noise, sigma), mask_weights([mask], self.settings, latents.shape)
        return distance(prediction, target, "mse", weights=None if weights is None else weights.to(target.device))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass
