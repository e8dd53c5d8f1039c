"""Timing variants of one thing in turns, so that whatever else a machine does slows all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Variants = Mapping[str, Callable[[], object]]
Key = TypeVar("Key", bound=Hashable)


def median_seconds(
    variants: Mapping[Key, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, float]:
    """Median seconds of each variant over `rounds` rounds in which every variant runs once.

    One more round comes first and is not counted: it fills caches.
    """
    times: dict[Key, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            began = clock()
            call()
            if number:
                times[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in times.items()}
