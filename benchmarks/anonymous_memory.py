"""Peak memory of this process by phase: anonymous pages, which file caches and mapped weight files are no part of."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")
EVERY = 0.01
"""Seconds between two looks."""


def anonymous_bytes() -> int:
    """Bytes of this process that no file backs: Linux's RssAnon; elsewhere what the process alone holds (USS)."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024
    return psutil.Process().memory_full_info().uss


class PeakMemory:
    """Watches this process in a thread of its own while entered; `peaks` has the most bytes of each phase, above
    those at the start. On a GPU `gpu_peaks` has those of torch's allocator."""

    def __init__(self):
        self.start, self.peaks, self.gpu_peaks = anonymous_bytes(), {}, {}
        self._phase, self._over = "", threading.Event()
        self._lock, self._thread = threading.Lock(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.begin("")
        self._over.set()
        self._thread.join()

    def now(self) -> int:
        """Bytes of the same kind as the peaks, at this moment."""
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else anonymous_bytes() - self.start

    def begin(self, phase: str) -> None:
        """Ends the phase before and begins another."""
        self._look()
        if torch.cuda.is_available():
            self.gpu_peaks[self._phase] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with self._lock:
            self._phase = phase
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self._look()

    def _look(self) -> None:
        with self._lock:
            now = anonymous_bytes() - self.start
            self.peaks[self._phase] = max(now, self.peaks.get(self._phase, 0))
