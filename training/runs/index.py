"""All runs of a folder, for a list, a chart or a report. Nothing here writes, apart from `delete_run`, a missing or
outdated report, and locks.

A run or a file is looked up by comparing its name with a fresh listing: no path is ever built from a name that came
from outside. Links in a run folder, which may have been copied from anywhere, are not followed.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..common.files import replace, temporary_name, while_open_elsewhere, writing
from ..common.foreign import printable
from .folder import LOCK_TIMEOUT, RunFolder
from .records import ADVICE, Row, as_written, read_last_step

POINTS = 600
"""Approximate number of steps in a chart."""
SMOOTHING = 0.95
"""Weight of the moving average in charts; see `run_chart.smoothed`."""
FILES = ("config.json", "status.json", "metrics.jsonl", "report.html", "samples")
"""What is read here of a run's folder."""
_NO_FLOAT = 2**1000
_PROBING = threading.Lock()
"""Held while a run's lock is probed: two threads that probe at once would each mistake the other for a training."""


class NoSuchRun(LookupError):
    """No run, or no file of a run, has that name."""


def list_runs(root: Path) -> list[dict[str, Any]]:
    """A summary of every run in `root`, the latest changed first; see `summary`."""
    folders = _folders(root)
    runs = [summary(root, folder) for folder in folders.values()]
    existing = [run for run in runs if folders[run["id"]].path.exists()]  # not deleted just now
    return sorted(existing, key=lambda run: (-run["changed"], run["id"]))


def summary(root: Path, folder: RunFolder) -> dict[str, Any]:
    """A run's entry in a list.

    Returns:
        "id", "kind", "message", "step", "steps"; "loss" and "reward" of the last step. "state": that of status.json,
        but "preparing" for a run that is locked and does not step yet, "interrupted" for a "running" one that nobody
        has locked, and "damaged" when its files cannot be read. "changed": seconds since 1970. "grid": the last sheet
        of samples. "version": changes when the run begins again, since its pictures then have the same names.
        "workflow": whether `workflow_of` has one.
    """
    run = {"id": _id(folder.name), "changed": 0.0, "grid": None, "step": 0, "steps": None, "kind": None}
    run |= {"state": "damaged", "message": "", "loss": None, "reward": None, "workflow": False, "version": 0}
    try:
        run["changed"] = _changed(folder)
        _check_links(folder)
        with as_written(folder.path):
            return finite(run | _summary_from_files(root, folder))
    except (ValueError, OSError) as error:
        return run | {"message": printable(str(error))}


def _summary_from_files(root: Path, folder: RunFolder) -> dict[str, Any]:
    """The part of a run's summary that its files have."""
    config, status, last = folder.config(), folder.status(), read_last_step(folder.path / "metrics.jsonl")
    if config is None:
        raise ValueError(f"run {folder.name!r} has no config.json. {ADVICE}")
    run = {"version": (folder.path / "config.json").stat().st_mtime_ns // 10**6, "grid": _last_grid(folder)}
    run |= {"kind": config["identity"].get("kind"), "steps": (config.get("config") or {}).get("steps")}
    run |= {"state": _state(root, folder.name, status["state"]), "message": status.get("message", "")}
    run |= {"step": last.get("step", status["step"]), "loss": last.get("loss"), "reward": last.get("reward")}
    return run | {"workflow": bool(config.get("workflow") or config.get("prompt"))}


def run_details(root: Path, name: str, points: int = POINTS) -> dict[str, Any]:
    """The summary of a run with its `config`, `environment`, `status` and rows, for charts.

    Returns:
        The summary and, empty for a damaged run: "rows": about `points` of its steps, each with "smoothed" loss.
        "count": number of all steps. "smoothing": the moving average's weight, to continue it after the last row.
        "validation", "samples": rows of these events.

    Raises:
        NoSuchRun: there is no such run.
    """
    folder = _folder(root, name)
    run = summary(root, folder)
    try:
        with as_written(folder.path):
            return run | _curves(folder, points)
    except (ValueError, OSError) as error:
        empty = {"config": None, "environment": None, "status": {}, "rows": [], "count": 0, "smoothing": SMOOTHING}
        empty |= {"validation": [], "samples": []}
        return run | empty | {"state": "damaged", "message": printable(str(error))}


def _curves(folder: RunFolder, points: int) -> dict[str, Any]:
    """The part of `run_details` that is not in the summary."""
    from ..plots.run_chart import smoothed

    _check_links(folder)
    config, rows = folder.config() or {}, folder.rows()
    steps = [row for row in rows if "event" not in row]
    curve = smoothed([row["loss"] for row in steps], SMOOTHING)
    steps = [row | {"smoothed": value} for row, value in zip(steps, curve, strict=True)]
    about = {key: config.get(key) for key in ("config", "environment")} | {"status": folder.status()}
    return finite(about) | {
        "rows": finite(thinned(steps, points)),
        "count": len(steps),
        "smoothing": SMOOTHING,
        "validation": finite([row for row in rows if row.get("event") == "validation"]),
        "samples": finite([row for row in rows if row.get("event") == "sample"]),
    }


def thinned(rows: list[Row], points: int) -> list[Row]:
    """About `points` of the rows: the lowest and the highest loss of equal intervals, so that spikes remain, and the
    last row."""
    if len(rows) <= points:
        return rows
    size, selected = math.ceil(2 * len(rows) / points), {}
    for start in range(0, len(rows), size):
        interval = range(start, min(start + size, len(rows)))
        selected |= dict.fromkeys(sorted({pick(interval, key=lambda i: rows[i]["loss"]) for pick in (min, max)}))
    return [rows[i] for i in selected | {len(rows) - 1: None}]


def sample_file(root: Path, name: str, file: str) -> Path:
    """The path of a run's sample picture. Raises NoSuchRun, and ValueError for a run with links."""
    pictures = _readable(root, name).pictures()
    if file not in pictures:
        raise NoSuchRun(f"run {name!r} has no sample {file!r}.")
    return pictures[file]


def report_file(root: Path, name: str) -> Path:
    """The path of a run's report.html, written again when steps came after it. Raises as `sample_file`."""
    from .report import write_report

    folder = _readable(root, name)
    path, metrics = folder.path / "report.html", folder.path / "metrics.jsonl"
    if path.is_file() and (not metrics.exists() or path.stat().st_mtime >= metrics.stat().st_mtime):
        return path
    run = summary(root, folder)
    figures = {key: run[key] for key in ("kind", "state", "step", "steps", "loss", "reward") if run[key] is not None}
    return write_report(folder, {"Run": [figures]})


def workflow_of(root: Path, name: str) -> dict[str, Any]:
    """{"workflow": the graph that made the run, or None; "prompt": the same in ComfyUI's API format}.

    Raises NoSuchRun, also for a run of the command line, which no workflow made.
    """
    config = _readable(root, name).config() or {}
    made = {key: config.get(key) for key in ("workflow", "prompt")}
    if not any(made.values()):
        raise NoSuchRun(f"run {name!r} was not made by a workflow.")
    return made


def delete_run(root: Path, name: str) -> None:
    """Deletes a run's folder for good. Raises NoSuchRun, and ValueError for a run that is in use."""
    folder = _folder(root, name)
    with _locked(root, folder.name, LOCK_TIMEOUT) as free:
        if not free:
            raise ValueError(f"run {name!r} is in use; expected one that nobody trains. Stop it first.")
        trash = temporary_name(root)  # out of the list at once, even if a file in it cannot be deleted
        with writing(folder.path):
            replace(folder.path, trash)
    _delete(trash)


def _delete(folder: Path) -> None:
    """Deletes a folder, also one with write-protected files or folders, or files that are open elsewhere (Windows)."""
    try:
        shutil.rmtree(folder)
    except PermissionError:
        folder.chmod(0o700)
        for place, folders, files in os.walk(folder):
            for path in (Path(place, name) for name in folders + files):
                if not path.is_symlink():
                    path.chmod(0o700)
        while_open_elsewhere(lambda: shutil.rmtree(folder))


def _folders(root: Path) -> dict[str, RunFolder]:
    """Run folders by id: folders with a run's record, no links."""
    if not root.is_dir():
        return {}
    with os.scandir(root) as entries:
        paths = [root / e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    return {_id(path.name): RunFolder(path) for path in paths if _has_record(path)}


def _id(name: str) -> str:
    """A folder's name for JSON and addresses: bytes that are no text, which a page cannot send, are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _has_record(path: Path) -> bool:
    """Whether a folder has what only a run writes, in whatever condition, or must not be read."""
    return not os.access(path, os.X_OK) or any(os.path.lexists(path / name) for name in FILES[:3])


def _folder(root: Path, name: str) -> RunFolder:
    folders = _folders(root)
    if name not in folders:
        raise NoSuchRun(f"there is no run {name!r}.")
    return folders[name]


def _check_links(folder: RunFolder) -> None:
    """Raises ValueError where a file that is read here is a link."""
    for name in FILES:
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
    """Seconds since 1970 of the last change; of the folder itself where it has no file that is read."""
    files = [folder.path / name for name in FILES[:3]]
    return max((file.stat().st_mtime for file in files if file.exists()), default=folder.path.stat().st_mtime)


def _state(root: Path, name: str, written: str) -> str:
    """The state of status.json, checked against the run's lock: a killed process leaves "running" in the file."""
    with _locked(root, name) as free:
        if free:
            return "interrupted" if written in ("running", "new") else written
    return "running" if written == "running" else "preparing"


@contextmanager
def _locked(root: Path, name: str, timeout: float = 0.0) -> Iterator[bool]:
    """Locks a run, for less time than a training waits for it; yields False when a training has it.

    timeout: seconds to wait for another program that probes the same lock.
    """
    lock = root / ".locks" / f"{name}.lock"
    lock.parent.mkdir(exist_ok=True)  # a folder copied from elsewhere has no locks
    with _PROBING:
        try:
            with FileLock(lock).acquire(timeout=timeout, poll_interval=LOCK_TIMEOUT / 10):
                yield True
        except Timeout:
            yield False


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON has no notation for (NaN, infinity) or that no float holds."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, int) and abs(value) >= _NO_FLOAT:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value
