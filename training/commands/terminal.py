"""How a verb talks to a terminal: progress as lines, the result as text or JSON, errors as one line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.callbacks import Callbacks, StepInfo
from ..common.distributed import world
from ..common.files import write_text
from ..common.foreign import unforeseen
from ..loop.memory import OutOfMemory
from .comfyui_server import WorkflowFailed

log = logging.getLogger(__name__)
INTERVAL = 2.0
"""Seconds between two lines of progress."""
ERROR_LOG = "error.log"
"""File of a run's folder with the traceback of an error that nobody foresaw."""


class Unforeseen(RuntimeError):
    """An error that no check foresaw; the message names the run or the verb."""


FORESEEN = (ValueError, OSError, WorkflowFailed, OutOfMemory)
"""What checks raise: errors that the user can fix."""


class Terminal(Callbacks):
    """Progress of the main process as lines on standard error, at most one every two seconds."""

    def __init__(self):
        self._last = 0.0

    def on_text(self, text: str) -> None:
        self._write(text)

    def on_memory(self, text: str, needed: int) -> None:
        self._write(text, always=True)

    def on_end(self, text: str) -> None:
        self._write(text, always=True)

    def on_step(self, info: StepInfo) -> None:
        left = (info.steps - info.step) * info.seconds_per_step
        pace = f"{info.seconds_per_step:.2f} s/step  {left:.0f} s left"
        text = f"step {info.step}/{info.steps}  loss {info.loss:.4f}  {pace}"
        self._write(text, info.step == info.steps)

    def _write(self, text: str, always: bool = False) -> None:
        if world().is_main and (always or time.monotonic() - self._last > INTERVAL):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
            self._last = time.monotonic()


def run_verb(function: Callable[[argparse.Namespace], Mapping[str, Any]], arguments: argparse.Namespace) -> int:
    """Runs a verb and writes its result: a line for each value or, with `arguments.json`, one JSON object.

    Returns:
        The exit status: 0; 2 after an error that the user can fix, which is written as one line; 1 after any other,
        whose traceback is in the run's folder; 130 after Ctrl-C. With --verbose every traceback is printed.
    """
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    try:
        with _net(arguments):
            result = function(arguments)
    except (*FORESEEN, Unforeseen) as error:
        log.info("traceback of the error", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, Unforeseen) else 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on where it was\n")
        return 130
    if world().is_main:
        lines = json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items())
        sys.stdout.write(f"{lines}\n")
        sys.stdout.flush()
    return 0


def say(text: str) -> None:
    """Prints a line on standard error, in the main process."""
    if world().is_main:
        sys.stderr.write(f"{text}\n")


@contextmanager
def _net(arguments: argparse.Namespace) -> Iterator[None]:
    """Raises Unforeseen in place of an exception that no check foresaw."""
    try:
        yield
    except FORESEEN:
        raise
    except Exception as error:
        raise Unforeseen(_with_advice(error, arguments)) from error


def _with_advice(error: Exception, arguments: argparse.Namespace) -> str:
    """The line for an unforeseen error; its traceback goes into the folder of the run, if there is one.

    Each of several processes has a file of its own: that in which the others found one gone does not replace the cause.
    """
    name = getattr(arguments, "run_name", None)
    text = unforeseen(f"run {name}" if name else arguments.verb, error)
    folder = Path(arguments.output) / name if name and getattr(arguments, "output", None) else None
    if folder is None or not folder.is_dir():
        return f"{text} Please report it with the traceback, which --verbose prints."
    rank = os.environ.get("RANK", "0")  # not `world`: joining the processes may be what failed
    log_file = folder / (ERROR_LOG if rank == "0" else f"error {rank}.log")
    write_text(log_file, "".join(traceback.format_exception(error)))
    return f"{text} Please report it with {log_file}. Its state is kept: the same command goes on from there."
