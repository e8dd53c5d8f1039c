"""Fused backward (LOMO, arXiv 2306.09782): a gradient updates its weight as soon as it is there, and is freed at once.

Without it, the gradients of all weights are in memory at the end of the backward pass, 4 bytes a weight; with it, those
of one tensor. The weights are the same as long as no gradient is clipped: the norm of all gradients is known only when
all of them are used up, so `max_grad_norm` applies to each tensor's gradient by itself.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..common.distributed import world
from ..config.run import RunConfig
from ..config.training_settings import TrainingSettings
from .optimizers import group_rate
from .rounding import RoundedMasters, step_alone


def check_fused_backward(config: RunConfig) -> None:
    """Raises ValueError for a run whose gradients are summed before they are used."""
    if not config.settings.fused_backward:
        return
    if config.gradient_accumulation > 1:
        raise ValueError(
            f"fused_backward is on with {config.gradient_accumulation} batches a step; expected one, since a gradient "
            "is used and freed in its batch. Set gradient_accumulation 1 and total_batch 0, or fused_backward off."
        )
    if world().size > 1:
        raise ValueError(
            f"fused_backward is on with {world().size} processes; expected one, since gradients are summed over all of "
            "them first. Set fused_backward off."
        )


class FusedBackward:
    """Updates each parameter of an optimizer in the backward pass.

    Args:
        optimizer: steps each parameter by itself; its groups have no state.
        settings: first steps of groups, and the norm to clip to.
        rounded: updates masters in bf16, where there are some.

    Attributes:
        updating: whether some weights, but not yet all, are those after this step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: TrainingSettings, rounded: RoundedMasters | None = None
    ):
        self._optimizer, self._settings, self._rounded = optimizer, settings, rounded
        self._step, self._norms = 0, []
        self.updating = False
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._apply, number))

    def begin(self, step: int) -> None:
        """Prepares for the backward pass of optimizer step `step`, whose learning rates are set already."""
        self._step, self._norms = step, []

    def end(self) -> None:
        """Ends the step: all weights are those after it."""
        self.updating = False

    @torch.no_grad()
    def _apply(self, number: int, parameter: nn.Parameter) -> None:
        """Updates a parameter by its gradient, unless its group is still frozen, and frees the gradient."""
        group = self._optimizer.param_groups[number]  # a state that is loaded replaces the groups
        if group_rate(group["name"], self._step, self._settings):
            norm = torch.nn.utils.clip_grad_norm_([parameter], self._settings.max_grad_norm or math.inf)
            self._norms.append(norm)
            self.updating = True
            if self._rounded:
                self._rounded.step_alone(number, parameter, self._step)
            else:
                step_alone(self._optimizer, number, parameter)
        parameter.grad = None

    def norm(self) -> Tensor:
        """The norm of all gradients of the step, before they were clipped."""
        return torch.stack([norm.float() for norm in self._norms]).norm() if self._norms else torch.zeros(())
