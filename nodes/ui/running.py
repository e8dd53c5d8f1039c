"""The runs that are in progress in this ComfyUI, and a way to ask one to finish."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_asked: dict[str, threading.Event] = {}
"""Run name -> whether it was asked to finish, for as long as it is in progress."""


@contextmanager
def running(run_name: str) -> Iterator[threading.Event]:
    """Makes a run known while entered; the event is set when somebody asks it to finish."""
    asked = _asked[run_name] = threading.Event()
    try:
        yield asked
    finally:
        _asked.pop(run_name, None)


def finish(run_name: str) -> bool:
    """Asks a run to end cleanly after the step in progress, from any thread. True when it is in progress here."""
    asked = _asked.get(run_name)
    if asked is None:
        return False
    asked.set()
    return True
