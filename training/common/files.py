"""Reads and writes files. A file is written to a temporary name in its folder, then renamed: it is whole or absent."""

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


def existing_file(path: str | Path) -> Path:
    """The path of a file; raises FileNotFoundError where there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def read_tensors(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, copied, and metadata. (Windows cannot replace a file that stays mapped.)

    prefix: reads only tensors whose names begin with it. Raises ValueError for a damaged file or one of another kind,
    FileNotFoundError where there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = existing_file(path)
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
"""Raised by torch.load for truncated or changed files and for those that torch.save did not write."""


def read_pickle(path: str | Path) -> Any:
    """The content of a file that torch.save wrote, on the CPU: tensors, numbers, texts, lists and dicts.

    Raises ValueError for a damaged file or one with code, FileNotFoundError where there is none.
    """
    import torch

    path = existing_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ValueError(f"{path.name} is damaged or holds more than tensors. Convert it to safetensors.") from error


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises ValueError with the file's name when it is damaged."""
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
