"""What a run measures between its steps: validation, guard and samples, each a row of metrics.jsonl with `event`.

Each function works on a loop at its current step and returns the row's figures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runs.samples import write_samples
from ..runs.state_file import write_state_file
from .precision import autocast

if TYPE_CHECKING:
    from .loop import Loop

log = logging.getLogger(__name__)


@contextmanager
def evaluation_weights_in_effect(loop: Loop) -> Iterator[Mapping[str, Tensor]]:
    """Puts the weights to evaluate (`Loop.values`) in effect on the network, and yields them."""
    values = loop.values()
    with loop.trainable.attach(values), autocast(loop.settings.precision, loop.device):
        yield values


def validate(loop: Loop) -> dict[str, Any]:
    """Measures the held-out loss and saves the weights if it is the lowest so far."""
    loop.callbacks.on_text(f"validating at step {loop.step}")
    loaded = loop.objective.load(loop.held_out)
    loop.callbacks.after_load()
    with evaluation_weights_in_effect(loop) as values:
        loss = loop.objective.validation(loaded)
        figures = loop.evaluation(loaded) if loop.evaluation else {}
    if loop.validation.improves(loss):
        write_state_file(loop.folder.best, values, {"step": str(loop.step), "validation_loss": repr(loss)})
    loop.validation.update(loss)
    return {"loss": loss, **figures}


def watch_values(loop: Loop) -> dict[str, Any]:
    """Figures of the trained values themselves."""
    return loop.watch(loop.values())


def check_diversity(loop: Loop) -> dict[str, Any]:
    """Runs the guard's check and saves the weights if they are its choice so far."""
    loop.callbacks.on_text(f"the guard looks at step {loop.step}")
    loop.callbacks.after_load()
    with evaluation_weights_in_effect(loop) as values:
        measurement = loop.guard.measure()
    row = loop.guard.update(loop.step, measurement)
    if row["best_step"] == loop.step:
        write_state_file(loop.folder.guarded, values, {"step": str(loop.step), "reward": repr(row["reward"])})
    if warning := loop.guard.warning(loop.step):
        log.warning("run %r: %s", loop.folder.name, warning)
        loop.callbacks.on_text(warning)
    return row


@torch.no_grad()
def draw_samples(loop: Loop) -> dict[str, Any]:
    """Draws the sample prompts and writes the pictures."""
    loop.callbacks.on_text(f"drawing samples at step {loop.step}")
    with evaluation_weights_in_effect(loop):
        latents = loop.sampler.draw()
    images = loop.sampler.decode(latents)
    prompts, epoch = loop.config.samples.prompts, loop.step / loop.config.steps_per_epoch
    return write_samples(loop.folder, loop.sampler, images, prompts, loop.step, epoch)
