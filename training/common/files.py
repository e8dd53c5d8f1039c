"""Reads and writes files. A file is written to a temporary name in its folder, then renamed: it is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from . import foreign
from .foreign import existing_file, read_pickle, read_tensors

__all__ = ["existing_file", "read_pickle", "read_tensors"]
_RENAME_TIMEOUT = 2.0
"""Seconds that a rename is tried while the target is open in another program, which Windows refuses to replace."""


def _default_mode() -> int:
    """Permissions of files that `open` creates in this process."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _default_mode()


def replace(temporary: Path, path: Path) -> None:
    """`os.replace` that tries again for two seconds while the target is open in another program (Windows)."""
    deadline = time.monotonic() + _RENAME_TIMEOUT
    while True:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def sync(path: Path) -> None:
    """Waits until a file's data is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it to `path` on success, removes it when anything is raised.

    durable: the data is on the disk before the rename, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes bytes, wholly or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Writes UTF-8 text, wholly or not at all, with the same line ends on every system; durable: see `atomic_path`."""
    with atomic_path(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, wholly or not at all; it is on the disk when this returns."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False), durable=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, wholly or not at all. Raises ValueError when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    try:
        with atomic_path(path, durable=True) as temporary:
            ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(ready, temporary, dict(metadata or {}))
            temporary.chmod(_MODE)  # safetensors creates files that only their owner may read
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise _disk_full(path, size) from error


def _disk_full(path: Path, size: int) -> ValueError:
    """The error for a file of `size` bytes that does not fit on its disk."""
    return ValueError(
        f"free disk space under {path.parent} is too small for {path.name} ({size / 2**20:.0f} MB). "
        "Make room, then queue the same run again: it goes on from its last state."
    )


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises ValueError with the file's name when it is damaged."""
    return foreign.read_json(path, advice="Put the file back, or begin the run again.")


def check_free_disk(folder: Path, needed: int) -> None:
    """Raises ValueError when fewer than `needed` bytes are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"free disk space under {folder} is {free / 2**20:.0f} MB; expected at least {needed / 2**20:.0f} MB "
            "for this run's state and result. Make room or use another output folder."
        )
