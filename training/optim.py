"""Optimisers and learning-rate schedules, each from torch itself."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from .config import GROUPS, TrainingSettings
from .layers import group_of


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, settings: TrainingSettings
) -> torch.optim.Optimizer:
    """The optimiser named in the settings, over fp32 master parameters by name; one group for each of GROUPS there."""
    members = {group: [p for name, p in parameters.items() if group_of(name) == group] for group in GROUPS}
    groups = [{"params": found, "name": group} for group, found in members.items() if found]
    match settings.optimizer:
        case "AdamW":
            return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=settings.weight_decay, foreach=False)
        case "Adafactor":
            return torch.optim.Adafactor(groups, lr=learning_rate, weight_decay=settings.weight_decay)
        case _:
            return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, weight_decay=settings.weight_decay)


def group_rate(group: str, step: int, settings: TrainingSettings) -> float:
    """Multiple of the learning rate that one of GROUPS has at `step` (from 1); 0 before it is unfrozen."""
    begins = getattr(settings, f"unfreeze_{group}")
    return getattr(settings, f"lr_{group}") if step >= begins else 0.0


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
