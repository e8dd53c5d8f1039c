"""One optimizer step: the gradient of its accumulated batches, clipped, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..common.callbacks import Callbacks
from ..common.distributed import World, world
from ..config.loop import Batches, LoopConfig
from ..objectives.objective import Loss, Objective
from ..trainables.base import Trainable
from .ema import update_ema
from .fused_backward import FusedBackward
from .optimizers import build_optimizer, evaluation_weights, group_rate, learning_rate_factor
from .precision import autocast, loss_scaler
from .rounding import RoundedMasters


@dataclass(frozen=True)
class Figures:
    """What a step measures before the weights change."""

    loss: float
    """Mean per sample."""
    norm: float
    """The gradient's, before it is clipped; not finite after an fp16 overflow."""
    parts: dict[str, float]
    """Means of the objective's further figures."""


class GradientStep:
    """The optimizer and what surrounds it: accumulation, all-reduce, loss scaling, clipping and the average.

    An optimizer step `step` (from 1) is `gradient(step)`, then `update(step)`.

    Args:
        trainable: whose parameters are optimized.
        objective: the loss that is minimised.
        batches: order of the training data.
        config: number of steps, batch size, learning rate and settings.
        device: where the objective computes.

    Raises:
        ValueError: nothing would train at the first step, or a batch does not divide among the processes.
    """

    def __init__(
        self, trainable: Trainable, objective: Objective, batches: Batches, config: LoopConfig, device: torch.device
    ):
        self.trainable, self.objective, self.batches = trainable, objective, batches
        self.config, self.settings, self.device = config, config.settings, device
        self.world: World = world()
        self.world.share(config.batch_size)
        self.optimizer = build_optimizer(trainable.parameters, config.learning_rate, self.settings, trainable.rate)
        self.scaler, self._overflows = loss_scaler(self.settings.precision, device), False
        rounds = self.settings.master_weights == "bf16"
        self.rounded = RoundedMasters(self.optimizer, trainable.parameters, config.seed) if rounds else None
        fused = self.settings.fused_backward
        self.fused = FusedBackward(self.optimizer, self.settings, self.rounded) if fused else None
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

    def gradient(self, step: int, callbacks: Callbacks) -> Figures:
        """Sums the gradient over the accumulated batches of all processes, and clips it.

        The device is read once, when all of this is on its way: each read makes the host wait for it.

        Raises ValueError when the loss depends on nothing that trains.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._set_rates(step)
        results = self._backward(step, callbacks)
        losses, figures = torch.stack([result.share for result in results]).float(), _figures(results)
        shared = self._all_reduce(losses, figures, results) if self.world.size > 1 else figures.flatten()
        norm = self._clip(step).to(losses)
        observed = [result.loss.observed for result in results if result.loss.observed is not None]
        values = iter(torch.cat([x.flatten().to(losses) for x in (losses, norm, shared, *observed)]).tolist())
        loss, norm = sum(islice(values, len(losses))), next(values)
        self._overflows = self.scaler.is_enabled() and not math.isfinite(norm)
        parts = self._read_parts(results, values, step)
        if observed:
            self.objective.observe([_rows(tensor, values) for tensor in observed])
        return Figures(loss, norm, parts)

    def _backward(self, step: int, callbacks: Callbacks) -> list[_Result]:
        """Adds up this process's gradient; what its batches' losses are, all on the device."""
        batches = self._batches(step)
        total = sum(len(batch) for batch in batches)
        results = [self._backward_batch(self.world.shard(batch), step, total, callbacks) for batch in batches]
        # another process may have the gradient that this one lacks
        _expect_gradient(self.world.size > 1 or any(result.trains for result in results), step)
        return results

    def _read_parts(self, results: Sequence[_Result], values: Iterator[float], step: int) -> dict[str, float]:
        """The step's means of the further figures, from their values on the host."""
        parts = dict.fromkeys(results[0].loss.parts, 0.0)
        if self.world.size > 1:
            parts = dict(zip(parts, islice(values, len(parts)), strict=True))
            self._drop_gradients(list(islice(values, len(self.trainable.parameters))), step)
            return parts
        for result in results:
            for key in parts:
                parts[key] += next(values) * result.count / result.total
        return parts

    def _batches(self, step: int) -> list[list[tuple[int, Any]]]:
        """The batches of a step as pairs of (index of the sample within the step, slot)."""
        accumulation = self.settings.gradient_accumulation
        batches = [self.batches.batch((step - 1) * accumulation + micro + 1) for micro in range(accumulation)]
        size = self.config.batch_size
        return [list(enumerate(slots, start=micro * size)) for micro, slots in enumerate(batches)]

    def _backward_batch(self, batch: list[tuple[int, Any]], step: int, total: int, callbacks: Callbacks) -> _Result:
        """Adds a batch's gradient to the parameters', as its share in that of a step of `total` samples."""
        indices, slots = zip(*batch, strict=True)
        loaded = self.objective.load(list(slots))
        callbacks.after_load()
        with self.trainable.attach(rng_key=(step, indices[0])), autocast(self.settings.precision, self.device):
            result = self.objective(list(zip(indices, loaded, strict=True)), step)
            loss = result.per_sample.sum() / total
            if loss.requires_grad:  # not where no caption of the batch has the learned word
                self.scaler.scale(loss).backward()
        result = replace(result, per_sample=result.per_sample.detach())
        return _Result(result, loss.detach(), len(batch), total, loss.requires_grad)

    def _all_reduce(self, losses: Tensor, figures: Tensor, results: Sequence[_Result]) -> Tensor:
        """Sums gradients and losses over all processes, in place.

        What has no gradient in one process may have one in another (a dropped module, a caption without the learned
        word), so every process sums all gradients, with zeros for those that it lacks. Divided ones are sums already.

        Returns:
            The means of the figures, in order, and the number of processes that had a gradient of each parameter.
        """
        parameters, shards = self.trainable.parameters, self.trainable.shards
        present = [float(parameter.grad is not None) for parameter in parameters.values()]
        shares = torch.tensor([[result.count / result.total] for result in results]).to(losses)
        shared = torch.cat([(shares * figures.to(losses)).sum(0), torch.tensor(present).to(losses)])
        reduced = [parameter for name, parameter in parameters.items() if name not in shards]
        for parameter in reduced:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.world.all_reduce_([*(parameter.grad for parameter in reduced), losses, shared])
        return shared

    def _drop_gradients(self, counts: Sequence[float], step: int) -> None:
        """Takes the gradients away that no process had, so that the optimizer leaves those parameters alone."""
        _expect_gradient(any(counts), step)
        for parameter, count in zip(self.trainable.parameters.values(), counts, strict=True):
            if not count:
                parameter.grad = None

    def _clip(self, step: int) -> Tensor:
        """Clips the gradient to max_grad_norm and returns its norm before that.

        Groups that are still frozen at this step lose their gradient first, so that neither the norm nor the optimizer
        counts them.
        """
        if self.fused:
            return self.fused.norm()
        for group in self.optimizer.param_groups:
            if group_rate(group["name"], step, self.settings) == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        self.scaler.unscale_(self.optimizer)
        parameters = {name: p for name, p in self.trainable.parameters.items() if p.grad is not None}
        longest = self.settings.max_grad_norm or math.inf
        if not self.trainable.shards:
            return torch.nn.utils.clip_grad_norm_(parameters.values(), longest)
        norm = self._divided_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), longest, norm)
        return norm

    def _divided_norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The norm of the whole gradient; squares of what is divided among processes are summed over them."""
        shards, norm = self.trainable.shards, torch.nn.utils.get_total_norm
        whole = norm([parameter.grad for name, parameter in parameters.items() if name not in shards])
        squares = norm([parameter.grad for name, parameter in parameters.items() if name in shards]).square()
        self.world.all_reduce_([squares])
        return (whole.to(squares).square() + squares).sqrt()

    def update(self, step: int) -> None:
        """Steps optimizer, loss scaler and average; not the optimizer after an fp16 overflow.

        `GradScaler.step` would read the device once more to learn of that. The gradient's norm tells it too.
        """
        if self.rounded and not self.fused:
            self.rounded.step(step)
        elif not self.fused:
            if not self._overflows:
                self.optimizer.step()
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


@dataclass(frozen=True)
class _Result:
    """What a batch gave, on the device."""

    loss: Loss
    """Without its graph."""
    share: Tensor
    """Its part of the step's loss."""
    count: int
    """Samples of the batch in this process."""
    total: int
    """Samples of the step in all processes."""
    trains: bool
    """Whether something that trains has a part in the loss."""


def _figures(results: Sequence[_Result]) -> Tensor:
    """(batches, figures) of a step's batches."""
    parts = [[x.detach().float() for x in result.loss.parts.values()] for result in results]
    return torch.stack(
        [torch.stack(row) if row else result.share.new_empty(0) for row, result in zip(parts, results, strict=True)]
    )


def _rows(tensor: Tensor, values: Iterator[float]) -> list[list[float]]:
    """The next values as those of a (K, B) tensor."""
    return [list(islice(values, tensor.shape[1])) for _ in range(tensor.shape[0])]


def _expect_gradient(trains: bool, step: int) -> None:
    """Raises ValueError for a step whose loss nothing that trains has a part in."""
    if not trains:
        raise ValueError(
            f"the loss of step {step} depends on nothing that trains; expected a caption with the learned word in each "
            "batch. Look at the captions, and at caption_dropout and tag_dropout."
        )
