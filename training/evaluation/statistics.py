"""Figures of scores over a set of prompts and several seeds: means with their errors, win rates, what is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def summarize_scores(scores: Tensor) -> dict[str, float | None]:
    """Of (P, S) scores, prompts by seeds: "mean"; "prompt_std", of the prompts' means; "seed_std", of the seeds' means.

    With Bessel's correction, None for one prompt or one seed. seed_std is the error bar of the mean that a single seed
    gives: how far another seed would move it, the prompts being the same.
    """
    scores = scores.double()
    return {"mean": scores.mean().item(), "prompt_std": _std(scores.mean(1)), "seed_std": _std(scores.mean(0))}


def compare_scores(tuned: Tensor, base: Tensor) -> dict[str, float | None]:
    """Of two models' (P, S) scores of the same prompts from the same noise: "gain", the mean difference, and
    "win_rate", the share of pairs in which the first scores higher, a tie counted as half; each with its "_error".

    The errors are standard errors over prompts, std(per-prompt mean) / sqrt(P), so that pictures of one prompt, which
    resemble each other, do not count as if they were independent; None for one prompt. For one seed and no ties that of
    the win rate is the binomial's, sqrt(w (1 - w) / (P - 1)).
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
    """Means over (P,) prompts of how different the pictures of one prompt are: "vendi" (1 to `seeds`), "distance" (mean
    of 1 - cosine over pairs), and "spread", (vendi - 1) / (seeds - 1), 0 to 1."""
    mean = vendi.double().mean().item()
    return {"vendi": mean, "distance": distance.double().mean().item(), "spread": (mean - 1) / (seeds - 1)}
