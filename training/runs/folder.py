"""A run is a folder: config, metrics, samples, state and result, each written whole or not at all.

<run>/config.json       the run's settings, identity and machine; both of each stretch of steps, where they changed
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

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..common.files import (
    WriteFailed,
    append_text,
    long_path,
    overwrite,
    remove,
    replace,
    sync,
    write_bytes,
    write_json,
    writing,
)
from ..common.fingerprint import sketches_match
from ..config.checks import check_run_name
from ..config.run import RESUMABLE_SETTINGS
from ..demo.editions import BASE, edition_of_run
from .records import read_config, read_rows, read_status
from .state_file import saved_step

log = logging.getLogger(__name__)

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
LONGEST_NAME = 100
"""Characters of the longest name in a run's folder: that of TensorBoard's events."""
LOCK_TIMEOUT = 0.3
"""Seconds to wait for a run's lock: a list of runs holds it for a moment to find out whether the run is in use."""


class RunConflict(ValueError):
    """A run of this name cannot go on with these settings. What its message advises is here in data.

    Attributes:
        other_name: a name that no run has; None where another name is no way out.
        setting: dotted name of the setting that differs, such as "settings.optimizer"; None where no input holds it.
        before: the value that the run has of it.
    """

    def __init__(self, message: str, other_name: str | None = None, setting: str | None = None, before: Any = None):
        super().__init__(message)
        self.other_name, self.setting, self.before = other_name, setting, before


class RunFolder:
    """One run's files. `RunFolder.open` locks them against other processes."""

    def __init__(self, path: Path):
        self.path = path = long_path(path, LONGEST_NAME)
        self.record: str | None = None
        """Identifies the settings that the run was begun with; a state holds it too. None until `claim`."""
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
        with _lock(root, name):
            folder = cls(root / name)
            if resume == "restart":
                move_aside(folder.path)
            with writing(folder.samples):
                folder.samples.mkdir(parents=True, exist_ok=True)
            for partial in folder.path.rglob(".*.tmp"):  # of a killed process
                if partial.is_file():
                    with writing(partial):
                        remove(partial)
            yield folder

    def config(self) -> dict[str, Any] | None:
        """The content of config.json, or None in a new folder."""
        path = self.path / "config.json"
        return read_config(path) if path.exists() else None

    def base(self) -> dict[str, str]:
        """The metadata entry of the run's results that says which model it trained."""
        return {BASE: (self.config() or {})["identity"]["model"]}

    @property
    def failed_at_once(self) -> bool:
        """Whether the run ended with an error, such as for want of memory, before it had begun to train: the name is
        free for other settings."""
        status, traces = self.status(), (self.latest, self.best, self.guarded, self._metrics)
        return status["state"] == "failed" and status["step"] == 0 and not any(path.exists() for path in traces)

    def status(self) -> dict[str, Any]:
        """The content of status.json; state "new" without one."""
        path = self.path / "status.json"
        return read_status(path) if path.exists() else {"state": "new", "step": 0}

    def pictures(self) -> dict[str, Path]:
        """The existing sample pictures by name, without links."""
        if self.samples.is_symlink() or not self.samples.is_dir():
            return {}
        paths = [path for path in self.samples.iterdir() if path.suffix == ".png"]
        return {path.name: path for path in paths if path.is_file() and not path.is_symlink()}

    def set_status(self, state: str, step: int, **more: Any) -> None:
        """Writes status.json; on a full disk into the space that it has already."""
        path, status = self.path / "status.json", {"state": state, "step": step, **more}
        try:
            write_json(path, status)
        except WriteFailed as error:
            log.warning("%s; it is written over", error)
            overwrite(path, json.dumps(status))

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
            RunConflict: a difference, unless the run `failed_at_once`; the message names the first one and suggests
                another run name.
        """
        identity, former = json.loads(json.dumps([identity, former or {}]))
        old = self.config()
        if old is None:
            self._expect_nothing_trained()
        elif self.failed_at_once:
            old = None
        else:
            self._expect_same(_with_defaults(_without_resumable(old["identity"]), former), identity)
        old = old or {}
        self.record = old.get("record") or _digest(identity)
        about = {"version": 1, "identity": identity, **details, "record": self.record}
        write_json(self.path / "config.json", about | {"stretches": self._stretches(old, details)})
        if self.status()["state"] == "new":  # takes the space in which a full disk can be told later
            self.set_status("new", 0)

    def _expect_nothing_trained(self) -> None:
        """Raises RunConflict where a run was trained whose settings are lost: others would go on with its state."""
        for path in (self.latest, self.best, self.guarded, self.path / "status.json", self._metrics):
            if path.exists():
                other = next_name(self.path)
                raise RunConflict(
                    f"run {self.name!r} has {path.relative_to(self.path).as_posix()} but no config.json; expected its "
                    f"settings. Put the file back, use another run name such as {other!r}, or choose resume = restart.",
                    other,
                )

    def _expect_same(self, old: dict[str, Any], identity: dict[str, Any]) -> None:
        difference = _first_difference(old, identity)
        if difference is None:
            return
        name, before, now = difference
        message = f"{name} is {now!r}; run {self.name!r} was made with {before!r}"
        if name in FINGERPRINTS:
            message = f"{FINGERPRINTS[name]} differs from the one that run {self.name!r} was made with"
        if (earlier := edition_of_run(old)) and earlier != (here := edition_of_run(identity)):
            message = f"run {self.name!r} was made with {earlier}; this is {here or 'another model'}"
        other = next_name(self.path)
        raise RunConflict(
            f"{message}. Use another run name such as {other!r}, set it back to go on, or choose resume = restart.",
            other,
            name,
            before,
        )

    def _stretches(self, old: dict[str, Any], details: dict[str, Any]) -> list[dict[str, Any]]:
        """One record for each stretch of steps that was trained with other settings or on another machine."""
        now = {name: details[name] for name in ("config", "environment") if name in details}
        before = {name: old[name] for name in ("config", "environment") if name in old}
        step = saved_step(self.latest)
        stretches = old.get("stretches") or ([{"after_step": 0, **before}] if before else [])
        kept = [stretch for stretch in stretches if stretch["after_step"] < step]
        if kept and {key: value for key, value in kept[-1].items() if key != "after_step"} == _as_json(now):
            return kept
        return [*kept, {"after_step": step, **now}]

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, without a last one that is being written."""
        return read_rows(self._metrics)

    def add_row(self, row: dict[str, Any]) -> None:
        append_text(self._metrics, json.dumps(row) + "\n")

    def metrics_size(self) -> int:
        """Size of metrics.jsonl in bytes, after flushing it to disk."""
        if self._metrics.exists():
            with writing(self._metrics):
                sync(self._metrics)
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Deletes the rows written after a state was saved. Raises ValueError when earlier rows are missing."""
        self._restore_line_ends()
        if self.metrics_size() < size:
            raise ValueError(
                f"{self._metrics} is {self.metrics_size()} bytes; expected at least the saved state's {size}. "
                "Put the file back, or choose resume = restart to begin again."
            )
        if not self._metrics.exists():
            return
        with writing(self._metrics), open(self._metrics, "r+b") as file:
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                raise ValueError(
                    f"{self._metrics} has no end of a row at byte {size}, where the saved state's rows end; expected "
                    "the file as it was written. Put it back, or choose resume = restart to begin again."
                )
            file.truncate(size)

    def _restore_line_ends(self) -> None:
        """Undoes what an editor or git on Windows may have done to metrics.jsonl."""
        data = self._metrics.read_bytes() if self._metrics.exists() else b""
        if b"\r\n" in data:
            write_bytes(self._metrics, data.replace(b"\r\n", b"\n"))


def _lock(root: Path, name: str) -> AbstractContextManager:
    """A run's lock, acquired; ValueError when another process has it."""
    path = long_path(root, LONGEST_NAME) / ".locks" / f"{name}.lock"
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(path).acquire(timeout=LOCK_TIMEOUT, poll_interval=LOCK_TIMEOUT / 10)
    except Timeout as error:
        raise ValueError(
            f"run {name!r} is in use by another process. Wait for it, stop it, or choose another run name."
        ) from error


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
        with writing(path):
            replace(path, path.with_name(f"{path.name} (old {number})"))


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


def _as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
