"""Teaches a resampler the outputs of the text encoder that a T5 replaces, from prompts alone.

A linear map of single tokens (`fit`) cannot say what the old encoder made of a token's neighbours. A perceiver
resampler reads all of them and gives the old encoder's number of tokens, so that each output has one target. This is
distillation on features, after Hinton et al. 2015 (arXiv 1503.02531); ELLA's resampler (Hu et al. 2024, arXiv
2403.05135) learns from pictures instead. Neither pictures nor a UNet are needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.rng import generator
from ..common.transfer import upload
from ..config.checks import check_range
from .fit import HOLD_OUT_EVERY, Encoder, FitReport, distinct, fit_metrics, fit_pooled, fit_projection, ridge_regression
from .projection import Projection

log = logging.getLogger(__name__)

METHOD = "distillation"
KEPT_BYTES = 2 << 30
"""Most bytes of the states and outputs that are kept; of more prompts, evenly spaced ones are taken."""
WARMUP_STEPS = 50
LOG_EVERY = 200
RATE = 0.25
"""Learning rate times the resampler's width: Adam's rate falls with the width (Yang et al. 2022, arXiv 2203.03466)."""

OnStep = Callable[[int, int], None]
"""Called with the number of steps done and of all; may raise to cancel."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How long a resampler learns, and its size."""

    steps: int = 1600
    """Optimizer steps, 1 or more."""
    layers: int = 2
    """Blocks of the resampler."""
    batch_size: int = 32
    """Prompts of a step."""
    seed: int = 0
    """Of the initial weights and of the order of prompts."""

    def __post_init__(self):
        check_range(self, steps=(1, 10**6), layers=(1, 24), batch_size=(1, 4096))


class Lessons(NamedTuple):
    """What both encoders made of n prompts, fp32 on the CPU."""

    states: Tensor
    """(n, L, D_in), zeros where a prompt is shorter."""
    mask: Tensor
    """(n, L) bool, a prompt's own states."""
    targets: Tensor
    """(n, M, D_out), the reference's outputs."""
    real: Tensor
    """(n, M) bool, the reference's tokens and end token."""

    def split(self) -> tuple[Lessons, Lessons]:
        """The prompts to learn from, and every fifth one, which is held out."""
        held_out = torch.arange(len(self.states)) % HOLD_OUT_EVERY == 0
        return Lessons(*(part[~held_out] for part in self)), Lessons(*(part[held_out] for part in self))


def fit_or_distil(
    encoder: Encoder,
    reference: Encoder,
    prompts: Sequence[str],
    *,
    method: str,
    pooled_width: int = 0,
    settings: Distillation | None = None,
    device: torch.device | None = None,
    on_step: OnStep = lambda done, total: None,
) -> tuple[Projection, FitReport]:
    """`distil_projection` for the method "distillation", else `fit_projection`."""
    if method != METHOD:
        return fit_projection(encoder, reference, prompts, pooled_width=pooled_width, method=method)
    settings = settings or Distillation()
    return distil_projection(encoder, reference, prompts, settings, pooled_width, device=device, on_step=on_step)


def distil_projection(
    encoder: Encoder,
    reference: Encoder,
    prompts: Sequence[str],
    settings: Distillation,
    pooled_width: int = 0,
    *,
    device: torch.device | None = None,
    on_step: OnStep = lambda done, total: None,
) -> tuple[Projection, FitReport]:
    """Trains a resampler to give a text encoder's outputs from the states of another one.

    Every fifth prompt is held out for the report, and not trained on.

    Args:
        encoder: the text encoder, before its projection.
        reference: the text encoder to imitate, with a fixed number of tokens, as a CLIP has; of longer prompts, whose
            outputs have several windows, the first one.
        prompts: at least 10 different ones.
        settings: steps and size.
        pooled_width: above 0, a linear map for the pooled output is fitted besides (`fit_pooled`).
        device: where the resampler trains; None: the CPU.
        on_step: called after each step.

    Returns:
        The projection, on the CPU, and a report.

    Raises:
        ValueError: there are too few prompts, or the reference's number of tokens varies.
    """
    prompts, device = distinct(prompts), device or torch.device("cpu")
    with torch.inference_mode(False):
        prompts, lessons = _encode(encoder, reference, prompts)
        training, held_out = lessons.split()
        projection = _new_projection(training, settings, pooled_width).to(device)
        with torch.enable_grad():
            _train(projection, training, settings, on_step)
        projection = projection.cpu().requires_grad_(False)
        metrics = _measure(projection, held_out, settings.batch_size)
        explained = None
        if pooled_width:
            means = [s[m].double().mean(0, keepdim=True) for s, m in zip(lessons.states, lessons.mask, strict=True)]
            explained = fit_pooled(projection, means, reference, prompts, ridge_regression)
    counts = {"prompts": len(prompts), "tokens": int(lessons.mask.sum()), "held_out": len(held_out.states)}
    return projection, FitReport(METHOD, **vars(metrics), **counts, pooled_explained=explained)


def _encode(encoder: Encoder, reference: Encoder, prompts: Sequence[str]) -> tuple[list[str], Lessons]:
    """The prompts that are taken, and what the encoders make of them."""
    first = sum(part.numel() for part in (encoder.states(prompts[0])[0], reference.states(prompts[0])[0]))
    most = max(10, KEPT_BYTES // (first * torch.float32.itemsize))
    if len(prompts) > most:
        log.info("distillation takes %d of %d prompts, evenly spaced", most, len(prompts))
        prompts = [prompts[i * len(prompts) // most] for i in range(most)]
    states = [encoder.states(prompt)[0].float() for prompt in prompts]
    targets, real = zip(*(reference.states(prompt) for prompt in prompts), strict=True)
    shortest, longest = min(map(len, targets)), max(map(len, targets))
    if any(len(target) % shortest for target in targets):
        raise ValueError(
            f"the reference's number of tokens is {shortest} to {longest}; expected a fixed number to distil into. Use "
            "a CLIP as the reference, or another method."
        )
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(state), dtype=torch.bool) for state in states], batch_first=True)
    cut = [torch.stack([part[:shortest] for part in parts]) for parts in (targets, real)]
    return list(prompts), Lessons(pad(states, batch_first=True), mask, cut[0].float(), cut[1])


def _new_projection(lessons: Lessons, settings: Distillation, pooled_width: int) -> Projection:
    """A resampler with the targets' number of tokens, whose outputs begin with their std."""
    (_, tokens, width), in_width = lessons.targets.shape, lessons.states.shape[-1]
    size = {"tokens": tokens, "layers": settings.layers, "seed": settings.seed, "pooled_width": pooled_width}
    projection = Projection(in_width, width, "resampler", bias=True, **size)
    projection.scale.copy_(lessons.targets.std())
    return projection


def _train(projection: Projection, lessons: Lessons, settings: Distillation, on_step: OnStep) -> None:
    """AdamW over random batches of prompts; the rate falls along a cosine."""
    device, parameters = projection.scale.device, list(projection.requires_grad_(True).parameters())
    variance = (lessons.targets - lessons.targets.mean(0)).square().mean().to(device)
    optimizer = torch.optim.AdamW(parameters, lr=RATE / projection.linear.in_features)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    order = generator(settings.seed, "distillation")
    for step in range(settings.steps):
        batch = torch.randint(len(lessons.states), (settings.batch_size,), generator=order)
        states, mask, targets = (upload(part[batch], device) for part in lessons[:3])
        loss = (projection(states, mask) - targets).square().mean() / variance
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % LOG_EVERY == 0:
            log.info("distillation: step %d of %d, error %.3f of the variance", step + 1, settings.steps, loss.item())
        on_step(step + 1, settings.steps)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _measure(projection: Projection, lessons: Lessons, batch_size: int):
    """Metrics over the reference's tokens and end tokens, which those of `fit_projection` compare with."""
    pairs = zip(lessons.states.split(batch_size), lessons.mask.split(batch_size), strict=True)
    outputs = torch.cat([projection(states, mask) for states, mask in pairs])
    targets = lessons.targets[lessons.real].double()
    return fit_metrics(outputs[lessons.real].double(), targets, targets)
