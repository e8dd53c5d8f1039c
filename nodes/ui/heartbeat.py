"""Signs of life in long phases: clients give up on a server that says nothing (comfy-cli after two minutes)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

INTERVAL = 5.0
"""Seconds without a word after which the phase is said again."""


class Heartbeat:
    """While entered, a thread repeats what goes on, with the seconds it has taken, whenever nothing else was said.

    say: tells a text to whoever waits; it is called from that thread too. phase: what goes on at first. spoke: whether
    the thread has said anything yet.
    """

    def __init__(self, say: Callable[[str], None], interval: float = INTERVAL, phase: str = "loading"):
        self._say, self._interval = say, interval
        self._phase, self._began, self._said = phase, time.monotonic(), time.monotonic()
        self.spoke = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._beat, name="retune heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._over.set()
        self._thread.join()

    def phase(self, text: str) -> None:
        """What goes on from now; the seconds count from where it was first said."""
        if text != self._phase:
            self._phase, self._began = text, time.monotonic()

    def said(self) -> None:
        """Something was told just now."""
        self._said = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since something was told."""
        return time.monotonic() - self._said

    @property
    def seconds(self) -> float:
        """How long the phase has taken."""
        return time.monotonic() - self._began

    def _beat(self) -> None:
        while not self._over.wait(max(0.01, self._interval - self.silence)):
            if self.silence >= self._interval:
                self.said()
                self.spoke = True
                self._say(f"{self._phase} … {self.seconds:.0f} s")
