"""A run is a folder: config, metrics, samples, state and result, each written whole or not at all.

<run>/config.json       the run's settings and identity, and the machine
<run>/status.json       running, interrupted, failed or finished; step; message; how it ended (see `outcome`)
<run>/metrics.jsonl     one row per optimizer step, and rows with `event`; no clock times, so equal runs are equal files
<run>/samples/          pictures, `<step>_<index>.png`
<run>/state/            latest.safetensors (masters, optimizer, average), best.safetensors and, of a guard,
                        guarded.safetensors (masters)
<run>/<artifact>        the result
<run>/report.html       all of it on one page, once the run is finished
<run>/tensorboard/      events for TensorBoard, if the settings ask for them
<run>/finish            a request to end the run after this step; the run deletes it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..common.files import read_json, sync, write_json
from ..common.fingerprint import sketches_match
from ..config.checks import check_run_name
from ..config.run import RESUMABLE_SETTINGS

FINGERPRINTS = {
    "model": "the model (its weights, a reset, a LoRA)",
    "text_encoder": "the text encoder (its weights, tokenizer, padding, a LoRA)",
    "projection": "the text encoder's projection or scale",
    "vae": "the VAE",
    "start": "the LoRA that training starts from",
    "tuned": "what --tuned and --baseline-tuned put into the models",
    "rewards": "the rewards (their files, weights, targets)",
    "prompts": "the prompts (their texts, weights, order)",
    "dataset": "the data set (images, masks, captions, sizes, repeats, weights)",
}
"""Descriptions, for errors, of the parts of a run's identity that are only hashes or sketches."""
SKETCHES = ("projection",)
"""Those of them that `sketches_match` compares."""
LOCK_TIMEOUT = 0.3
"""Seconds to wait for a run's lock: a list of runs holds it for a moment to find out whether the run is in use."""


class RunFolder:
    """One run's files. `RunFolder.open` locks them against other processes."""

    def __init__(self, path: Path):
        self.path = path
        self.samples = path / "samples"
        self.latest = path / "state" / "latest.safetensors"
        self.best = path / "state" / "best.safetensors"
        self.guarded = path / "state" / "guarded.safetensors"
        self._metrics = path / "metrics.jsonl"

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    @contextmanager
    def open(cls, root: Path, name: str, *, resume: str) -> Iterator[RunFolder]:
        """The folder root/name, locked until exit; resume="restart" renames an old one first.

        Raises ValueError for a name that is no plain folder name, and for a run that another process uses.
        """
        check_run_name(name)
        locks = root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(locks / f"{name}.lock").acquire(timeout=LOCK_TIMEOUT, poll_interval=LOCK_TIMEOUT / 10)
        except Timeout as error:
            raise ValueError(
                f"run {name!r} is in use by another process. Wait for it, stop it, or choose another run name."
            ) from error
        with lock:
            if resume == "restart":
                move_aside(root / name)
            folder = cls(root / name)
            folder.samples.mkdir(parents=True, exist_ok=True)
            for partial in folder.path.rglob(".*.tmp"):  # of a killed process
                partial.unlink()
            yield folder

    def config(self) -> dict[str, Any] | None:
        """The content of config.json, or None in a new folder."""
        path = self.path / "config.json"
        return read_json(path) if path.exists() else None

    def status(self) -> dict[str, Any]:
        """The content of status.json; state "new" without one."""
        path = self.path / "status.json"
        return read_json(path) if path.exists() else {"state": "new", "step": 0}

    def pictures(self) -> dict[str, Path]:
        """The existing sample pictures by name, without links."""
        if self.samples.is_symlink() or not self.samples.is_dir():
            return {}
        paths = [path for path in self.samples.iterdir() if path.suffix == ".png"]
        return {path.name: path for path in paths if path.is_file() and not path.is_symlink()}

    def set_status(self, state: str, step: int, **more: Any) -> None:
        write_json(self.path / "status.json", {"state": state, "step": step, **more})

    def take_finish(self) -> bool:
        """Whether a file `finish` was in the folder; deletes it."""
        request = self.path / "finish"
        if not request.is_file():
            return False
        with suppress(PermissionError):  # Windows: still open in another program
            request.unlink(missing_ok=True)
        return True

    def claim(self, identity: dict[str, Any], details: dict[str, Any], former: dict[str, Any] | None = None) -> None:
        """Records the identity of a new run, or checks that of a run to resume.

        Args:
            identity: all that must be equal for the run to resume, as JSON.
            details: further JSON for config.json, which may change between calls.
            former: values of entries that the run's record may lack, since an earlier version made it.

        Raises:
            ValueError: a difference; the message names the first one and suggests another run name.
        """
        identity, former = json.loads(json.dumps([identity, former or {}]))
        old = self.config()
        difference = None
        if old is not None:
            difference = _first_difference(_with_defaults(_without_resumable(old["identity"]), former), identity)
        if difference is not None:
            name, before, now = difference
            message = f"{name} is {now!r}; run {self.name!r} was made with {before!r}"
            if name in FINGERPRINTS:
                message = f"{FINGERPRINTS[name]} differs from the one that run {self.name!r} was made with"
            raise ValueError(
                f"{message}. Use another run name such as {next_name(self.path)!r}, set it back to go on, or choose "
                "resume = restart."
            )
        write_json(self.path / "config.json", {"version": 1, "identity": identity, **details})

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        if not self._metrics.exists():
            return []
        return [json.loads(line) for line in self._metrics.read_text(encoding="utf-8").splitlines() if line]

    def add_row(self, row: dict[str, Any]) -> None:
        with open(self._metrics, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")

    def metrics_size(self) -> int:
        """Size of metrics.jsonl in bytes, after flushing it to disk."""
        if self._metrics.exists():
            sync(self._metrics)
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Deletes the rows written after a state was saved. Raises ValueError when earlier rows are missing."""
        if self.metrics_size() < size:
            raise ValueError(
                f"{self._metrics} is {self.metrics_size()} bytes; expected at least the saved state's {size}. "
                "Put the file back, or choose resume = restart to begin again."
            )
        if self._metrics.exists():
            with open(self._metrics, "r+b") as file:
                file.truncate(size)


def next_name(path: Path) -> str:
    """The first of `name 2`, `name 3`, ... that no folder next to `path` has."""
    number = 2
    while path.with_name(f"{path.name} {number}").exists():
        number += 1
    return f"{path.name} {number}"


def move_aside(path: Path) -> None:
    """Renames an existing run folder to the first free `name (old N)`."""
    if path.exists():
        number = 1
        while path.with_name(f"{path.name} (old {number})").exists():
            number += 1
        path.rename(path.with_name(f"{path.name} (old {number})"))


def _without_resumable(old: dict[str, Any]) -> dict[str, Any]:
    """A recorded identity without the settings that a resumed run may change, which early versions recorded too."""
    if "settings" not in old:
        return old
    return old | {"settings": {k: v for k, v in old["settings"].items() if k not in RESUMABLE_SETTINGS}}


def _with_defaults(old: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """`old` with the entries of `former` that it lacks, also in nested dictionaries."""
    shared = [key for key in old if isinstance(old[key], dict) and isinstance(former.get(key), dict)]
    nested = {key: _with_defaults(old[key], former[key]) for key in shared}
    return former | old | nested


def _first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first path at which two JSON values differ, with both values; None where they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        if path in SKETCHES:
            return None if sketches_match(old, new) else (path, old, new)
        for key in [*new, *(k for k in old if k not in new)]:
            difference = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if difference is not None:
                return difference
        return None
    return None if old == new else (path, old, new)
