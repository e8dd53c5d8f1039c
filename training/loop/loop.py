"""The one training loop. What trains, what is minimised and what is written come from outside; nothing else does.

    for every optimiser step:
        put the masters in effect; sum the loss and its gradient over the accumulated batches
        clip, step the optimiser, update the average
        log a row; now and then validate, draw samples, save the state; stop early when validation gets no better, or
        when somebody asks the run to finish

A run is a function of its config: killed anywhere and started again it goes on from the last state, rewrites the rows
after it and ends with the same files, bit for bit (at the same number of threads).
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..common.callbacks import Callbacks, StepInfo
from ..common.distributed import World, world
from ..common.files import check_free_disk, write_tensors
from ..config.loop import Batches, LoopConfig, TrainingDiverged
from ..evaluation.diversity_guard import Guard, GuardState
from ..objectives.denoising import Objective
from ..runs.folder import RunFolder
from ..runs.metrics_log import MetricsLog
from ..runs.outcome import best_values, guarded_values, record_failure, result_kind, stopped_early
from ..runs.samples import Sampler, write_samples
from ..trainables.weights import Trainable
from .checkpoint import load_state, restore_optimizer, save_state
from .memory import OutOfMemory, message
from .optimizers import build_optimizer, evaluation_weights, group_rate, learning_rate_factor

log = logging.getLogger(__name__)


class Loop:
    """One run. `sampler` draws the sample prompts; `validation` is a list of held-out slots, `evaluation` gives further
    figures of them, once loaded, for the validation's row. `watch` says of the trained values what is worth a row of
    its own, event "watch", whenever a validation would be due; so does `guard`, event "guard", and may end the run."""

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
        self.folder, self.trainable, self.objective, self.batches = folder, trainable, objective, batches
        self.config, self.settings = config, config.settings
        self.sampler, self.validation, self.evaluation, self.watch = sampler, validation or [], evaluation, watch
        self.guard, self.guard_stops = guard, 0
        self.callbacks = callbacks or Callbacks()
        self.device = device or torch.device("cpu")
        self.world: World = world()
        self.optimizer = build_optimizer(trainable.parameters, config.learning_rate, config.settings, trainable.rate)
        self._check()
        self.ema = self._fresh_average()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")
        self.step, self.saved_step, self.seconds_per_step = 0, -1, 0.0
        self.best, self.stale = math.inf, 0
        self.ending: dict[str, Any] = {}
        self.events: set[tuple[str, int]] = set()
        self.journal = MetricsLog(folder, config.settings, self.callbacks)
        self.objective_state: dict[str, Any] = {}
        self.whole, self.finishing = True, False

    def _check(self) -> None:
        """Raises ValueError when nothing would train at the first step, or no validation tell when to stop."""
        groups = [group["name"] for group in self.optimizer.param_groups]
        if not any(group_rate(group, 1, self.settings) for group in groups):
            raise ValueError(
                f"learning rates of {', '.join(groups)} are 0 at the first step; expected one that trains. Raise an "
                "lr_... setting or set its unfreeze_... to 0."
            )
        if not self.validation and (self.settings.early_stop_after or self.settings.result == "best"):
            raise ValueError(
                "number of held-out images is 0; expected some with early_stop_after or result 'best'. Raise "
                "validation_fraction."
            )

    def run(self) -> dict[str, Tensor]:
        """Trains to the end and returns the result's values: the last ones or, by `ending.result_kind`, the best.

        Raises TrainingDiverged on a non-finite loss or gradient. The state on disk then stays that of the last regular
        save, if there was one: weights just before the end are finite, but may have gone astray already.
        """
        with record_failure(self.folder, self.callbacks, lambda: self.step):
            check_free_disk(self.folder.path, 8 * 4 * len(self.trainable) + 2**26)
            self._resume()
            try:
                self._train()
            finally:
                self.journal.close()
            self.folder.take_finish()  # one that came too late
            return self._result()

    def _train(self) -> None:
        """All steps and the last state; where anything is raised before, the state after the last whole step."""
        self.whole = True
        try:
            self.callbacks.before_step(self.step)
            self._after_step()
            while not self.at_end:
                self._one_step()
                self._after_step()
            self.callbacks.on_text(f"saving the state after step {self.step}")
            self._save()
        except BaseException as error:
            full = self.callbacks.is_out_of_memory(error)
            if full:  # what the step still holds would leave no room for the state
                traceback.clear_frames(error.__traceback__)
                self.optimizer.zero_grad(set_to_none=True)
            astray = isinstance(error, TrainingDiverged) and self.saved_step >= 0
            if self.whole and self.step != self.saved_step and not astray:
                self._save()
            if full:
                raise OutOfMemory(message(self.step, self.saved_step, self.config.when_full)) from error
            raise

    def _one_step(self) -> None:
        self.callbacks.before_step(self.step + 1)
        began = time.perf_counter()
        row = self._gradients(self.step + 1)
        row["grad_norm"] = self._clip()
        self.whole = False
        self._update(row)
        self.whole = True
        self._time(time.perf_counter() - began)
        self.callbacks.on_step(self._info(row))

    def values(self) -> Mapping[str, Tensor]:
        """What samples, validation and the result use: the average when there is one, else the masters."""
        return self.ema or evaluation_weights(self.optimizer, self.trainable.parameters)

    @property
    def stopped_early(self) -> bool:
        return stopped_early(self.stale, self.settings)

    @property
    def at_end(self) -> bool:
        """Whether no step comes after this one, for whatever reason."""
        return self.step == self.config.steps or self.stopped_early or self.finishing or bool(self.guard_stops)

    def _result(self) -> Mapping[str, Tensor]:
        """The last values, the best or the guard's choice; `ending` then says which and why, for status.json."""
        kind = result_kind(self.stale, self.settings, self.guard and self.guard.rule, bool(self.guard_stops))
        self.ending = {"stopped_early": self.stopped_early, "result": kind, "stale": self.stale}
        if self.finishing and self.step < self.config.steps:
            self.ending |= {"finished_on_request": True, "steps_asked": self.config.steps}
        if self.guard:
            self.ending["guard"] = self.guard.ending()
        if kind == "last" or (kind == "guard" and not self.world.is_main):  # the main process alone knows the choice
            return self.values()
        if kind == "guard":
            self.ending["best_step"] = self.guard.state.best_step
            return guarded_values(self.folder, self.guard.state.best_step)
        best = best_values(self.folder)
        if best is None:
            raise ValueError("no validation loss was a number, so no weights are the best; expected result 'last'.")
        self.ending["best_step"] = int(best[1]["step"])
        return best[0]

    def _gradients(self, step: int) -> dict[str, Any]:
        """Sums loss and gradient over the accumulated batches; returns the step's row for metrics.jsonl."""
        self.optimizer.zero_grad(set_to_none=True)
        accumulation, loss, parts = self.settings.gradient_accumulation, 0.0, {}
        numbered = []
        for micro in range(accumulation):
            slots = self.batches.batch((step - 1) * accumulation + micro + 1)
            numbered.append([(micro * self.config.batch_size + i, slot) for i, slot in enumerate(slots)])
        total = sum(len(batch) for batch in numbered)
        for batch in numbered:
            share = self.world.shard(batch)
            indices, slots = zip(*share, strict=True) if share else ((), ())
            if not share:
                raise ValueError(
                    f"batch_size is {self.config.batch_size} on {self.world.size} processes; expected one each."
                )
            loaded = self.objective.load(list(slots))
            self.callbacks.after_load()
            with self.trainable.attach(rng_key=(step, indices[0])), self._autocast():
                result = self.objective(list(zip(indices, loaded, strict=True)), step)
                part = result.per_sample.sum() / total
                self.scaler.scale(part).backward()
            loss += part.item()
            for key, value in result.parts.items():
                parts[key] = parts.get(key, 0.0) + value * len(share) / total
        loss, parts = self._sum_over_processes(loss, parts)
        if not math.isfinite(loss):
            raise self._diverged("loss", loss)
        rate = self.config.learning_rate * learning_rate_factor(step, self.config.steps, self.settings)
        return {"step": step, "loss": loss, "learning_rate": rate, **parts}

    def _clip(self) -> float | None:
        """Clips the gradient and returns its norm before; None after an fp16 overflow (the scaler skips that step).

        Groups that rest at this step lose their gradient first, so that neither the norm nor the optimiser sees them.
        """
        for group in self.optimizer.param_groups:
            if group_rate(group["name"], self.step + 1, self.settings) == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        parameters = [p for p in self.trainable.parameters.values() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._diverged("gradient norm", norm)
        return norm if math.isfinite(norm) else None

    def _update(self, row: dict[str, Any]) -> None:
        """Steps the optimiser and the average, logs the row."""
        for group in self.optimizer.param_groups:
            group["lr"] = row["learning_rate"] * group["rate"] * group_rate(group["name"], row["step"], self.settings)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        self.step = row["step"]
        self.objective_state = self.objective.state()
        if self.world.is_main:
            self.journal.add(row)

    def _diverged(self, what: str, value: float) -> TrainingDiverged:
        kept = self.saved_step if self.saved_step >= 0 else self.step
        return TrainingDiverged(
            f"{what} is {value} at step {self.step + 1}; expected a finite number. The state after step {kept} is "
            "kept. Try a lower learning rate, a longer warm-up, precision fp32 or a smaller max_grad_norm."
        )

    def _fresh_average(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.trainable.values().items()} if self.settings.ema_decay else {}

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average with the usual warm-up: decay = min(decay, (1 + n) / (10 + n))."""
        number = self.step + 1
        decay = min(self.settings.ema_decay, (1 + number) / (10 + number))
        for name, value in self.ema.items():
            value.lerp_(self.trainable.parameters[name].to(value), 1 - decay)

    def _after_step(self) -> None:
        """Validation, samples and state when they are due; each is skipped when a resumed run has done it already."""
        if self.world.is_main:
            self.finishing = self.step > 0 and (self.callbacks.wants_finish() or self.folder.take_finish())
            self._look()
        self.stale = self.world.broadcast(self.stale, self.device)
        self.finishing = bool(self.world.broadcast(int(self.finishing), self.device))
        if self.guard:
            self.guard_stops = self.world.broadcast(self.guard_stops, self.device)
        if self.stopped_early and self.step < self.config.steps:
            self.callbacks.on_text(f"stopping at step {self.step}: {self.stale} validations without a lower loss")

    def _look(self) -> None:
        due = self.step % self.settings.validate_every == 0 or self.step == self.config.steps or self.finishing
        if self.validation and due and ("validation", self.step) not in self.events:
            self._validate()
        if self.watch and due and ("watch", self.step) not in self.events:
            self.journal.add({"event": "watch", "step": self.step, **self.watch(self.values())})
        if self.guard and due and ("guard", self.step) not in self.events:
            self._guard()
        if self.guard:
            self.guard_stops = int(self.guard.should_stop)
        due = self.step % self.config.sample_every == 0 or self.at_end
        if self.sampler and due and ("sample", self.step) not in self.events:
            self._sample()
        if self.step and self.step % self.settings.save_every == 0 and not self.at_end:
            self.callbacks.on_text(f"saving the state after step {self.step}")
            self._save()
            self.folder.set_status("running", self.step)

    def _validate(self) -> None:
        self.callbacks.on_text(f"validating at step {self.step}")
        loaded = self.objective.load(self.validation)
        self.callbacks.after_load()
        values = self.values()
        with self.trainable.attach(values), self._autocast():
            loss = self.objective.validation(loaded)
            figures = self.evaluation(loaded) if self.evaluation else {}
        self.stale += 1
        if loss < self.best:
            write_tensors(self.folder.best, values, {"step": str(self.step), "validation_loss": repr(loss)})
            self.best, self.stale = loss, 0
        self.journal.add({"event": "validation", "step": self.step, "loss": loss, **figures})

    def _guard(self) -> None:
        self.callbacks.on_text(f"the guard looks at step {self.step}")
        self.callbacks.after_load()
        values = self.values()
        with self.trainable.attach(values), self._autocast():
            seen = self.guard.measure()
        row = self.guard.update(self.step, seen)
        if row["best_step"] == self.step:
            write_tensors(self.folder.guarded, values, {"step": str(self.step), "reward": repr(row["reward"])})
        self.journal.add(row)
        if warning := self.guard.warning(self.step):
            log.warning("run %r: %s", self.folder.name, warning)
            self.callbacks.on_text(warning)

    @torch.no_grad()
    def _sample(self) -> None:
        self.callbacks.on_text(f"drawing samples at step {self.step}")
        with self.trainable.attach(self.values()), self._autocast():
            latents = self.sampler.draw()
        images = self.sampler.decode(latents)
        prompts, epoch = self.config.samples.prompts, self.step / self.config.steps_per_epoch
        self.journal.add(write_samples(self.folder, self.sampler, images, prompts, self.step, epoch))

    def _save(self) -> None:
        if self.world.is_main:
            best = self.best if math.isfinite(self.best) else None
            extra = {"best": best, "stale": self.stale, "scaler": self.scaler.state_dict()}
            extra["objective"] = self.objective_state
            if self.guard:
                extra["guard"] = self.guard.state.to_json()
            save_state(self.folder, self.step, self.trainable.values(), self.ema, self.optimizer, extra)
            self.saved_step = self.step

    def _resume(self) -> None:
        """Goes back to the last state, or to the very beginning when there is none."""
        state = load_state(self.folder)
        if state is None:
            self._truncate_metrics(0)
        else:
            if state.step > self.config.steps:
                raise ValueError(
                    f"steps is {self.config.steps}; run {self.folder.name!r} has done {state.step}. "
                    "Ask for at least as many, or choose resume = restart."
                )
            self.trainable.load(state.masters)
            self.ema = {k: state.ema[k].to(v) for k, v in self.ema.items()}
            restore_optimizer(self.optimizer, state.optimizer)
            self.best = state.extra["best"] if state.extra["best"] is not None else math.inf
            self.stale = state.extra.get("stale", 0)  # none in states of earlier versions
            self.objective.load_state(state.extra.get("objective", {}))
            if self.guard:
                self.guard.state = GuardState.from_json(state.extra["guard"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state.extra["scaler"])
            self.step = self.saved_step = state.step
            self._truncate_metrics(state.metrics_size)
            self.callbacks.on_text(f"going on from step {state.step}")
        if self.world.is_main:
            self.events = {(row["event"], row["step"]) for row in self.folder.rows() if "event" in row}
            self.folder.set_status("running", self.step)
            self.journal.begin(self.step)
            self.callbacks.on_state("running", self.step)
        self.objective_state = self.objective.state()

    def _truncate_metrics(self, size: int) -> None:
        self.world.barrier()  # nobody reads the state any more
        if self.world.is_main:
            self.folder.truncate_metrics(size)

    def _autocast(self):
        if self.settings.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float16
        # Casts are not kept: older torch keeps those of a pass without gradients for the next one with them.
        return torch.autocast(self.device.type, dtype, cache_enabled=False)

    def _sum_over_processes(self, loss: float, parts: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Adds gradients, loss and parts up; every process has the same parts in the same order."""
        if self.world.size == 1:
            return loss, parts
        figures = torch.tensor([loss, *parts.values()], device=self.device, dtype=torch.float64)
        self.world.all_reduce_([p.grad for p in self.trainable.parameters.values() if p.grad is not None] + [figures])
        loss, *values = figures.tolist()
        return loss, dict(zip(parts, values, strict=True))

    def _time(self, seconds: float) -> None:
        self.seconds_per_step = seconds if not self.seconds_per_step else 0.9 * self.seconds_per_step + 0.1 * seconds

    def _info(self, row: dict[str, Any]) -> StepInfo:
        figures = (row["loss"], row["learning_rate"], self.seconds_per_step, row)
        return StepInfo(self.folder.name, self.step, self.config.steps, *figures)
