"""Regular texts in long phases: clients give up on a server that sends nothing (comfy-cli after two minutes)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

INTERVAL = 5.0
"""Seconds without a text after which the phase is sent again."""


class Heartbeat:
    """While entered, a thread sends the present phase and its seconds whenever nothing else was sent for a while.

    Args:
        send: sends a text to the client; also called from the thread.
        interval: seconds without a text.
        phase: the first phase.
    """

    sent = False
    """Whether the thread has sent anything yet."""

    def __init__(self, send: Callable[[str], None], interval: float = INTERVAL, phase: str = "loading"):
        self._send, self._interval = send, interval
        self._phase, self._phase_start, self._last_text = phase, time.monotonic(), time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._run, name="retune heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._stop.set()
        self._thread.join()

    def set_phase(self, text: str) -> None:
        """The phase from now on; its seconds count from the first call with this text."""
        if text != self._phase:
            self._phase, self._phase_start = text, time.monotonic()

    def reset(self) -> None:
        """To be called whenever another text was sent."""
        self._last_text = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last text."""
        return time.monotonic() - self._last_text

    @property
    def phase_seconds(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._phase_start

    def _run(self) -> None:
        while not self._stop.wait(max(0.01, self._interval - self.silence)):
            if self.silence >= self._interval:
                self.reset()
                self.sent = True
                self._send(f"{self._phase} … {self.phase_seconds:.0f} s")
