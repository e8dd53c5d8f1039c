"""When a run ends, and which weights are its result. Both are decided again when a finished run is asked for anew.

`stale` is the number of validations in a row that brought no lower loss; status.json has it, and the guard's last
measurement. A run that was asked to finish early counts as finished until more steps are asked for than before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.files import WriteFailed
from ..config.guard import GuardRule
from ..config.training_settings import TrainingSettings
from .folder import RunFolder
from .state_file import read_state_file, saved_step

log = logging.getLogger(__name__)


def stopped_early(stale: int, settings: TrainingSettings) -> bool:
    """Whether enough validations in a row brought nothing (Prechelt 1998, "Early stopping - but when?", UP_s)."""
    return 0 < settings.early_stop_after <= stale


def result_kind(
    stale: int, settings: TrainingSettings, rule: GuardRule | None = None, guard_stopped: bool = False
) -> str:
    """Which weights are the result: "last", "best" or the "guard"'s choice.

    Args:
        stale: validations in a row without a lower loss.
        settings: the result that is asked for; an early stop makes it "best".
        rule: of the run's guard; its choice comes first.
        guard_stopped: whether the guard ended the run.
    """
    if rule is not None and rule.chooses(guard_stopped):
        return "guard"
    return "best" if stopped_early(stale, settings) else settings.result


def is_finished(
    status: Mapping[str, Any], steps: int, settings: TrainingSettings, rule: GuardRule | None = None
) -> bool:
    """Whether a run with this status.json has the end and the result that these steps and settings ask for."""
    stale = status.get("stale", 0)
    on_request = status.get("finished_on_request", False) and steps <= status["steps_asked"]
    guard_stopped = rule is not None and rule.should_stop(status.get("guard", {}).get("share", 1.0))
    at_end = status["step"] == steps or stopped_early(stale, settings) or on_request or guard_stopped
    same = status.get("result", "last") == result_kind(stale, settings, rule, guard_stopped)
    return status["state"] == "finished" and at_end and same


def saved_result(folder: RunFolder, kind: str, guard_step: int | None) -> tuple[dict[str, Tensor], int]:
    """The weights that a result of kind "best" or "guard" has, left in their file until they are used, and their step.

    Args:
        folder: the run's.
        kind: from `result_kind`.
        guard_step: the step that the guard chose.

    Raises:
        ValueError: no validation loss was a number, or the saved weights are not those of guard_step.
    """
    if kind == "guard":
        return guarded_values(folder, guard_step), guard_step
    best = best_values(folder)
    if best is None:
        raise ValueError("no validation loss was a number, so no weights are the best; expected result 'last'.")
    return best[0], int(best[1]["step"])


def guarded_values(folder: RunFolder, step: int) -> dict[str, Tensor]:
    """Weights of the guard's best step.

    Raises ValueError when the file is of another step: the run was killed after that step, and then asked for fewer
    steps than it had done.
    """
    tensors, about, _ = read_state_file(folder.guarded, copy=False)
    if int(about["step"]) != step:
        raise ValueError(
            f"{folder.guarded} is of step {about['step']}; expected step {step}. Ask for as many steps as before, or "
            "choose resume = restart."
        )
    return tensors


def describe_guard(status: Mapping[str, Any]) -> str:
    """What the guard of a run with this status.json did, to follow a sentence; "" for a run without a guard."""
    guard = status.get("guard")
    if guard is None:
        return ""
    floor, share = f"{100 * guard['floor']:.0f} %", f"{100 * guard['share']:.0f} % of the start's"
    result = f"the result is that of step {status.get('best_step')}{'' if status.get('best_step') else ', untuned'}"
    if guard["stopped"]:
        return f"; the guard ended it: diversity is {share}, below {floor}; {result}"
    if status["result"] != "guard":
        return f"; its guard found diversity at {share}"
    fell = "never" if guard["fell_at"] is None else f"at step {guard['fell_at']}"
    return f"; the guard chose among its checks: diversity fell below {floor} of the start's {fell}; {result}"


def best_values(folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Weights of the lowest validation loss and their metadata, or None when nothing was validated."""
    return read_state_file(folder.best, copy=False)[:2] if folder.best.exists() else None


@contextmanager
def record_failure(folder: RunFolder, callbacks: Callbacks, step: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Records an exception in status.json (interrupted or failed, at which step, and why), and raises it again.

    Args:
        folder: the run's.
        callbacks: their `interrupts` are exceptions that mean "interrupted"; `on_state` is called.
        step: number of finished steps; for 0 the step in status.json stays.
    """
    try:
        yield
    except BaseException as error:
        if not world().is_main:
            raise
        done = step() or folder.status()["step"]
        if isinstance(error, WriteFailed):
            error.args = (f"{error} {_kept(folder)}",)
        message = str(error) or type(error).__name__
        state = "interrupted" if isinstance(error, callbacks.interrupts) else "failed"
        try:
            folder.set_status(state, done, message=message)
        except WriteFailed as second:
            log.error("run %r: %s", folder.name, second)  # the first error is the one to see
        callbacks.on_state(state, done, message)
        raise


def _kept(folder: RunFolder) -> str:
    """What is left of a run that could not write a file."""
    step = saved_step(folder.latest) if folder.latest.exists() else None
    kept = "has no saved state yet" if step is None else f"keeps its state after step {step}"
    return f"Run {folder.name!r} {kept}: queue it again to go on."
