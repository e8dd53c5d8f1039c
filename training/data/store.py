"""Stores encoded values on disk by their keys, and the most recently used ones in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..common.files import write_bytes
from ..common.foreign import FileError, read_bytes, reading
from ..common.full_precision import full_precision
from ..common.parallel import computed_ahead
from .folder import Progress

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

MEMORY = 512 << 20
"""Default size of the part in memory, in bytes."""
SPARE_DISK = 64 << 20
"""Disk space to leave free, in bytes."""
LARGEST_ENTRY = 4 << 30
"""Bytes of an entry's file that is read."""
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class Entry(NamedTuple):
    """A value of the cache: its `key`, its `size` relative to other entries, and its `name` for messages."""

    key: str
    size: float
    name: str
    prepare: Callable[[], Any]
    """Reads what is encoded; safe to call from several threads."""
    encode: Callable[[Any], Tensors]
    """The value from what `prepare` returned."""

    def encoded(self, prepared: Any) -> Tensors:
        """`encode` without autocast: a value is the same whether a step asks for it or a cache is filled with it."""
        with full_precision():
            return self.encode(prepared)


class Store:
    """Stores dictionaries of tensors in `folder/ab/abcd....safetensors`, and the most recently used ones in memory."""

    def __init__(self, folder: Path, memory: int):
        self.folder = folder
        self._memory = memory
        self._recent: OrderedDict[str, Tensors] = OrderedDict()
        self._recent_bytes = 0

    def get(self, entry: Entry, write: bool = True) -> Tensors:
        """The entry's tensors, encoded first if they are neither in memory nor on disk; written to disk if `write`."""
        if entry.key in self._recent:
            self._recent.move_to_end(entry.key)
            return self._recent[entry.key]
        tensors = self._read(entry.key)
        if tensors is None and not write:
            tensors = entry.encoded(entry.prepare())
        elif tensors is None:
            data = _pack(entry.encoded(entry.prepare()))
            self._write(entry.key, data, len(data))
            tensors = self._read(entry.key)
            assert tensors is not None, "a cache entry cannot be read right after it was written"
        self._remember(entry.key, tensors)
        return tensors

    def fill(self, entries: Callable[[], Iterable[Entry]], kind: str, on_progress: Progress | None) -> int:
        """Encodes and writes missing entries; returns their number.

        Threads check what is there and prepare what is missing; the caller's thread encodes one entry after another.
        What is in memory does not grow with the number of entries, apart from a few bytes for each.

        Args:
            entries: makes them anew at each call, in the same order; equal keys count once.
            kind: of the values, for messages.
            on_progress: called after each entry; may raise to cancel, and what is written stays.
        """
        missing, count, remaining = self._missing(entries())
        if on_progress and count:
            on_progress(count - len(missing), count, f"caching {kind}")
        wanted = (entry for number, entry in enumerate(entries()) if number in missing)
        with closing(computed_ahead(_prepare, wanted)) as ahead:
            self._encode_all(ahead, kind, remaining, (count - len(missing), count), on_progress)
        return len(missing)

    def _encode_all(
        self,
        prepared: Iterable[tuple[Entry, Any]],
        kind: str,
        remaining: float,
        progress: tuple[int, int],
        on_progress: Progress | None,
    ) -> None:
        """Encodes and writes entries of size `remaining` in all; progress: entries done, and in all.

        The size of the first written entry gives the estimate of the disk space for the rest.
        """
        bytes_per_size, (before, count) = 0.0, progress
        for done, (entry, value) in enumerate(prepared, start=1 + before):
            data = _pack(entry.encoded(value))
            if not bytes_per_size:
                bytes_per_size = len(data) / entry.size
                self._check_space(bytes_per_size * remaining)
            self._write(entry.key, data, bytes_per_size * remaining)
            remaining -= entry.size
            if on_progress:
                on_progress(done, count, f"caching {kind}: {entry.name}")

    def _missing(self, entries: Iterable[Entry]) -> tuple[set[int], int, float]:
        """Numbers of the entries that are not on disk, the number of different ones, and the missing ones' size."""
        seen: set[bytes] = set()
        missing, size = set(), 0.0

        def first_of_its_key() -> Iterator[tuple[int, Entry]]:
            for number, entry in enumerate(entries):
                key = bytes.fromhex(entry.key)[:16]
                if key not in seen:
                    seen.add(key)
                    yield number, entry

        for number, entry, found in computed_ahead(self._look_up, first_of_its_key()):
            if not found:
                missing.add(number)
                size += entry.size
        return missing, len(seen), size

    def _look_up(self, numbered: tuple[int, Entry]) -> tuple[int, Entry, bool]:
        number, entry = numbered
        return number, entry, self._read(entry.key) is not None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """The tensors of an entry on disk; None if it is missing or damaged."""
        path = self._path(key)
        try:
            data = read_bytes(path, LARGEST_ENTRY)
            with reading(path):
                return _unpack(data)
        except FileNotFoundError:
            return None
        except FileError as error:
            log.warning("a damaged entry of the cache is encoded again: %s", error)
            return None

    def _write(self, key: str, data: bytes, needed: float) -> None:
        """Writes an entry; `needed` is the disk space in bytes for it and the rest, for the message of a full disk."""
        try:
            write_bytes(self._path(key), data)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise self._disk_full(needed) from error
            raise

    def _check_space(self, needed: float) -> None:
        """Raises OSError (ENOSPC) unless `needed` bytes fit on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < needed + SPARE_DISK:
            raise self._disk_full(needed)

    def _disk_full(self, needed: float) -> OSError:
        free = shutil.disk_usage(self.folder).free / 2**20
        return OSError(
            errno.ENOSPC,
            f"the disk has {free:.0f} MiB free; expected about {(needed + SPARE_DISK) / 2**20:.0f} MiB for the rest of "
            "the cache. Free space or choose another folder; what is cached so far is kept",
            str(self.folder),
        )

    def _remember(self, key: str, tensors: Tensors) -> None:
        """Puts an entry into memory, and drops the least recently used ones beyond the limit."""
        self._recent[key] = tensors
        self._recent_bytes += _nbytes(tensors)
        while self._recent_bytes > self._memory and len(self._recent) > 1:
            self._recent_bytes -= _nbytes(self._recent.popitem(last=False)[1])


def _prepare(entry: Entry) -> tuple[Entry, Any]:
    return entry, entry.prepare()


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _pack(tensors: Tensors) -> bytes:
    """The content of an entry's file, with a checksum in its metadata."""
    return save(tensors, metadata={"sha256": _digest(tensors)})


def _unpack(data: bytes) -> Tensors:
    """The tensors in an entry's file; ValueError if the checksum does not match.

    The file is read into memory, not mapped: a mapped file cannot be replaced on Windows.
    """
    with torch.inference_mode(False):
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header["__metadata__"]["sha256"] != _digest(tensors):
        raise ValueError("its checksum does not match")
    return tensors


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
