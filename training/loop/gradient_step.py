"""One optimizer step: the gradient of its accumulated batches, clipped, and the update of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import World, world
from ..config.loop import Batches, LoopConfig
from ..objectives.objective import Objective
from ..trainables.base import Trainable
from .ema import update_ema
from .fused_backward import FusedBackward
from .optimizers import build_optimizer, evaluation_weights, group_rate, learning_rate_factor
from .precision import autocast, loss_scaler


class GradientStep:
    """The optimizer and what surrounds it: accumulation, all-reduce, loss scaling, clipping and the average.

    An optimizer step `step` (from 1) is `backward(step)`, `clip(step)` and `update(step)`, in this order.

    Args:
        trainable: whose parameters are optimized.
        objective: the loss that is minimised.
        batches: order of the training data.
        config: number of steps, batch size, learning rate and settings.
        device: where the objective computes.
    """

    def __init__(
        self, trainable: Trainable, objective: Objective, batches: Batches, config: LoopConfig, device: torch.device
    ):
        self.trainable, self.objective, self.batches = trainable, objective, batches
        self.config, self.settings, self.device = config, config.settings, device
        self.world: World = world()
        self.optimizer = build_optimizer(trainable.parameters, config.learning_rate, self.settings, trainable.rate)
        self.scaler = loss_scaler(self.settings.precision, device)
        self.fused = FusedBackward(self.optimizer, self.settings) if self.settings.fused_backward else None
        self.ema = {k: v.clone() for k, v in trainable.values().items()} if self.settings.ema_decay else {}
        self._check_learning_rates()

    def _check_learning_rates(self) -> None:
        """Raises ValueError when nothing would train at the first step."""
        groups = [group["name"] for group in self.optimizer.param_groups]
        if not any(group_rate(group, 1, self.settings) for group in groups):
            raise ValueError(
                f"learning rates of {', '.join(groups)} are 0 at the first step; expected one that trains. Raise an "
                "lr_... setting or set its unfreeze_... to 0."
            )

    def backward(self, step: int, callbacks: Callbacks) -> tuple[float, dict[str, float]]:
        """Sums loss and gradient over the accumulated batches of all processes.

        Returns:
            The mean loss per sample, and the means of the objective's further figures.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._set_rates(step)
        batches = self._batches(step)
        total, loss, parts = sum(len(batch) for batch in batches), 0.0, {}
        for batch in batches:
            batch_loss, batch_parts = self._backward_batch(self._shard(batch), step, total, callbacks)
            loss += batch_loss
            for key, value in batch_parts.items():
                parts[key] = parts.get(key, 0.0) + value
        return self._all_reduce(loss, parts)

    def _batches(self, step: int) -> list[list[tuple[int, Any]]]:
        """The batches of a step as pairs of (index of the sample within the step, slot)."""
        accumulation = self.settings.gradient_accumulation
        batches = [self.batches.batch((step - 1) * accumulation + micro + 1) for micro in range(accumulation)]
        size = self.config.batch_size
        return [list(enumerate(slots, start=micro * size)) for micro, slots in enumerate(batches)]

    def _shard(self, batch: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """This process's samples of a batch."""
        shard = self.world.shard(batch)
        if not shard:
            raise ValueError(
                f"batch_size is {self.config.batch_size} on {self.world.size} processes; expected one each."
            )
        return shard

    def _backward_batch(
        self, batch: list[tuple[int, Any]], step: int, total: int, callbacks: Callbacks
    ) -> tuple[float, dict[str, float]]:
        """Adds a batch's gradient to the parameters'; returns its share in loss and figures of a step of `total`."""
        indices, slots = zip(*batch, strict=True)
        loaded = self.objective.load(list(slots))
        callbacks.after_load()
        with self.trainable.attach(rng_key=(step, indices[0])), autocast(self.settings.precision, self.device):
            result = self.objective(list(zip(indices, loaded, strict=True)), step)
            loss = result.per_sample.sum() / total
            _expect_gradient(loss, step)
            self.scaler.scale(loss).backward()
        return loss.item(), {key: value * len(batch) / total for key, value in result.parts.items()}

    def _all_reduce(self, loss: float, parts: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Sums gradients, loss and figures over all processes, which have the same figures in the same order."""
        if self.world.size == 1:
            return loss, parts
        figures = torch.tensor([loss, *parts.values()], device=self.device, dtype=torch.float64)
        self.world.all_reduce_([p.grad for p in self.trainable.parameters.values() if p.grad is not None] + [figures])
        loss, *values = figures.tolist()
        return loss, dict(zip(parts, values, strict=True))

    def clip(self, step: int) -> float:
        """Clips the gradient to max_grad_norm and returns its norm before that; not finite after an fp16 overflow.

        Groups that are still frozen at this step lose their gradient first, so that neither the norm nor the optimizer
        counts them.
        """
        if self.fused:
            return self.fused.norm().item()
        for group in self.optimizer.param_groups:
            if group_rate(group["name"], step, self.settings) == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        parameters = [p for p in self.trainable.parameters.values() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf).item()

    def update(self, step: int) -> None:
        """Steps optimizer, loss scaler and average. The scaler skips the optimizer's step after an fp16 overflow."""
        if not self.fused:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        update_ema(self.ema, self.trainable.parameters, step, self.settings.ema_decay)
        if self.fused:
            self.fused.end()

    @property
    def updating(self) -> bool:
        """Whether some weights, but not yet all, are those after the step in progress."""
        return self.fused is not None and self.fused.updating

    def _set_rates(self, step: int) -> None:
        """Sets the groups' learning rates; with a fused backward the weights change in the backward pass."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"] * group_rate(group["name"], step, self.settings)
        if self.fused:
            self.fused.begin(step)

    def learning_rate(self, step: int) -> float:
        """The run's learning rate at a step, before the multiples of groups and parameters."""
        return self.config.learning_rate * learning_rate_factor(step, self.config.steps, self.settings)

    def values(self) -> dict[str, Tensor]:
        """The weights to validate with, to draw samples with and to save as the result: the average if there is one."""
        return self.ema or evaluation_weights(self.optimizer, self.trainable.parameters)


def _expect_gradient(loss: Tensor, step: int) -> None:
    """Raises ValueError for a loss that nothing which trains has a part in."""
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of step {step} depends on nothing that trains; expected a caption with the learned word in each "
            "batch. Look at the captions, and at caption_dropout and tag_dropout."
        )
