"""Noise levels of zero terminal SNR (arXiv 2305.08891)."""

from __future__ import annotations

from torch import Tensor

ZERO_TERMINAL_ALPHA = 4.8973451890853435e-08
"""alphas_cumprod of the last timestep, in place of zero (an infinite sigma); as in comfy/model_sampling.py."""
ALREADY_ZERO = 1e-6
"""Noise levels whose last alphas_cumprod is below this have zero terminal SNR already."""


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
