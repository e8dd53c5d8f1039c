"""Timing variants of one thing in turns, so that what else a machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Variants = Mapping[str, Callable[[], object]]
Key = TypeVar("Key", bound=Hashable)


def medians(
    variants: Mapping[Key, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, float]:
    """Median seconds of each variant; in each round every variant has one turn, after one that is not counted."""
    times: dict[Key, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            began = clock()
            call()
            if number:
                times[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in times.items()}
