"""The runs in progress in this ComfyUI, and how another thread asks one to finish."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_finish_events: dict[str, threading.Event] = {}
"""Name of a run in progress -> event that is set when it is asked to finish."""


@contextmanager
def running(run_name: str) -> Iterator[threading.Event]:
    """While entered, the run counts as in progress; the event is set when it is asked to finish."""
    event = _finish_events[run_name] = threading.Event()
    try:
        yield event
    finally:
        _finish_events.pop(run_name, None)


def finish(run_name: str) -> bool:
    """Asks a run to end cleanly after its present step, from any thread; False when it is not in progress here."""
    event = _finish_events.get(run_name)
    if event is not None:
        event.set()
    return event is not None
