"""Files that are either whole or absent: written to a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

_PATIENCE = 2.0
"""Seconds that a rename waits for another program's hand on the target: Windows refuses to replace an open file."""


def _usual_mode() -> int:
    """What `open` gives new files in this process."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _usual_mode()


def replace(temporary: Path, path: Path) -> None:
    """`os.replace` that tries again for two seconds where a virus scanner or a reader holds the file open (Windows)."""
    deadline = time.monotonic() + _PATIENCE
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
    """Gives a temporary name beside `path`; renames it to `path` on success, removes it when anything is raised.

    durable: the data is on the disk itself before the rename, so that a power cut leaves the old file or the new one.
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
    """Writes bytes whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Writes UTF-8 text, lines ended by a newline on every system, whole or not at all; durable as `atomic_path`."""
    with atomic_path(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all; it is on the disk when this returns."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False), durable=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all. Raises ValueError when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    try:
        with atomic_path(path, durable=True) as temporary:
            ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(ready, temporary, dict(metadata or {}))
            temporary.chmod(_MODE)  # safetensors makes files that their owner alone may read
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise ValueError(
            f"free disk space under {path.parent} is too small for {path.name} ({size / 2**20:.0f} MB). "
            "Make room, then queue the same run again: it goes on from its last state."
        ) from error


def read_tensors(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata, copied out: a file that stays mapped cannot be replaced on Windows.

    prefix: only tensors whose names begin with it are read. Errors: ValueError for a damaged file or one of another
    kind, FileNotFoundError where there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged or no safetensors file ({error}). Save or download it again."
        ) from error


_DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError)
_DAMAGED += (AssertionError, struct.error)
"""What torch.load raises for bytes that are no pickle of it, or cut, or changed."""


def read_pickle(path: str | Path) -> Any:
    """What torch.save wrote, on the CPU; nothing but tensors, numbers, texts, lists and dicts is made of it.

    Errors: ValueError for a damaged file or one with code, FileNotFoundError where there is none.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ValueError(f"{path.name} is damaged or holds more than tensors. Convert it to safetensors.") from error


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises ValueError that names the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Put the file back, or begin the run again.") from error


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
