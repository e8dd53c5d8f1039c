"""Statistics of scores over prompts and seeds: means with their errors, win rates, diversity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def summarize_scores(scores: Tensor) -> dict[str, float | None]:
    """Mean and standard deviations of (P, S) scores of P prompts from S seeds.

    Returns:
        "mean"; "prompt_std", of the prompts' means; "seed_std", of the seeds' means. Both deviations have Bessel's
        correction, and are None for one prompt or one seed. seed_std is the error bar of a single seed's mean: how far
        another seed would move it on the same prompts.
    """
    scores = scores.double()
    return {"mean": scores.mean().item(), "prompt_std": _std(scores.mean(1)), "seed_std": _std(scores.mean(0))}


def compare_scores(tuned: Tensor, base: Tensor) -> dict[str, float | None]:
    """Compares two models by their (P, S) scores of the same prompts from the same noise.

    Returns:
        "gain", the mean of tuned - base; "win_rate", the share of pairs in which tuned scores higher, a tie counted as
        half; "gain_error" and "win_rate_error". The errors are standard errors over prompts,
        std(per-prompt mean) / sqrt(P), because pictures of one prompt are not independent; None for one prompt. For one
        seed without ties, the win rate's is the binomial one, sqrt(w (1 - w) / (P - 1)).

    Raises:
        ValueError: For scores of different shapes.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"scores are {tuple(tuned.shape)} and {tuple(base.shape)}; expected the same prompts x seeds.")
    difference = tuned.double() - base.double()
    wins = (difference > 0).double() + 0.5 * (difference == 0)
    return {
        "gain": difference.mean().item(),
        "gain_error": _error(difference.mean(1)),
        "win_rate": wins.mean().item(),
        "win_rate_error": _error(wins.mean(1)),
    }


def _std(values: Tensor) -> float | None:
    return values.std().item() if len(values) > 1 else None


def _error(values: Tensor) -> float | None:
    """Standard error of the mean."""
    return torch.std(values).item() / math.sqrt(len(values)) if len(values) > 1 else None


def summarize_diversity(vendi: Tensor, distance: Tensor, seeds: int) -> dict[str, float]:
    """How different the pictures of one prompt are, as means over prompts.

    Args:
        vendi: (P,) Vendi scores, 1 to `seeds`.
        distance: (P,) means of 1 - cosine over pairs.
        seeds: Pictures of each prompt.

    Returns:
        "vendi", "distance", and "spread", (vendi - 1) / (seeds - 1), 0 to 1.
    """
    mean = vendi.double().mean().item()
    return {"vendi": mean, "distance": distance.double().mean().item(), "spread": (mean - 1) / (seeds - 1)}
