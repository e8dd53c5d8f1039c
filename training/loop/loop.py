"""The one training loop. Trainable, objective, data and run folder come from outside.

    resume from the last saved state, if there is one
    for every optimizer step:
        sum the loss and its gradient over the accumulated batches, clip, update the weights and their average
        where it is time to: validate, check the guard, draw samples, save the state
        end early when validation no longer improves, the guard ends the run or somebody asks it to finish
    return the last weights, the best ones or the guard's choice

A run is a function of its config: killed anywhere and started again it resumes from the last state, rewrites the rows
after it and ends with the same files, bit for bit (at the same number of threads).
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..common.callbacks import Callbacks, StepInfo
from ..common.distributed import World, whole, world
from ..common.files import WriteFailed, check_free_disk
from ..config.loop import Batches, LoopConfig, TrainingDiverged
from ..evaluation.diversity_guard import Guard
from ..objectives.objective import Objective
from ..runs.folder import RunFolder
from ..runs.metrics_log import MetricsLog
from ..runs.outcome import record_failure, result_kind, saved_result, stopped_early
from ..runs.samples import Sampler
from ..trainables.base import Trainable
from .checkpoint import load_loop, save_loop
from .events import check_diversity, draw_samples, validate, watch_values
from .gradient_step import GradientStep
from .memory import OutOfMemory, out_of_memory_message
from .plan import PACE_STEPS, LossWatch, pace_text
from .step_timer import StepTimer
from .validation import ValidationRecord, check_held_out

log = logging.getLogger(__name__)


class Loop:
    """One training run.

    Args:
        folder: where metrics, samples and states go.
        trainable: the fp32 masters that train.
        objective: the loss that is minimised.
        batches: order of the training data.
        config: number of steps, batch size, learning rate and settings.
        sampler: draws the sample prompts of `config.samples`.
        validation: held-out slots; their loss is logged, and decides on early stopping and the best weights.
        evaluation: further figures of the held-out slots, once loaded, for the validation's row.
        watch: figures of the trained values for a row with event "watch", whenever a validation is due.
        guard: measures diversity whenever a validation is due, and may end the run.
        callbacks: progress display and cancelling.
        device: where the objective computes; the CPU without it.

    Raises:
        ValueError: nothing trains at the first step, or the settings need a validation loss and nothing is held out.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainable: Trainable,
        objective: Objective,
        batches: Batches,
        config: LoopConfig,
        *,
        sampler: Sampler | None = None,
        validation: list | None = None,
        evaluation: Callable[[list], dict[str, Any]] | None = None,
        watch: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None,
        guard: Guard | None = None,
        callbacks: Callbacks | None = None,
        device: torch.device | None = None,
    ):
        self.folder, self.trainable, self.objective = folder, trainable, objective
        self.config, self.settings = config, config.settings
        self.sampler, self.held_out, self.evaluation = sampler, validation or [], evaluation
        self.watch, self.guard = watch, guard
        self.callbacks = callbacks or Callbacks()
        self.device = device or torch.device("cpu")
        self.world: World = world()
        self.gradient_step = GradientStep(trainable, objective, batches, config, self.device)
        check_held_out(self.held_out, self.settings)
        self.step, self.saved_step, self.timer = 0, -1, StepTimer()
        self.loss_watch, self.steps_here = LossWatch(), 0
        self.validation, self.guard_stopped, self.finishing = ValidationRecord(), False, False
        self.objective_state: dict[str, Any] = {}
        self.gathered: dict[str, Tensor] = {}
        self.updating = False
        self.metrics = MetricsLog(folder, config.settings, self.callbacks)
        self.done_events: set[tuple[str, int]] = set()
        self.ending: dict[str, Any] = {}

    def run(self) -> Mapping[str, Tensor]:
        """Trains to the end and returns the result's weights, by `outcome.result_kind`; `ending` then describes them.

        Raises:
            TrainingDiverged: loss or gradient is not finite. The state on disk is then that of the last regular save,
                if there was one: the weights just before the end are finite, but may already be far off.
        """
        with record_failure(self.folder, self.callbacks, lambda: self.step):
            check_free_disk(self.folder.path, 8 * 4 * len(self.trainable) + 2**26)
            self._resume()
            try:
                with self._save_on_error():
                    self._train()
            finally:
                self.metrics.close()
            self.folder.take_finish()  # a request that came during the last step
            return self._result()

    def _train(self) -> None:
        self.callbacks.before_step(self.step)
        self._between_steps()
        while not self.at_end:
            self._train_step()
            self._between_steps()
        self.callbacks.on_text(f"saving the state after step {self.step}")
        self._save()

    @property
    def at_end(self) -> bool:
        """Whether this step is the last, for whatever reason."""
        return self.step == self.config.steps or self.stopped_early or self.finishing or self.guard_stopped

    @property
    def stopped_early(self) -> bool:
        return stopped_early(self.validation.stale, self.settings)

    def values(self) -> Mapping[str, Tensor]:
        """The weights that are validated, sampled with and saved as the result.

        Where they are divided among processes, whole ones while the main process evaluates, and DTensors otherwise.
        """
        return self.gathered or self.trainable.divided(self.gradient_step.values())

    def _train_step(self) -> None:
        step = self.step + 1
        self.callbacks.before_step(step)
        with self.timer.measure():
            figures = self.gradient_step.gradient(step, self.callbacks)
            self._check_finite("loss", figures.loss)
            if not self.gradient_step.scaler.is_enabled():  # a step that is not finite is skipped
                self._check_finite("gradient norm", figures.norm)
            rate = self.gradient_step.learning_rate(step)
            row = {"step": step, "loss": figures.loss, "learning_rate": rate, **figures.parts}
            row["grad_norm"] = figures.norm if math.isfinite(figures.norm) else None
            self._update(row)
        pace = self.timer.seconds_per_step
        self.callbacks.on_step(StepInfo(self.folder.name, step, self.config.steps, figures.loss, rate, pace, row))
        if self.world.is_main:
            self._say_pace_and_warn(row)

    def _say_pace_and_warn(self, row: Mapping[str, Any]) -> None:
        """Says after the first few steps here when the run ends, and at some step that its loss rises."""
        self.steps_here += 1
        if self.steps_here == PACE_STEPS and not self.at_end:
            text = pace_text(self.config.steps - self.step, self.timer.seconds_per_step)
            log.info("run %s: %s", self.folder.name, text)
            self.callbacks.on_text(text)
        if warning := self._watch_loss(row):
            log.warning("run %r: %s", self.folder.name, warning)
            self.callbacks.on_state("running", self.step, warning)

    def _watch_loss(self, row: Mapping[str, Any]) -> str:
        """A warning where a step's row shows that the loss rises; rewards are left out, whose scale changes."""
        return "" if "reward" in row else self.loss_watch.add(row["loss"])

    def _update(self, row: dict[str, Any]) -> None:
        """Updates the weights and logs the step's row. While `updating`, no state is whole enough to be saved."""
        self.updating = True
        self.gradient_step.update(row["step"])
        self.step = row["step"]
        self.objective_state = self.objective.state()
        if self.world.is_main:
            self.metrics.add(row)
        self.updating = False

    def _check_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        raise TrainingDiverged(
            f"{name} is {value} at step {self.step + 1}; expected a finite number. {self._kept_state()} is kept. Try a "
            "lower learning rate, a longer warm-up, precision fp32 or a smaller max_grad_norm."
        )

    def _kept_state(self) -> str:
        """What a run that ends in the middle of a step leaves: the last saved state, else one that is saved now."""
        if self.saved_step < 0 and not self._can_save:
            return "No state"
        return f"The state after step {self.saved_step if self.saved_step >= 0 else self.step}"

    @property
    def _can_save(self) -> bool:
        """Whether the weights are those of a whole step, and this process has them all."""
        return not (self.trainable.shards or self.updating or self.gradient_step.updating)

    def _between_steps(self) -> None:
        """The main process evaluates and saves where it is time to; all of them then learn whether the run ends."""
        if self.world.is_main:
            self.finishing = self.step > 0 and (self.callbacks.wants_finish() or self.folder.take_finish())
        if self.trainable.shards:
            self._gather()
        if self.world.is_main:
            self._evaluate()
            if self._samples_now:
                self._add_event("sample", draw_samples)
        self.gathered = {}
        self._broadcast_ending()
        if self.step and self.step % self.settings.save_every == 0 and not self.at_end:
            self.callbacks.on_text(f"saving the state after step {self.step}")
            self._save()
            if self.world.is_main:
                self.folder.set_status("running", self.step)
        if self.stopped_early and self.step < self.config.steps:
            stale = self.validation.stale
            self.callbacks.on_text(f"stopping at step {self.step}: {stale} validations without a lower loss")

    @property
    def _samples_now(self) -> bool:
        return self.sampler is not None and (self.step % self.config.sample_every == 0 or self.at_end)

    @property
    def _evaluates_now(self) -> bool:
        return self.step % self.settings.validate_every == 0 or self.step == self.config.steps or self.finishing

    def _gather(self) -> None:
        """Gives the main process whole values where it will evaluate; all processes must come here."""
        (finishing,) = self.world.broadcast([int(self.finishing)], self.device)
        self.finishing = bool(finishing)
        evaluates = self._evaluates_now and (self.held_out or self.watch or self.guard)
        if evaluates or self._samples_now:
            values = ((name, whole(value)) for name, value in self.values().items())
            self.gathered = {name: value.cpu() for name, value in values if self.world.is_main}

    def _evaluate(self) -> None:
        if self._evaluates_now:
            if self.held_out:
                self._add_event("validation", validate)
            if self.watch:
                self._add_event("watch", watch_values)
            if self.guard:
                self._add_event("guard", check_diversity)
        self.guard_stopped = self.guard is not None and self.guard.should_stop

    def _add_event(self, event: str, measure: Callable[[Loop], dict[str, Any]]) -> None:
        """Adds a row with `event` to metrics.jsonl unless the run had it before it resumed."""
        if (event, self.step) in self.done_events:
            return
        before = deepcopy((self.validation, self.guard and self.guard.state))
        try:
            row = {"event": event, "step": self.step, **measure(self)}
            self.folder.add_row(row)
        except BaseException:  # a state saved now holds nothing of an event without a row: it is measured again
            self.validation, guard_state = before
            if self.guard:
                self.guard.state = guard_state
            raise
        self.done_events.add((event, self.step))
        self.metrics.show(row)

    def _broadcast_ending(self) -> None:
        """Gives all processes the decisions of the main one, which alone evaluates."""
        decisions = [self.validation.stale, int(self.finishing), int(self.guard_stopped)]
        self.validation.stale, finishing, guard_stopped = self.world.broadcast(decisions, self.device)
        self.finishing, self.guard_stopped = bool(finishing), bool(guard_stopped)

    def _resume(self) -> None:
        """Restores the last saved state, or that of the very beginning where there is none."""
        metrics_size = load_loop(self)
        if self.saved_step >= 0:
            self.callbacks.on_text(f"going on from step {self.step}")
        self.world.barrier()  # every process has read the state
        if self.world.is_main:
            self.folder.truncate_metrics(metrics_size)
            rows = self.folder.rows()
            self.done_events = {(row["event"], row["step"]) for row in rows if "event" in row}
            for row in rows:
                if "event" not in row:
                    self._watch_loss(row)  # as if the run had not been interrupted
            self.folder.set_status("running", self.step)
            self.metrics.begin(self.step)
            self.callbacks.on_state("running", self.step)
        self.objective_state = self.objective.state()

    def _save(self) -> None:
        if self.world.is_main or self.trainable.shards:
            save_loop(self)
        if self.world.is_main:
            self.saved_step = self.step

    @contextmanager
    def _save_on_error(self) -> Iterator[None]:
        """Saves the state after the last whole step when anything is raised, unless it diverged after a save."""
        try:
            yield
        except BaseException as error:
            out_of_memory = self.callbacks.is_out_of_memory(error)
            if out_of_memory:  # tensors of the failed step would leave no memory to save the state
                traceback.clear_frames(error.__traceback__)
                self.gradient_step.optimizer.zero_grad(set_to_none=True)
            diverged = isinstance(error, TrainingDiverged) and self.saved_step >= 0
            if self._can_save and self.step != self.saved_step and not diverged:
                self._save_after(error)
            if out_of_memory:
                hints = self.config.memory_hints
                raise OutOfMemory(out_of_memory_message(self.step, self.saved_step, hints)) from error
            raise

    def _save_after(self, error: BaseException) -> None:
        """Saves the state; of two files that cannot be written, the first is the one to name."""
        try:
            self._save()
        except WriteFailed as second:
            if not isinstance(error, WriteFailed):
                raise
            log.warning("run %r: %s", self.folder.name, second)

    def _result(self) -> Mapping[str, Tensor]:
        """The last weights, the best ones or the guard's choice; `ending` then has which and why, for status.json."""
        kind = result_kind(self.validation.stale, self.settings, self.guard and self.guard.rule, self.guard_stopped)
        self.ending = {"stopped_early": self.stopped_early, "result": kind, "stale": self.validation.stale}
        if self.finishing and self.step < self.config.steps:
            self.ending |= {"finished_on_request": True, "steps_asked": self.config.steps}
        if self.guard:
            self.ending["guard"] = self.guard.ending()
        if kind == "last" or (kind == "guard" and not self.world.is_main):  # the main process alone has the choice
            return self.values()
        values, self.ending["best_step"] = saved_result(self.folder, kind, self.guard and self.guard.state.best_step)
        return values
