"""What is minimised: the denoising objective, with the weightings the field uses."""

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

    def state(self) -> dict[str, Any]:
        """What it remembers from step to step, as JSON; empty where it remembers nothing."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


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


HUBER = ("huber", "pseudo-huber", "smooth-l1")
"""Losses with a knee."""


def check_objective(settings: TrainingSettings, prediction_type: str) -> None:
    """Raises ValueError for a weighting, schedule or noise level that a model of this prediction type cannot have."""
    one = torch.ones(1)
    snr_weight(one, settings, prediction_type)
    if settings.loss in HUBER:
        huber_knee(one, one, settings, prediction_type)
    if settings.zero_terminal_snr and prediction_type != "v":
        raise ValueError(
            f"zero_terminal_snr is on for a model of {prediction_type} prediction; expected v prediction (arXiv "
            "2305.08891). Switch it off: an eps model learns nothing at pure noise, a flow model ends there anyway."
        )


def huber_knee(sigma: Tensor, time: Tensor, settings: TrainingSettings, prediction_type: str) -> Tensor:
    """Knee of the Huber losses per noise level, (B,) float64; time: training timesteps as a share of their number.

    sd-scripts' schedules (`get_huber_threshold_if_needed` in library/train_util.py), with c = huber_c: constant: c;
    exponential: c^time; snr: (1 - c) / (1 + sigma)^2 + c. ValueError for snr on a flow model.
    """
    knee, sigma = settings.huber_c, sigma.double()
    if settings.huber_schedule == "exponential":
        return knee ** time.double()
    if settings.huber_schedule == "snr":
        if prediction_type == "flow":
            raise ValueError(
                "huber_schedule is 'snr' on a flow model; expected 'constant' or 'exponential'. Its formula is for the "
                "noise levels of eps and v models."
            )
        return (1 - knee) / (1 + sigma) ** 2 + knee
    return torch.full_like(sigma, knee)


def distance(
    prediction: Tensor, target: Tensor, kind: str, knee: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Error of each sample, (B,) fp32: the mean over everything but the batch.

    kind: "mse" d^2; "l1" |d|; "huber" d^2 / 2c up to |d| = c, then |d| - c / 2; "pseudo-huber" 2c (sqrt(d^2 + c^2) - c)
    and "smooth-l1" 2 (sqrt(d^2 + c^2) - c), which sd-scripts calls huber and smooth_l1 (`conditional_loss` in
    library/train_util.py). knee: c per sample, (B,), 0.1 without it. weights: (B, 1, h, w) factors of the cells.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "mse":
        error = (prediction - target) ** 2
    elif kind == "l1":
        error = (prediction - target).abs()
    else:
        knee = torch.full((len(target),), 0.1, dtype=torch.float64) if knee is None else knee
        error = _huber(prediction, target, kind, knee)
    if weights is not None:
        error = error * weights
    return error.flatten(1).mean(1)


def _huber(prediction: Tensor, target: Tensor, kind: str, knee: Tensor) -> Tensor:
    if kind == "huber":
        function = torch.nn.functional.huber_loss
        pairs = zip(prediction, target, knee.tolist(), strict=True)
        return torch.stack([function(a, b, reduction="none", delta=c) / c for a, b, c in pairs])
    knee = knee.to(target).view(-1, *[1] * (target.ndim - 1))
    error = 2 * (((prediction - target) ** 2 + knee**2).sqrt() - knee)
    return knee * error if kind == "pseudo-huber" else error


def mask_weights(masks: Sequence[Tensor | None], settings: TrainingSettings, shape: torch.Size) -> Tensor | None:
    """(B, 1, h, w) factors of a batch's errors, or None when no sample has a mask.

    masks: (1, h, w) in 0..1, 1 where the image counts; None counts whole. Values below mask_weight are raised to it
    and, with mask_normalize, divided by their mean: `masked_losses` of OneTrainer (modules/util/loss/masked_loss.py),
    its unmasked_weight (default 0.1) and normalize_masked_area_loss.
    """
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(1, *shape[-2:])
    weights = torch.stack([whole if mask is None else mask for mask in masks]).clamp(settings.mask_weight, 1)
    if settings.mask_normalize:
        weights = weights / weights.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return weights


class TrainingSample(NamedTuple):
    """A sample as the objective works on it."""

    caption: str
    latent: Tensor
    """(C, h, w)."""
    mask: Tensor | None = None
    """(1, h, w) in 0..1, 1 where the image counts; None: all of it."""
    weight: float = 1.0
    """Factor of its loss."""
    text: Conditioning | None = None
    """The caption encoded, where it may be shown only this once; None: `text_of` knows it."""


class DenoisingObjective:
    """Objective: predict eps, v or the flow at a drawn noise level, from the latent and its caption.

    latent_of(slot) -> (C, h, w); text_of(caption) -> Conditioning before the projection, batch 1; project maps a batch
    of those to what the denoiser listens to. mask_of(slot) -> (1, h, w) or None. varied_text_of: text_of for captions
    that may never be shown again, or None where it leaves them to text_of. caption_of(caption, number, index): what an
    image is shown with at a place of batch `number`, 0 outside of training; its own caption without it. All draws of
    sample `index` in a step come from generators named by it. pulse: called for each image that is loaded or looked at;
    it may raise.
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
        return [self._shown(slot) for slot in slots]

    def _shown(self, slot: Any) -> TrainingSample:
        self.pulse()
        example, text = slot.example, None
        caption = self.caption_of(example.caption, slot.number, slot.index)
        if self.settings.varies_captions and slot.number:
            caption = self._varied(caption, slot.number, slot.index)
            text = self.varied_text_of(caption)
        return TrainingSample(caption, self.latent_of(slot), self.mask_of(slot), example.weight, text)

    def _varied(self, caption: str, number: int, index: int) -> str:
        """The caption as batch `number` shows it at place `index`."""
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
        shown = [TrainingSample(*one) for _, one in batch]
        latents = torch.stack([one.latent for one in shown]).to(self.denoiser.device)
        total = len(self.denoiser.sigmas)
        times = [draw_timestep(self.settings, total, generator(self.seed, "timestep", step, i)) for i in indices]
        texts = [self._text(one, step, i) for i, one in zip(indices, shown, strict=True)]
        conditioning = self.project(Conditioning.cat(texts).to(self.denoiser.device), torch.tensor(times) / (total - 1))
        noise = torch.stack([self._noise(latents.shape[1:], step, i) for i in indices]).to(latents)
        masks = mask_weights([one.mask for one in shown], self.settings, latents.shape)
        error = self._error(latents, noise, torch.tensor(times), conditioning, step, indices, masks)
        return Loss(error * torch.tensor([one.weight for one in shown]).to(error))

    def _text(self, shown: TrainingSample, step: int, index: int) -> Conditioning:
        caption = self._caption(shown.caption, step, index)
        return self.text_of(caption) if shown.text is None or caption != shown.caption else shown.text

    def _caption(self, caption: str, step: int, index: int) -> str:
        drop = torch.rand((), generator=generator(self.seed, "caption dropout", step, index)).item()
        return "" if drop < self.settings.caption_dropout else caption

    def _noise(self, shape: torch.Size, step: int, index: int) -> Tensor:
        return draw_noise(shape, self.settings, generator(self.seed, "noise", step, index))

    def _error(self, latents, noise, times, conditioning, step, indices, masks) -> Tensor:
        settings, kind = self.settings, self.denoiser.prediction_type
        levels = self.denoiser.sigmas[times]
        sigma, entering = levels.to(latents), noise
        if settings.input_perturbation:
            extra = [torch.randn(noise.shape[1:], generator=generator(self.seed, "perturb", step, i)) for i in indices]
            entering = noise + settings.input_perturbation * torch.stack(extra).to(noise)
        noisy = self.denoiser.add_noise(latents, entering, sigma)
        prediction = self.denoiser.predict(noisy, sigma, conditioning)
        share = times / len(self.denoiser.sigmas)
        knee = huber_knee(levels, share, settings, kind) if settings.loss in HUBER else None
        target = self.denoiser.target(latents, noise, sigma)
        error = distance(prediction, target, settings.loss, knee, None if masks is None else masks.to(sigma.device))
        return error * snr_weight(sigma, settings, kind)

    @torch.no_grad()
    def validation(self, loaded: list[TrainingSample], levels: int = 4) -> float:
        """Unweighted loss over fixed noise at `levels` inner timesteps (kohya's recipe); touches no random state.

        Masks count as in training; the samples' weights do not.
        """
        total, losses = len(self.denoiser.sigmas), []
        inner = torch.linspace(0, total - 1, levels + 2)[1:-1].round().long()
        for index, (caption, one, *more) in enumerate(loaded):
            self.pulse()
            latent = one[None].to(self.denoiser.device).expand(levels, -1, -1, -1)
            text = self.text_of(caption).to(self.denoiser.device)
            conditioning = self.project(Conditioning.cat([text] * levels), inner / (total - 1))
            shape = latent.shape[1:]
            noise = [torch.randn(shape, generator=generator(0, "validation", index, i)) for i in range(levels)]
            noise = torch.stack(noise).to(latent)
            sigma = self.denoiser.sigmas[inner].to(latent)
            prediction = self.denoiser.predict(self.denoiser.add_noise(latent, noise, sigma), sigma, conditioning)
            target = self.denoiser.target(latent, noise, sigma)
            losses.append(self.squared_error(prediction, target, *more[:1]).mean().item())
        return sum(losses) / len(losses)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def squared_error(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,) plain squared errors of one image at several noise levels, within its mask if it has one."""
        weights = mask_weights([mask], self.settings, target.shape)
        return distance(prediction, target, "mse", weights=None if weights is None else weights.to(target.device))
