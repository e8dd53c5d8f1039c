"""Noise levels at which a network was trained, and what it predicts, from the values of a diffusers scheduler.

Such values are the one description of both: of the scheduler in a diffusers folder, and of a single file, from whatever
says it there (`prediction.py`). Three kinds of noise levels are known: those of a discrete beta schedule, the
continuous ones of EDM (Karras et al. 2022, arXiv 2206.00364) with v prediction, and those of flow matching.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.foreign import finite_number, short, whole_number

SD1_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}
"""diffusers' name -> `Denoiser.prediction_type`."""
ZERO_TERMINAL_ALPHA = 4.8973451890853435e-08
"""alphas_cumprod of the last timestep, in place of zero (an infinite sigma); as in comfy/model_sampling.py."""
ALREADY_ZERO = 1e-6
"""Noise levels whose last alphas_cumprod is below this have zero terminal SNR already."""
EDM_LEVELS = 1000
"""Noise levels that stand for the continuous ones, as many as in ComfyUI."""
EDM_RANGE = (0.002, 120.0)
"""sigma_min and sigma_max where a scheduler or file gives none, as in diffusers and ComfyUI."""
MOST_TIMESTEPS = 100_000
OWN_SIGMAS = (
    "the model has the noise levels of flow matching or of EDM; expected those of a discrete schedule for zero "
    "terminal SNR. Turn zero_terminal_snr off."
)


def prediction_type_of(scheduler: Mapping) -> str:
    """ "eps", "v" or "flow". Raises ValueError for a scheduler of another prediction."""
    if is_flow(scheduler):
        return "flow"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type is {short(prediction)}; expected one of {', '.join(PREDICTIONS)}.")
    if is_edm(scheduler) and (prediction != "v_prediction" or scheduler.get("sigma_data", 1.0) != 1.0):
        raise ValueError(
            f"the scheduler has EDM's noise levels with prediction_type {short(prediction)} and sigma_data "
            f"{short(scheduler.get('sigma_data', 1.0))}; expected v_prediction and 1. Models that are trained as EDM "
            "describes it, such as Playground v2.5, do not train here: use one of eps or v prediction."
        )
    return PREDICTIONS[prediction]


def is_flow(scheduler: Mapping) -> bool:
    """Whether a scheduler is one of flow matching, x = (1 - sigma) latent + sigma noise."""
    flow = scheduler.get("prediction_type") == "flow_prediction" or scheduler.get("use_flow_sigmas")
    return bool(flow) or str(scheduler.get("_class_name", "")).startswith("FlowMatch")


def is_edm(scheduler: Mapping) -> bool:
    """Whether a scheduler's noise levels are continuous, with log(sigma) / 4 for the time that the network reads."""
    return str(scheduler.get("_class_name", "")).startswith("EDM")


def training_sigmas(scheduler: Mapping) -> Tensor:
    """(T,) training noise levels, ascending, fp32.

    Of a discrete beta schedule sqrt((1 - alphas_cumprod) / alphas_cumprod), rescaled to zero terminal SNR where the
    scheduler is; of EDM's 1000 levels evenly spaced in log(sigma), and of flow matching the shifted t / T.

    Raises:
        ValueError: A schedule other than these, listed betas, or values that are no such numbers.
    """
    if is_flow(scheduler):
        return _flow_sigmas(scheduler)
    if is_edm(scheduler):
        return _edm_sigmas(scheduler)
    if scheduler.get("trained_betas"):
        raise ValueError("scheduler's trained_betas is set; expected a plain beta schedule. Its noise levels differ.")
    alphas_cumprod = torch.cumprod(1 - _betas(scheduler), dim=0)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()
    return zero_terminal_sigmas(sigmas) if scheduler.get("rescale_betas_zero_snr") else sigmas


def _betas(scheduler: Mapping) -> Tensor:
    """(T,) in fp64."""
    start, end = (_beta(scheduler, name) for name in ("beta_start", "beta_end"))
    count = _timesteps(scheduler)
    kind = scheduler.get("beta_schedule", "scaled_linear")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    raise ValueError(f"beta_schedule is {short(kind)}; expected 'scaled_linear' or 'linear'.")


def _beta(scheduler: Mapping, name: str) -> float:
    if name not in scheduler:
        raise ValueError(
            f"the scheduler has no {name} and is {short(scheduler.get('_class_name', 'of no name'))}; expected one of "
            "a beta schedule (DDIM, DDPM, Euler and the like), of flow matching or of EDM. Save the model with one."
        )
    value = finite_number(scheduler[name], f"the scheduler's {name}")
    if not 0 < value < 1:
        raise ValueError(f"the scheduler's {name} is {value}; expected a number between 0 and 1.")
    return value


def _timesteps(scheduler: Mapping) -> int:
    return whole_number(scheduler.get("num_train_timesteps", 1000), "num_train_timesteps", 2, MOST_TIMESTEPS)


def _positive(value: Any, what: str) -> float:
    number = finite_number(value, f"the scheduler's {what}")
    if number <= 0:
        raise ValueError(f"the scheduler's {what} is {number}; expected more than 0.")
    return number


def _edm_sigmas(scheduler: Mapping) -> Tensor:
    """As comfy/model_sampling.py's ModelSamplingContinuousEDM."""
    names = ("sigma_min", "sigma_max")
    low, high = (_positive(scheduler.get(*pair), pair[0]) for pair in zip(names, EDM_RANGE, strict=True))
    if low >= high:
        raise ValueError(f"the scheduler's sigma_min is {low:g} and sigma_max {high:g}; expected a range.")
    return torch.linspace(math.log(low), math.log(high), EDM_LEVELS).exp()


def _flow_sigmas(scheduler: Mapping) -> Tensor:
    """shift t / (1 + (shift - 1) t) for t = 1/T ... 1 (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    if scheduler.get("use_dynamic_shifting"):
        raise ValueError(
            "the scheduler's use_dynamic_shifting is on; expected a fixed shift. Set it to false, with the shift that "
            "the model is sampled with."
        )
    shift = _positive(scheduler.get("shift", scheduler.get("flow_shift", 1.0)), "shift")
    count = _timesteps(scheduler)
    t = torch.arange(1, count + 1, 1) / count
    return shift * t / (1 + (shift - 1) * t)


def zero_terminal_sigmas(sigmas: Tensor) -> Tensor:
    """(T,) ascending noise levels of an eps or v model, rescaled so that the last timestep is pure noise, fp32.

    Lin et al. 2024 (arXiv 2305.08891), algorithm 1: sqrt(alphas_cumprod) is shifted to end at zero and scaled to
    begin where it did. The last level is finite as in ComfyUI (`rescale_zero_terminal_snr_sigmas`), so that training
    and ComfyUI's ModelSamplingDiscrete with zsnr agree. Levels that are rescaled already are returned unchanged.
    """
    sqrt_alphas_cumprod = (1 / (sigmas.double() ** 2 + 1)).sqrt()
    first, last = sqrt_alphas_cumprod[0].clone(), sqrt_alphas_cumprod[-1].clone()
    if last**2 < ALREADY_ZERO:
        return sigmas
    alphas_cumprod = ((sqrt_alphas_cumprod - last) * (first / (first - last))) ** 2
    alphas_cumprod[-1] = ZERO_TERMINAL_ALPHA
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()


def has_zero_terminal_snr(sigmas: Tensor) -> bool:
    """Whether the last of (T,) ascending noise levels of an eps or v model is pure noise."""
    return 1 / (sigmas[-1].double() ** 2 + 1) < ALREADY_ZERO


def is_log_spaced(sigmas: Tensor) -> bool:
    """Whether (T,) noise levels are evenly spaced in log(sigma), as the continuous ones of EDM are here and in
    ComfyUI."""
    steps = sigmas.double().log().diff()
    return bool(torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-3))
