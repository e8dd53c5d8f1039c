"""Metadata of saved files about the run in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.provenance import about_run
from .folder import RunFolder


def about_folder(path: str | Path) -> dict[str, Any]:
    """`about_run` of a run's folder; ValueError for a folder without a run."""
    folder = RunFolder(Path(path))
    run, status = folder.config(), folder.status()
    if run is None:
        raise ValueError(f"{folder.path} holds no run; expected a folder with config.json.")
    ending = {name: value for name, value in status.items() if name not in ("state", "step", "message")}
    return about_run(run, {"steps": status["step"], **ending})
