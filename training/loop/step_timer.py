"""How long optimizer steps take, for progress displays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

WEIGHT = 0.1
"""Of the newest step in the moving average."""


class StepTimer:
    """Moving average of the seconds per optimizer step."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Counts the time inside as one step."""
        start = time.perf_counter()
        yield
        seconds, average = time.perf_counter() - start, self.seconds_per_step
        self.seconds_per_step = (1 - WEIGHT) * average + WEIGHT * seconds if average else seconds
