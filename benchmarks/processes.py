"""Variants of one thing, each run in a process of its own, in turns, never two at once; medians of their figures.

A process ends with all of its memory, so no variant finds another's caches, and none is in memory beside another.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

log = logging.getLogger(__name__)
KILLED = -9
"""Exit status of a process that the system ended, as it does when memory runs out."""
NOT_ENOUGH_MEMORY = 17
"""Exit status of a variant that did not fit into its device's memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process runs; all of it JSON."""

    bench: str
    """A name of `comparisons.COMPARISONS`."""
    variant: str
    """One of its variants."""
    size: str
    """"demo", "sd15" or "sdxl"."""
    model: str
    """diffusers folder with the weights."""
    work: str
    """Folder for what a run writes."""
    pixels: int
    batch_size: int
    rank: int
    rounds: int
    """Steps that are timed, after one that is not."""
    device: str
    comfyui: str = ""
    """ComfyUI's folder; empty without one."""
    began: float = 0.0
    """`time.time()` when the process was started."""


def run_case(case: Case, timeout: float | None = None) -> dict[str, Any]:
    """Runs one variant in a new process.

    Returns:
        What `variant.main` prints, or {"skipped": reason} where memory or time ran out.

    Raises:
        RuntimeError: The variant failed; the message ends with its last lines.
    """
    values = json.dumps({**asdict(case), "began": time.time()})
    command = [sys.executable, "-m", "retune.benchmarks.variant", values]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done in {timeout:.0f} s"}
    if done.returncode in (KILLED, NOT_ENOUGH_MEMORY):
        return {"skipped": "memory ran out"}
    if done.returncode:
        lines = "\n".join(done.stderr.splitlines()[-15:])
        raise RuntimeError(f"{case.bench}, variant {case.variant!r}, ended with code {done.returncode}:\n{lines}")
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turns(
    cases: Sequence[Case],
    turns: int,
    on_text: Callable[[str], None] = lambda text: None,
    deadline: float | None = None,
    run: Callable[[Case, float | None], dict[str, Any]] = run_case,
) -> dict[str, list[dict[str, Any]]]:
    """Runs every case once a turn, those that were skipped or failed once no more.

    One that fails loses the figures of no other.

    Args:
        turns: Processes of each case.
        deadline: `time.monotonic()` after which no process goes on.
        run: (case, seconds that it may take) -> figures.

    Returns:
        Variant -> what its processes returned, one or more, in order of time; {"skipped": the error's last line} of one
        that failed.
    """
    found: dict[str, list[dict[str, Any]]] = {case.variant: [] for case in cases}
    failed: set[str] = set()
    for turn in range(turns):
        for case in cases:
            left = None if deadline is None else deadline - time.monotonic()
            runs = found[case.variant]
            if case.variant in failed or any("skipped" in figures for figures in runs):
                continue
            if left is not None and left <= 0:
                runs += [] if runs else [{"skipped": "no time was left"}]
                continue
            on_text(f"{case.bench}, turn {turn + 1} of {turns}: {case.variant}")
            try:
                figures = run(case, left)
            except RuntimeError as error:
                log.error("%s", error)
                failed.add(case.variant)
                figures = {"skipped": f"failed: {last_line(str(error))}"}
            if "skipped" not in figures or not runs:  # a later turn that did not end leaves the earlier ones valid
                runs.append(figures)
    return found


def last_line(text: str) -> str:
    """Of lines that are not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def median_of(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Median of a figure over processes; of all values where it is a list. None where there is no value."""
    values: list[float] = []
    for figures in runs:
        value = figures.get(name)
        values += value if isinstance(value, list) else [] if value is None else [value]
    return statistics.median(values) if values else None


def free_memory(device: str) -> int:
    """Bytes that a new process may take on a device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
