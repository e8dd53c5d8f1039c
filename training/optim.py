"""Optimisers and learning-rate schedules, each from torch itself."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import TrainingSettings


def build_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, settings: TrainingSettings
) -> torch.optim.Optimizer:
    """The optimiser named in the settings, over fp32 master parameters."""
    parameters = list(parameters)
    match settings.optimizer:
        case "AdamW":
            return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay, foreach=False)
        case "Adafactor":
            return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
        case _:
            return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=settings.weight_decay)


def learning_rate_factor(step: int, steps: int, settings: TrainingSettings) -> float:
    """Share of the peak learning rate at `step` (1..steps): a line up over the warm-up, then the schedule."""
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup - 1) / max(steps - warmup, 1)
    match settings.lr_schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return 1.0
