"""The denoising objective with its loss weightings, distances and masks; and the protocol of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..common.rng import generator
from ..config.training_settings import TrainingSettings
from ..data.captions import vary_tags
from ..models.protocols import Conditioning, Denoiser
from .noise import draw_noise, draw_timestep


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes:
        per_sample: (B,) differentiable, already weighted.
        parts: further figures to log, as plain numbers.
    """

    per_sample: Tensor
    parts: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss to minimise."""

    def load(self, slots: list) -> list:
        """Reads and encodes the data of slots. The trained weights are not attached, so models may move here."""
        ...

    def __call__(self, batch: list[tuple[int, Any]], step: int) -> Loss:
        """The loss of (index, loaded slot) pairs, where index numbers the sample within optimizer step `step`."""
        ...

    def validation(self, loaded: list) -> float:
        """The loss of loaded held-out slots; draws from no global random state."""
        ...

    def state(self) -> dict[str, Any]:
        """State that one step passes to the next, as JSON; empty where there is none."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        ...


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


HUBER_LOSSES = ("huber", "pseudo-huber", "smooth-l1")
"""Losses that have a threshold between their quadratic and their linear part."""


def check_objective(settings: TrainingSettings, prediction_type: str) -> None:
    """Raises ValueError for a weighting, schedule or noise level that a model of this prediction type cannot have."""
    ones = torch.ones(1)
    snr_weight(ones, settings, prediction_type)
    if settings.loss in HUBER_LOSSES:
        huber_threshold(ones, ones, settings, prediction_type)
    if settings.zero_terminal_snr and prediction_type != "v":
        raise ValueError(
            f"zero_terminal_snr is on for a model of {prediction_type} prediction; expected v prediction (arXiv "
            "2305.08891). Switch it off: an eps model learns nothing at pure noise, a flow model ends there anyway."
        )


def huber_threshold(sigma: Tensor, time: Tensor, settings: TrainingSettings, prediction_type: str) -> Tensor:
    """Threshold of the Huber losses for each sample, by sd-scripts' schedules.

    With c = huber_c (`get_huber_threshold_if_needed` in sd-scripts' library/train_util.py):

        constant     c
        exponential  c^time
        snr          (1 - c) / (1 + sigma)^2 + c

    Args:
        sigma: (B,) noise levels.
        time: (B,) training timesteps as a share of their number.
        settings: schedule and c.
        prediction_type: the model's.

    Returns:
        (B,) float64.

    Raises:
        ValueError: schedule snr on a flow model.
    """
    threshold, sigma = settings.huber_c, sigma.double()
    if settings.huber_schedule == "exponential":
        return threshold ** time.double()
    if settings.huber_schedule == "snr":
        if prediction_type == "flow":
            raise ValueError(
                "huber_schedule is 'snr' on a flow model; expected 'constant' or 'exponential'. Its formula is for the "
                "noise levels of eps and v models."
            )
        return (1 - threshold) / (1 + sigma) ** 2 + threshold
    return torch.full_like(sigma, threshold)


def distance(
    prediction: Tensor, target: Tensor, kind: str, threshold: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Error of each sample: the mean over everything but the batch.

    With d = prediction - target and threshold c:

        mse           d^2
        l1            |d|
        huber         d^2 / 2c up to |d| = c, then |d| - c / 2
        pseudo-huber  2c (sqrt(d^2 + c^2) - c), sd-scripts' huber
        smooth-l1     2 (sqrt(d^2 + c^2) - c), sd-scripts' smooth_l1

    sd-scripts': `conditional_loss` in library/train_util.py.

    Args:
        prediction: (B, ...).
        target: (B, ...).
        kind: name of the loss.
        threshold: (B,) c of each sample; 0.1 without it.
        weights: (B, 1, h, w) factors of the cells.

    Returns:
        (B,) fp32.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "mse":
        error = (prediction - target) ** 2
    elif kind == "l1":
        error = (prediction - target).abs()
    else:
        default = torch.full((len(target),), 0.1, dtype=torch.float64)
        error = _huber(prediction, target, kind, default if threshold is None else threshold)
    if weights is not None:
        error = error * weights
    return error.flatten(1).mean(1)


def _huber(prediction: Tensor, target: Tensor, kind: str, threshold: Tensor) -> Tensor:
    """Element-wise Huber losses; threshold: (B,)."""
    if kind == "huber":
        function = torch.nn.functional.huber_loss
        pairs = zip(prediction, target, threshold.tolist(), strict=True)
        return torch.stack([function(a, b, reduction="none", delta=c) / c for a, b, c in pairs])
    c = threshold.to(target).view(-1, *[1] * (target.ndim - 1))
    error = 2 * (((prediction - target) ** 2 + c**2).sqrt() - c)
    return c * error if kind == "pseudo-huber" else error


def mask_weights(masks: Sequence[Tensor | None], settings: TrainingSettings, shape: torch.Size) -> Tensor | None:
    """Factors of a batch's errors from its masks, or None when no sample has one.

    Mask values below mask_weight are raised to it and, with mask_normalize, divided by their mean: `masked_losses` of
    OneTrainer (modules/util/loss/masked_loss.py), its unmasked_weight (default 0.1) and normalize_masked_area_loss.

    Args:
        masks: (1, h, w) in 0..1 for each sample, 1 where the image counts; None counts everywhere.
        settings: mask_weight and mask_normalize.
        shape: of the latents, (..., h, w).

    Returns:
        (B, 1, h, w).
    """
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(1, *shape[-2:])
    weights = torch.stack([whole if mask is None else mask for mask in masks]).clamp(settings.mask_weight, 1)
    if settings.mask_normalize:
        weights = weights / weights.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return weights


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
        project: (batch of those, training time 0..1) -> the denoiser's conditioning.
        mask_of: slot -> (1, h, w) or None.
        varied_text_of: `text_of` for captions that may come only once, or None to leave them to `text_of`.
        caption_of: (caption, batch number, place in it) -> the caption to train with; number 0 is outside of training.
            Without it an image has its own caption.
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
        project: Callable[[Conditioning, Tensor], Conditioning],
        mask_of: Callable[[Any], Tensor | None] = lambda slot: None,
        varied_text_of: Callable[[str], Conditioning | None] | None = None,
        caption_of: Callable[[str, int, int], str] | None = None,
        pulse: Callable[[], None] = lambda: None,
    ):
        self.denoiser, self.settings, self.seed = denoiser, settings, seed
        self.latent_of, self.text_of, self.project, self.mask_of = latent_of, text_of, project, mask_of
        self.varied_text_of = varied_text_of or text_of
        self.caption_of = caption_of or (lambda caption, number, index: caption)
        self.pulse = pulse

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
        )

    def __call__(self, batch: list[tuple[int, TrainingSample]], step: int) -> Loss:
        indices = [index for index, _ in batch]
        samples = [TrainingSample(*sample) for _, sample in batch]
        latents = torch.stack([sample.latent for sample in samples]).to(self.denoiser.device)
        total = len(self.denoiser.sigmas)
        times = [draw_timestep(self.settings, total, generator(self.seed, "timestep", step, i)) for i in indices]
        texts = [self._text(sample, step, i) for i, sample in zip(indices, samples, strict=True)]
        conditioning = self.project(Conditioning.cat(texts).to(self.denoiser.device), torch.tensor(times) / (total - 1))
        noise = torch.stack([self._noise(latents.shape[1:], step, i) for i in indices]).to(latents)
        masks = mask_weights([sample.mask for sample in samples], self.settings, latents.shape)
        error = self._error(latents, noise, torch.tensor(times), conditioning, step, indices, masks)
        return Loss(error * torch.tensor([sample.weight for sample in samples]).to(error))

    def _text(self, sample: TrainingSample, step: int, index: int) -> Conditioning:
        caption = self._drop_caption(sample.caption, step, index)
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
        sigma, input_noise = levels.to(latents), noise
        if settings.input_perturbation:
            extra = [torch.randn(noise.shape[1:], generator=generator(self.seed, "perturb", step, i)) for i in indices]
            input_noise = noise + settings.input_perturbation * torch.stack(extra).to(noise)
        noisy = self.denoiser.add_noise(latents, input_noise, sigma)
        prediction = self.denoiser.predict(noisy, sigma, conditioning)
        threshold = None
        if settings.loss in HUBER_LOSSES:
            threshold = huber_threshold(levels, times / len(self.denoiser.sigmas), settings, prediction_type)
        target, weights = self.denoiser.target(latents, noise, sigma), None if masks is None else masks.to(sigma.device)
        error = distance(prediction, target, settings.loss, threshold, weights)
        return error * snr_weight(sigma, settings, prediction_type)

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
