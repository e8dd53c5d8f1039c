"""Reads and writes files. A file is written to a temporary name in its folder, then renamed: it is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from . import foreign
from .tensor_writer import Visit, write_content

WINDOWS = sys.platform == "win32"
_OPEN_ELSEWHERE = 2.0
"""Seconds that a rename or a deletion is tried while the file is open in another program, which Windows refuses."""
_LONGEST_PATH = 259
"""Characters of the longest path that Windows takes without a prefix."""
_TEMPORARY_LENGTH = 40
RESERVED_NAMES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    "CONIN$",
    "CONOUT$",
    *(f"{p}{i}" for p in ("COM", "LPT") for i in range(10)),
}
_RAISED = str.maketrans("\u00b9\u00b2\u00b3", "123")
Result = TypeVar("Result")
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_WINDOWS_FULL = {39, 112}
"""Numbers that Rust's messages have for a full disk on Windows."""


class WriteFailed(OSError, ValueError):
    """A file that could not be written; the message names it, and on a full disk what it needs."""


@contextmanager
def writing(path: str | Path, size: int = 0) -> Iterator[None]:
    """Turns an error of writing a file into a WriteFailed that names it.

    Args:
        path: The file that is written, not the temporary one.
        size: Bytes that it needs; 0 where nobody knows.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (WriteFailed, TimeoutError):  # also that of a lock
        raise
    except (OSError, SafetensorError) as error:
        raise _write_failed(Path(path), size, error) from error


def _write_failed(path: Path, size: int, error: Exception) -> WriteFailed:
    number = _error_number(error)
    if number in _FULL:
        message = f"free disk space under {path.parent} is {_free(path.parent)}too small for {path.name}"
        message += f" ({size / 2**20:.0f} MB). Make room, then try again." if size else ". Make room, then try again."
    elif isinstance(error, PermissionError):
        message = f"{path} cannot be written ({error.strerror}). Close programs that have it open, or allow writing."
    else:
        reason = getattr(error, "strerror", None) or error
        message = f"{path} cannot be written ({reason}). Choose a folder that can be written, then try again."
    failed = WriteFailed(message)
    failed.errno = number
    return failed


def _error_number(error: Exception) -> int | None:
    """The errno of an error, also of one that comes from Rust, which has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else None
    return errno.ENOSPC if "No space left" in str(error) or (WINDOWS and number in _WINDOWS_FULL) else number


def _free(folder: Path) -> str:
    """Free space in words; nothing where the system does not say."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MB, "
    except OSError:
        return ""


def long_path(path: str | Path, longest: int = _TEMPORARY_LENGTH) -> Path:
    """A path that Windows takes although it, or a file in it, has more than 259 characters; unchanged elsewhere.

    longest: characters of the longest name that will follow it.
    """
    return Path(_prefixed(os.path.abspath(path), longest)) if WINDOWS else Path(path)


def _prefixed(path: str, longest: int) -> str:
    """An absolute path of Windows, with the prefix that switches its limit off where that is needed."""
    if len(path) + longest <= _LONGEST_PATH or path.startswith("\\\\?\\"):
        return path
    return "\\\\?\\UNC\\" + path[2:] if path.startswith("\\\\") else "\\\\?\\" + path


def is_reserved(name: str) -> bool:
    """Whether Windows takes a file name for a device: CON, also with an ending, blanks before it or a raised digit."""
    return name.split(".")[0].rstrip(" ").translate(_RAISED).upper() in RESERVED_NAMES


def while_open_elsewhere(action: Callable[[], Result]) -> Result:
    """Does something to a file, again and again for two seconds while another program has it open (Windows)."""
    deadline = time.monotonic() + _OPEN_ELSEWHERE
    while True:
        try:
            return action()
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def replace(temporary: Path, path: Path) -> None:
    """Renames a file or a folder, over an existing file; tries again while that is open in another program."""
    while_open_elsewhere(lambda: os.replace(temporary, path))


def remove(path: Path) -> None:
    """Deletes a file, if there is one; tries again while it is open in another program."""
    while_open_elsewhere(lambda: path.unlink(missing_ok=True))


def sync(path: Path) -> None:
    """Waits until a file's data is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: str | Path, durable: bool = False, size: int = 0) -> Iterator[Path]:
    """Yields an empty temporary file in the same folder; renames it to `path` on success, removes it otherwise.

    Args:
        path: The file to write.
        durable: The data is on the disk before the rename, so that a power cut leaves the old file or the new one.
        size: Bytes that it needs, for the error of a full disk.

    Raises:
        WriteFailed: The file cannot be written; what was there before stays.
    """
    path = long_path(path)
    if WINDOWS and is_reserved(path.name):
        raise WriteFailed(f"{path.name} is a device's name on Windows; expected another file name.")
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _create_temporary(path.parent)
        try:
            yield temporary
            if durable:
                sync(temporary)
            replace(temporary, path)
        finally:
            remove(temporary)


def _create_temporary(folder: Path) -> Path:
    """A new empty file with the permissions of files that `open` creates."""
    path = temporary_name(folder)
    with open(path, "xb"):
        return path


def temporary_name(folder: Path) -> Path:
    """A path in a folder that nothing has and no other thread or process takes."""
    names = (f".{os.getpid():x}.{threading.get_ident():x}.{number}.tmp" for number in count())
    return next(path for path in map(folder.joinpath, names) if not os.path.lexists(path))


def write_bytes(path: str | Path, data: bytes, durable: bool = False) -> None:
    """Writes bytes, wholly or not at all; durable: see `atomic_path`."""
    with atomic_path(path, durable, len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    r"""Writes UTF-8 text, wholly or not at all, with the same line ends on every system.

    durable: see `atomic_path`. Halves of characters, of names that are no text, are written as \udc80, as in JSON.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), durable)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, wholly or not at all; it is on the disk when this returns."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False), durable=True)


def append_text(path: str | Path, text: str) -> None:
    """Appends UTF-8 text to a file, wholly or not at all: what a full disk took is cut off again."""
    data = memoryview(text.encode("utf-8"))
    with writing(path, len(data)), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def overwrite(path: str | Path, text: str) -> None:
    """Writes a text over a file's content, padded with blanks, so that it needs no more space: not atomic."""
    data = text.encode("utf-8", "backslashreplace")
    with writing(path, len(data)), open(path, "r+b") as file:
        file.write(data.ljust(os.fstat(file.fileno()).st_size))
        file.truncate()


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    visit: Visit | None = None,
    late: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Writes a safetensors file, wholly or not at all, with one tensor after the other in RAM.

    Equal content gives equal bytes. visit, late: see `tensor_writer.write_content`. Raises WriteFailed, which on a full
    disk says how much is needed.
    """
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_path(path, durable=True, size=size) as temporary, open(temporary, "wb") as file:
        write_content(file, tensors, metadata or {}, visit, late)
        file.close()  # before the rename


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
