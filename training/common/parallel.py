"""Work done ahead by threads, in order and with little in memory at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 8
"""Threads at most: reading files and decoding pictures gains little from more."""


def worker_count() -> int:
    """Threads for reading and decoding: the processors that this process may use, at most MAX_WORKERS."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)


def computed_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """`function(item)` of each item in the items' order, computed by threads.

    At most two results for each worker are in memory, so that a slow consumer holds the workers up. An exception is
    raised in its place; what is computed then is waited for.

    Args:
        function: safe to call from several threads.
        items: read ahead as far as the results.
        workers: threads; None: `worker_count()`.
    """
    workers, items = workers or worker_count(), iter(items)
    with ThreadPoolExecutor(workers, "retune-ahead") as pool:
        ahead: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(items, 2 * workers))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
