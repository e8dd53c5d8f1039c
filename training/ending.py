"""When a run ends, and which of its weights are the result. What is asked for may change later, without training anew.

`stale` is the number of validations in a row that brought no lower loss; status.json keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .config import TrainingSettings
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
    at_end = status["step"] == steps or stopped_early(stale, settings)
    same = status.get("result", "last") == result_kind(stale, settings)
    return status["state"] == "finished" and at_end and same


def best_values(folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Weights of the lowest validation loss and their metadata, or None when nothing was validated."""
    return read_tensors(folder.best) if folder.best.exists() else None
