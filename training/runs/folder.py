"""A run is a folder: config, metrics, samples, state and result, each written whole or not at all.

<run>/config.json       what was asked for, and on what machine
<run>/status.json       running, interrupted, failed or finished; step; message; how it ended (see `ending`)
<run>/metrics.jsonl     one row per optimiser step, and rows with `event`; no clock times, so equal runs are equal files
<run>/samples/          pictures, `<step>_<index>.png`
<run>/state/            latest.safetensors (masters, optimiser, average), best.safetensors and, of a guard,
                        guarded.safetensors (masters)
<run>/<artifact>        the result
<run>/report.html       all of it on one page, once the run is finished
<run>/tensorboard/      events for TensorBoard, where settings ask for them
<run>/finish            put there by somebody who wants the run to end after this step; it goes when it is seen
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
"""What a run's identity holds no more of than hashes or sketches, in words."""
SKETCHES = ("projection",)
"""Of these, the ones that are compared as `sketches_match` does."""
LOCK_TIMEOUT = 0.3
"""Seconds to wait for a run's lock: a list of runs takes it for a moment to see whether anybody is busy with one."""


class RunFolder:
    """One run's files. Open it with `RunFolder.open`, which also keeps other processes out."""

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
        """The folder root/name, locked until exit. resume="restart" moves an old one aside first.

        Raises ValueError for a name that is no plain folder name or a run that another process is busy with.
        """
        check_run_name(name)
        locks = root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(locks / f"{name}.lock").acquire(timeout=LOCK_TIMEOUT, poll_interval=LOCK_TIMEOUT / 10)
        except Timeout as error:
            raise ValueError(
                f"run {name!r} is in use by another process. Wait for it, stop it, or choose another run name."
            ) from error
        with held:
            if resume == "restart":
                move_aside(root / name)
            folder = cls(root / name)
            folder.samples.mkdir(parents=True, exist_ok=True)
            for torn in folder.path.rglob(".*.tmp"):  # a killed writer's
                torn.unlink()
            yield folder

    def config(self) -> dict[str, Any] | None:
        """What config.json holds, or None in a new folder."""
        path = self.path / "config.json"
        return read_json(path) if path.exists() else None

    def status(self) -> dict[str, Any]:
        path = self.path / "status.json"
        return read_json(path) if path.exists() else {"state": "new", "step": 0}

    def pictures(self) -> dict[str, Path]:
        """The sample pictures that are there, by name: true files, no links."""
        if self.samples.is_symlink() or not self.samples.is_dir():
            return {}
        found = [path for path in self.samples.iterdir() if path.suffix == ".png"]
        return {path.name: path for path in found if path.is_file() and not path.is_symlink()}

    def set_status(self, state: str, step: int, **more: Any) -> None:
        write_json(self.path / "status.json", {"state": state, "step": step, **more})

    def take_finish(self) -> bool:
        """Whether a file `finish` was in the folder; it is gone then."""
        asked = self.path / "finish"
        if not asked.is_file():
            return False
        with suppress(PermissionError):  # Windows: a program that made it holds it open still
            asked.unlink(missing_ok=True)
        return True

    def claim(self, identity: dict[str, Any], details: dict[str, Any], former: dict[str, Any] | None = None) -> None:
        """Records what this run is, or checks that a run going on is the same; details may change between calls.

        former: values of entries that the run's record may lack, since it was made before there were such. Raises
        ValueError that names the first difference and suggests another run name.
        """
        identity, former = json.loads(json.dumps([identity, former or {}]))
        old = self.config()
        before_now = _difference(_filled(_counting(old["identity"]), former), identity) if old is not None else None
        if before_now is not None:
            where, before, now = before_now
            what = f"{where} is {now!r}; run {self.name!r} was made with {before!r}"
            if where in FINGERPRINTS:
                what = f"{FINGERPRINTS[where]} differs from the one that run {self.name!r} was made with"
            raise ValueError(
                f"{what}. Use another run name such as {next_name(self.path)!r}, set it back to go on, or choose "
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
        """Bytes of metrics.jsonl, all of them on the disk."""
        if self._metrics.exists():
            sync(self._metrics)
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Forgets the rows written after a state was saved. Raises ValueError when rows before it are gone."""
        if self.metrics_size() < size:
            raise ValueError(
                f"{self._metrics} is {self.metrics_size()} bytes; expected at least the saved state's {size}. "
                "Put the file back, or choose resume = restart to begin again."
            )
        if self._metrics.exists():
            with open(self._metrics, "r+b") as file:
                file.truncate(size)


def next_name(path: Path) -> str:
    """The first of `name 2`, `name 3`, ... that does not exist beside a run folder."""
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


def _counting(old: dict[str, Any]) -> dict[str, Any]:
    """A recorded identity without the settings that were part of one in earlier versions and are not any more."""
    if "settings" not in old:
        return old
    return old | {"settings": {k: v for k, v in old["settings"].items() if k not in RESUMABLE_SETTINGS}}


def _filled(old: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """Old entries, and those of `former` that are missing among them, also in dictionaries below."""
    both = {k: _filled(v, former[k]) for k, v in old.items() if isinstance(v, dict) and isinstance(former.get(k), dict)}
    return former | old | both


def _difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first path at which two JSON values differ, with both values; None where they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        if where in SKETCHES:
            return None if sketches_match(old, new) else (where, old, new)
        for key in [*new, *(k for k in old if k not in new)]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found is not None:
                return found
        return None
    return None if old == new else (where, old, new)
