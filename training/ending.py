"""When a run ends, and which of its weights are the result. What is asked for may change later, without training anew.

`stale` is the number of validations in a row that brought no lower loss; status.json keeps it. A run that was asked to
finish before its end is as good as one that stopped early, until more steps are asked for than before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .callbacks import Callbacks
from .config import TrainingSettings
from .distributed import world
from .files import read_tensors
from .run_folder import RunFolder


def stopped_early(stale: int, settings: TrainingSettings) -> bool:
    """Whether enough validations in a row brought nothing (Prechelt 1998, "Early stopping - but when?", UP_s)."""
    return 0 < settings.early_stop_after <= stale


def result_kind(stale: int, settings: TrainingSettings) -> str:
    """The weights that are the result, "last" or "best"; "best" after an early stop, whatever was asked for."""
    return "best" if stopped_early(stale, settings) else settings.result


def is_finished(status: Mapping[str, Any], steps: int, settings: TrainingSettings) -> bool:
    """Whether a run with this status.json ended as it would with these steps and settings, and with that result."""
    stale = status.get("stale", 0)
    on_request = status.get("finished_on_request", False) and steps <= status["steps_asked"]
    at_end = status["step"] == steps or stopped_early(stale, settings) or on_request
    same = status.get("result", "last") == result_kind(stale, settings)
    return status["state"] == "finished" and at_end and same


def best_values(folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Weights of the lowest validation loss and their metadata, or None when nothing was validated."""
    return read_tensors(folder.best) if folder.best.exists() else None


@contextmanager
def noted(folder: RunFolder, callbacks: Callbacks, step: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Whatever is raised inside goes on up, and stands in status.json: interrupted or failed, at which step, and why.

    step: steps done; 0 leaves it to what status.json says already.
    """
    try:
        yield
    except BaseException as error:
        if world().is_main:
            state = "interrupted" if isinstance(error, callbacks.interrupts) else "failed"
            folder.set_status(state, step() or folder.status()["step"], message=str(error) or type(error).__name__)
        raise
