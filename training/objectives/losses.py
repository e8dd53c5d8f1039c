"""Losses of a prediction: distances, weightings by noise level, and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.transfer import upload
from ..config.training_settings import TrainingSettings

HUBER_LOSSES = ("huber", "pseudo-huber", "smooth-l1")
"""Losses that have a threshold between their quadratic and their linear part."""


def snr_weight(sigma: Tensor, settings: TrainingSettings, prediction_type: str) -> Tensor:
    """Loss weight per noise level, with SNR = 1 / sigma^2 for eps and v models. sigma: (B,) on the CPU, for float64.

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
        sigma: (B,) noise levels, on the CPU.
        time: (B,) training timesteps as a share of their number, on the CPU.
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
        threshold: (B,) c of each sample, on the CPU; 0.1 without it.
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
    c = upload(threshold.to(target.dtype), target.device).view(-1, *[1] * (target.ndim - 1))
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
