"""Optimizers and learning-rate schedules: torch's own, and others from their libraries (see PACKAGES)."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Collection, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from ..common.advice import without_kernels_advice
from ..config.training_settings import GROUPS, TrainingSettings
from ..models.layers import group_of
from .adafactor import Adafactor

log = logging.getLogger(__name__)

PACKAGES = {
    "AdamW8bit": ("bitsandbytes", "bitsandbytes"),
    "Prodigy": ("prodigyopt", "prodigyopt"),
    "AdamWScheduleFree": ("schedulefree", "schedulefree"),
    "Lion": ("pytorch_optimizer", "pytorch-optimizer"),
    "CAME": ("pytorch_optimizer", "pytorch-optimizer"),
}
"""Optimizer -> module and pip package; none of them is required. All others are torch's."""
FUSED_DEVICES = ("cuda", "mps", "xpu")
"""Kinds of devices on which torch's AdamW is one kernel. On a CPU it stays a loop, for the bits of earlier versions."""
FOREACH_SIZE = 2**25
"""Numbers that another package's optimizer updates at once on an accelerator, at most: there a launch for each small
tensor costs more than its arithmetic, and the intermediates are as large as all tensors together."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    settings: TrainingSettings,
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """The optimizer named in the settings, over fp32 master parameters.

    Args:
        parameters: by name. Each of GROUPS becomes a parameter group, split by the rate of its parameters.
        learning_rate: the run's.
        settings: optimizer and weight decay.
        rate_of: parameter name -> its learning rate as a multiple of the run's; each group has it as "rate".

    Raises:
        ValueError: the optimizer's package is missing.
    """
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for group in GROUPS:
        for name, parameter in parameters.items():
            if group_of(name) == group:
                members.setdefault((group, rate_of(name)), []).append(parameter)
    decay = {"weight_decay": settings.weight_decay}  # in the groups: as an argument Prodigy would print a line
    groups = [{"params": params, "name": group, "rate": rate, **decay} for (group, rate), params in members.items()]
    match settings.optimizer:
        case "AdamW":
            fused = all(parameter.device.type in FUSED_DEVICES for parameter in parameters.values())
            return torch.optim.AdamW(groups, lr=learning_rate, **({"fused": True} if fused else {"foreach": False}))
        case "Adafactor":
            return Adafactor(groups, lr=learning_rate)
        case "SGD":
            return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    package, at_once = library(settings.optimizer), _updates_at_once(parameters.values())
    match settings.optimizer:
        case "AdamW8bit":
            return package.optim.AdamW8bit(groups, lr=learning_rate)
        case "Prodigy":  # with what its authors recommend for diffusion models
            options = {"safeguard_warmup": True, "use_bias_correction": True}
            return by_group(package.Prodigy)(groups, lr=learning_rate, **options)
        case "AdamWScheduleFree":
            optimizer = by_group(package.AdamWScheduleFree)(groups, lr=learning_rate, foreach=at_once)
            optimizer.train()
            return optimizer
        case _:
            return getattr(package, settings.optimizer)(groups, lr=learning_rate, foreach=at_once)


def _updates_at_once(parameters: Collection[Tensor]) -> bool:
    """Whether a step updates all tensors together (see `FOREACH_SIZE`). On a CPU never: the bits are others."""
    on_cpu = any(parameter.device.type == "cpu" for parameter in parameters)
    return not on_cpu and sum(parameter.numel() for parameter in parameters) <= FOREACH_SIZE


def library(optimizer: str) -> ModuleType:
    """The package of an optimizer that is not torch's. Raises ValueError when it cannot be imported."""
    module, package = PACKAGES[optimizer]
    try:
        with without_kernels_advice():
            return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"package {package} of optimizer {optimizer!r} cannot be imported ({error}); expected it installed. "
            f"Run `pip install {package}` in this Python, or choose AdamW."
        ) from error


def check_optimizer(settings: TrainingSettings, learning_rate: float, device: torch.device) -> None:
    """Raises ValueError for an optimizer that cannot run here; warns of a rate or schedule that does not suit it."""
    name = settings.optimizer
    if name in PACKAGES:
        library(name)
    if name == "AdamW8bit":
        _check_8bit(settings, device)
    if name == "Prodigy" and learning_rate == 0:
        raise ValueError("learning_rate is 0; expected one above 0 with Prodigy, usually 1.")
    if name == "Prodigy" and learning_rate < 0.1:
        log.warning("learning_rate is %g; Prodigy finds the step size itself and expects about 1", learning_rate)
    if name == "AdamWScheduleFree" and settings.lr_schedule != "constant":
        log.warning("lr_schedule is %r; AdamWScheduleFree expects 'constant'", settings.lr_schedule)


def _check_8bit(settings: TrainingSettings, device: torch.device) -> None:
    """Tries a step on the smallest tensor that gets an 8-bit state: no query tells whether a device can do it."""
    weight = nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = build_optimizer({"": weight}, 0.0, settings)
    try:
        optimizer.step()
    except RuntimeError as error:
        raise ValueError(
            f"device is {device}; expected one for which bitsandbytes has 8-bit optimisers ({error}). Choose AdamW or, "
            "for little memory, Adafactor."
        ) from error


def by_group(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of an optimizer class that steps its groups one by one, without those that have no gradients.

    Figures that `kind` counts or estimates for all groups together (Prodigy's d and k, schedule-free's k) are then
    counted for each group, from the step at which it begins to train. Prodigy also refuses groups of different rates.
    """

    class ByGroup(kind):
        def step(self, closure: None = None) -> None:
            groups = self.param_groups
            try:
                for group in groups:
                    if any(parameter.grad is not None for parameter in group["params"]):
                        self.param_groups = [group]
                        super().step()
            finally:
                self.param_groups = groups

    return ByGroup


@torch.no_grad()
def evaluation_weights(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The weights to evaluate and to save: the parameters themselves, without copying, or the average of a
    schedule-free optimizer (x of arXiv 2405.15682).

    Switching to the average and back rounds, so the parameters are restored from a copy: evaluating never changes a
    run.
    """
    if not hasattr(optimizer, "eval"):
        return {name: parameter.data for name, parameter in parameters.items()}
    copies = [parameter.clone() for parameter in parameters.values()]
    optimizer.eval()
    averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.train()
    for parameter, value in zip(parameters.values(), copies, strict=True):
        parameter.copy_(value)
    return averages


def group_rate(group: str, step: int, settings: TrainingSettings) -> float:
    """Learning rate of one of GROUPS at `step` (from 1), as a multiple of the run's; 0 before it is unfrozen."""
    first_step = getattr(settings, f"unfreeze_{group}")
    return getattr(settings, f"lr_{group}") if step >= first_step else 0.0


def learning_rate_factor(step: int, steps: int, settings: TrainingSettings) -> float:
    """Learning rate at `step` (1..steps) as a share of the peak: linear over the warm-up, then the schedule.

    With t from 0 at the first step after the warm-up to 1 just after the last one:

        linear               1 - t
        cosine               (1 + cos(pi t)) / 2
        cosine with restarts (1 + cos(pi (lr_cycles t mod 1))) / 2, arXiv 1608.03983 with equal cycles
        polynomial           (1 - t)^lr_power
        REX                  (1 - t) / (1/2 + (1 - t) / 2), arXiv 2107.04197
        warm-up-stable-decay min(1, (1 - t) / lr_decay_share), arXiv 2404.06395 with a linear decay
    """
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup - 1) / max(steps - warmup, 1)
    match settings.lr_schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine with restarts":
            return 0.5 * (1 + math.cos(math.pi * (settings.lr_cycles * progress % 1)))
        case "polynomial":
            return (1 - progress) ** settings.lr_power
        case "REX":
            return (1 - progress) / (0.5 + 0.5 * (1 - progress))
        case "warm-up-stable-decay":
            return min(1.0, (1 - progress) / settings.lr_decay_share)
        case _:
            return 1.0
