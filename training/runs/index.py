"""All runs of a folder, as a list, a chart or a report shows them. Nothing here writes, apart from `delete_run`, a
missing or outdated report, and locks.

A run or a file is asked for by a name, and found by comparing that name with what a fresh listing has: no part of a
path is ever made from it. Links in a run folder, which may come from anywhere, are not followed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .folder import LOCK_TIMEOUT, RunFolder

POINTS = 600
"""About so many steps are enough for a chart."""
SMOOTHING = 0.95
"""Weight of the moving average in charts, as `chart.smoothed` has it."""
TAIL = 2**18
"""Bytes at the end of metrics.jsonl that are read for a list."""

_DAMAGED = (ValueError, OSError, LookupError, TypeError, AttributeError)
"""What reading a run's files raises when they are gone, cut, or hold other things than expected."""
_LOOKING = threading.Lock()
"""Threads look at locks of runs one by one, or one would take another for a training."""


class NoSuchRun(LookupError):
    """No run, or no file of a run, has that name."""


def list_runs(root: Path) -> list[dict[str, Any]]:
    """A summary of every run in `root`, those that changed last first; see `summary`."""
    found = [summary(root, folder) for folder in _folders(root).values()]
    there = [run for run in found if run["state"] != "damaged" or (root / run["id"]).exists()]  # not deleted just now
    return sorted(there, key=lambda run: (-run["changed"], run["id"]))


def summary(root: Path, folder: RunFolder) -> dict[str, Any]:
    """What a list shows of a run.

    id, kind; state: that of status.json, "preparing" while a run that does not step is held by somebody, "interrupted"
    when nobody holds one that says it is running, "damaged" when its files cannot be read; message; step, steps; loss
    and reward of the last step; changed: seconds since 1970; grid: the last sheet of samples; version: another one for
    pictures of the same names in a run that began again; workflow: whether `workflow_of` has one.
    """
    run = {"id": folder.name, "changed": 0.0, "grid": None, "step": 0, "steps": None, "kind": None, "state": "damaged"}
    run |= {"message": "", "loss": None, "reward": None, "workflow": False, "version": 0}
    try:
        run["changed"] = _changed(folder)
        _check_links(folder)
        return finite(run | _found(root, folder))
    except _DAMAGED as error:
        return run | {"message": _reason(error)}


def _found(root: Path, folder: RunFolder) -> dict[str, Any]:
    """What the files of a run hold of its summary."""
    config, status, last = folder.config() or {}, folder.status(), _last_step(folder)
    run = {"version": (folder.path / "config.json").stat().st_mtime_ns // 10**6, "grid": _last_grid(folder)}
    run |= {"kind": config.get("identity", {}).get("kind"), "steps": config.get("config", {}).get("steps")}
    run |= {"state": _state(root, folder.name, status["state"]), "message": status.get("message", "")}
    run |= {"step": last.get("step", status["step"]), "loss": last.get("loss"), "reward": last.get("reward")}
    return run | {"workflow": bool(config.get("workflow") or config.get("prompt"))}


def _reason(error: Exception) -> str:
    """Why files cannot be read; errors of `read_json` name the file and what to do."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"files of this run are not as Retune writes them ({error!r}). Put them back, or begin the run again."


@contextmanager
def _as_written() -> Iterator[None]:
    """Raises ValueError for files that hold other things than expected; a NoSuchRun goes through."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(_reason(error)) from error


def run_details(root: Path, name: str, points: int = POINTS) -> dict[str, Any]:
    """The summary of a run with its `config`, `environment`, `status` and rows, for charts.

    rows: about `points` of its steps, each with `smoothed` loss; count: of all steps; smoothing: the average's weight,
    so that a chart can go on from the last row; validation, samples: rows of these events. All of it is empty for a
    damaged run. Raises NoSuchRun.
    """
    folder = _folder(root, name)
    run = summary(root, folder)
    try:
        return run | _curves(folder, points)
    except _DAMAGED as error:
        empty = {"config": None, "environment": None, "status": {}, "rows": [], "count": 0, "smoothing": SMOOTHING}
        empty |= {"validation": [], "samples": []}
        return run | empty | {"state": "damaged", "message": _reason(error)}


def _curves(folder: RunFolder, points: int) -> dict[str, Any]:
    """What `run_details` has besides the summary."""
    from ..plots.run_chart import smoothed

    _check_links(folder)
    config, rows = folder.config() or {}, _rows(folder)
    steps = [row for row in rows if "event" not in row]
    curve = smoothed([row["loss"] for row in steps], SMOOTHING)
    steps = [row | {"smoothed": value} for row, value in zip(steps, curve, strict=True)]
    about = {key: config.get(key) for key in ("config", "environment")} | {"status": folder.status()}
    return about | {
        "rows": finite(thinned(steps, points)),
        "count": len(steps),
        "smoothing": SMOOTHING,
        "validation": finite([row for row in rows if row.get("event") == "validation"]),
        "samples": finite([row for row in rows if row.get("event") == "sample"]),
    }


def thinned(rows: list[dict[str, Any]], points: int) -> list[dict[str, Any]]:
    """About `points` of the rows: the lowest and the highest loss of equal stretches, so that spikes stay, and the last
    row."""
    if len(rows) <= points:
        return rows
    size, kept = math.ceil(2 * len(rows) / points), {}
    for start in range(0, len(rows), size):
        stretch = range(start, min(start + size, len(rows)))
        kept |= dict.fromkeys(sorted({pick(stretch, key=lambda i: rows[i]["loss"]) for pick in (min, max)}))
    return [rows[i] for i in kept | {len(rows) - 1: None}]


def sample_file(root: Path, name: str, file: str) -> Path:
    """The path of a run's sample picture. Raises NoSuchRun, and ValueError for a run with links."""
    found = _readable(root, name).pictures()
    if file not in found:
        raise NoSuchRun(f"run {name!r} has no sample {file!r}.")
    return found[file]


def report_file(root: Path, name: str) -> Path:
    """The path of a run's report.html, made anew when steps came after it. Raises as `sample_file`."""
    from .report import write_report

    folder = _readable(root, name)
    path, metrics = folder.path / "report.html", folder.path / "metrics.jsonl"
    if path.is_file() and (not metrics.exists() or path.stat().st_mtime >= metrics.stat().st_mtime):
        return path
    run = summary(root, folder)
    shown = {key: run[key] for key in ("kind", "state", "step", "steps", "loss", "reward") if run[key] is not None}
    with _as_written():
        return write_report(folder, {"Run": [shown]})


def workflow_of(root: Path, name: str) -> dict[str, Any]:
    """{"workflow": the graph that made the run, or None; "prompt": the same in ComfyUI's API format}.

    Raises NoSuchRun, also for a run of the command line, which no workflow made.
    """
    with _as_written():
        config = _readable(root, name).config() or {}
        made = {key: config.get(key) for key in ("workflow", "prompt")}
    if not any(made.values()):
        raise NoSuchRun(f"run {name!r} was not made by a workflow.")
    return made


def delete_run(root: Path, name: str) -> None:
    """Deletes a run's folder for good. Raises NoSuchRun, and ValueError for a run that is in use."""
    folder = _folder(root, name)
    with _held(root, name, LOCK_TIMEOUT) as free:
        if not free:
            raise ValueError(f"run {name!r} is in use; expected one that nobody trains. Stop it first.")
        gone = root / f".{name}.deleted"  # out of the list at once, even if a file in it cannot be deleted
        if gone.exists():
            shutil.rmtree(gone)
        folder.path.rename(gone)
    shutil.rmtree(gone)


def _folders(root: Path) -> dict[str, RunFolder]:
    """Run folders by name: true folders with a record in them, no links."""
    if not root.is_dir():
        return {}
    with os.scandir(root) as entries:
        paths = [root / e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    return {path.name: RunFolder(path) for path in paths if _has_record(path)}


def _has_record(path: Path) -> bool:
    """Also of a folder that nobody may look into: a list tells of it as damaged."""
    try:
        return (path / "config.json").is_file()
    except PermissionError:
        return True


def _folder(root: Path, name: str) -> RunFolder:
    found = _folders(root)
    if name not in found:
        raise NoSuchRun(f"there is no run {name!r}.")
    return found[name]


def _check_links(folder: RunFolder) -> None:
    """Raises ValueError where a file that is read here is a link, in a folder copied from elsewhere."""
    for name in ("config.json", "status.json", "metrics.jsonl", "report.html", "samples"):
        if (folder.path / name).is_symlink():
            raise ValueError(f"{name} of run {folder.name!r} is a link; expected the run's own. Put a copy there.")


def _readable(root: Path, name: str) -> RunFolder:
    """A run's folder without links. Raises NoSuchRun and ValueError."""
    folder = _folder(root, name)
    _check_links(folder)
    return folder


def _last_grid(folder: RunFolder) -> str | None:
    return max((name for name in folder.pictures() if name.endswith("_grid.png")), default=None)


def _changed(folder: RunFolder) -> float:
    files = [folder.path / name for name in ("metrics.jsonl", "status.json", "config.json")]
    return max(file.stat().st_mtime for file in files if file.exists())


def _state(root: Path, name: str, written: str) -> str:
    """The state of status.json, checked against who holds the run; a killed process leaves "running" behind."""
    with _held(root, name) as free:
        if free:
            return "interrupted" if written in ("running", "new") else written
    return "running" if written == "running" else "preparing"


@contextmanager
def _held(root: Path, name: str, patience: float = 0.0) -> Iterator[bool]:
    """Keeps trainings of a run out, shorter than they wait for it; gives False when one is going on.

    patience: seconds to wait for another program that looks at the same lock.
    """
    lock = root / ".locks" / f"{name}.lock"
    lock.parent.mkdir(exist_ok=True)  # a folder copied from elsewhere has no locks
    with _LOOKING:
        try:
            with FileLock(lock).acquire(timeout=patience, poll_interval=LOCK_TIMEOUT / 10):
                yield True
        except Timeout:
            yield False


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    path = folder.path / "metrics.jsonl"
    return _whole_lines(path.read_bytes()) if path.exists() else []


def _last_step(folder: RunFolder) -> dict[str, Any]:
    """The row of the last step among the last TAIL bytes of metrics.jsonl; empty where there is none."""
    path = folder.path / "metrics.jsonl"
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read().split(b"\n")[:-1]  # none at the end that is being written
    for line in reversed(lines[1:] if size > TAIL else lines):  # nor one whose start is cut off
        if line.strip() and "event" not in (row := json.loads(line)):
            return row
    return {}


def _whole_lines(data: bytes) -> list[dict[str, Any]]:
    """Rows, without one at the end that is being written."""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines() if line]


def finite(value: Any) -> Any:
    """The same value with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
