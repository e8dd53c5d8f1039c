"""What the files of a run hold, read and checked: a run folder may come from anywhere and be damaged in any way.

Each reader raises ValueError with the run, the file and what is wrong in it. A last row that is being written is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.files import while_open_elsewhere
from ..common.foreign import MB, FileError, existing_file, explain, parse_json, read_json, reading, short

STATES = ("new", "running", "interrupted", "failed", "finished")
"""States that a status.json may have."""
ADVICE = "Put the file back, or begin the run again."
_LARGEST = 64 * MB
"""Bytes of the largest config.json; it may hold a workflow."""
_DEPTH = 100
"""Levels of nesting; a workflow has about twenty."""
_MOST_STEPS = 10**12
_TAIL = 2**18
"""Bytes at the end of metrics.jsonl that are read for its last step."""
Row = dict[str, Any]


def read_config(path: Path) -> dict[str, Any]:
    """The content of config.json."""
    with _checking(path):
        config = _read(path)
        _expect_entries(
            config, {"identity": dict, "config": dict, "environment": dict, "workflow": dict, "prompt": dict}
        )
        if config.get("identity") is None:
            raise ValueError("it has no identity; expected the settings that the run was made with")
        _expect_entries(config["identity"], {"kind": str})
        for stretch in config.get("stretches", ()):
            _expect_step(stretch["after_step"], "after_step")
        if (steps := (config.get("config") or {}).get("steps")) is not None:
            _expect_step(steps, "config.steps")
        return config


def read_status(path: Path) -> dict[str, Any]:
    """The content of status.json."""
    with _checking(path):
        status = _read(path)
        if status.get("state") not in STATES:
            raise ValueError(f"state is {short(status.get('state'))}; expected one of {', '.join(STATES)}")
        _expect_step(status.get("step"))
        _expect_entries(status, {"message": str, "guard": dict})
        return status


def read_rows(path: Path) -> list[Row]:
    """All whole rows of metrics.jsonl; none without the file."""
    if not path.exists():
        return []
    with _checking(path):
        lines = _whole_lines(_readable(path).read_bytes())
        return [_row(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def read_last_step(path: Path) -> Row:
    """The row of the last step among the last 256 KB of metrics.jsonl; empty where there is none."""
    if not path.exists():
        return {}
    with _checking(path), _readable(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        lines = _whole_lines(file.read(_TAIL))
        for line in reversed(lines[1:] if size > _TAIL else lines):  # and a first row whose start is cut off
            if line.strip() and "event" not in (row := _row(line)):
                return row
    return {}


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Turns an error of computing with what a run's files hold into ValueError that names the run."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise FileError(
            f"files of run {folder.name!r} are not as Retune writes them ({kind:.200}). {ADVICE}"
        ) from error


@contextmanager
def _checking(path: Path) -> Iterator[None]:
    """As `foreign.reading`; the message names the run too, and says what to do."""
    try:
        with reading(path, "not as Retune writes it", ADVICE):
            yield
    except FileError as error:
        message = f"run {path.parent.name!r}: {error}"
        raise FileError(message if ADVICE in message else f"{message}. {ADVICE}") from error


def _readable(path: Path) -> Path:
    """A regular file's path, once it can be opened: Windows refuses that while the file is replaced."""
    while_open_elsewhere(lambda: existing_file(path).open("rb").close())
    return path


def _read(path: Path) -> dict[str, Any]:
    size = _readable(path).stat().st_size
    if size > _LARGEST:
        raise ValueError(f"its size is {size / MB:.0f} MB; expected at most {_LARGEST / MB:.0f} MB")
    value = read_json(path, dict, ADVICE)
    _expect_flat(value)
    return value


def _whole_lines(data: bytes) -> list[bytes]:
    """Lines, without a last one that is being written: it has no end yet, and is no JSON before its last character."""
    *lines, last = data.split(b"\n")
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return lines
    return [*lines, last]


def _row(line: bytes, number: int = 0) -> Row:
    """A row: what every chart and list computes with is of the type that it needs."""
    try:
        row = parse_json(line.decode("utf-8"), dict)
        _expect_flat(row)
        _expect_step(row.get("step"))
        _expect_entries(row, {"event": str, "grid": str})
        _EXPECT_EVENT.get(row.get("event"), _expect_nothing)(row)
        return row
    except (ValueError, RecursionError) as error:
        where = f"line {number}" if number else "one of its last lines"
        raise ValueError(f"{where}: {explain(error)}") from error


def _expect_training(row: Row) -> None:
    _expect_number(row.get("loss"), "loss")
    if "reward" in row:
        _expect_number(row["reward"], "reward")


def _expect_validation(row: Row) -> None:
    if row.get("loss") is not None:
        _expect_number(row["loss"], "loss", finite=False)


def _expect_sample(row: Row) -> None:
    for name in ("files", "prompts"):
        if not isinstance(row.get(name), list) or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"{name} is {short(row.get(name))}; expected a list of texts")
    if len(row["files"]) != len(row["prompts"]):
        raise ValueError(f"number of files is {len(row['files'])}; expected {len(row['prompts'])}, one for each prompt")
    for name in ("epoch", "alignment"):
        if row.get(name) is not None:
            _expect_number(row[name], name, finite=False)


def _expect_nothing(row: Row) -> None:
    """Rows of other events are read by the report alone, inside `as_written`."""


_EXPECT_EVENT = {None: _expect_training, "validation": _expect_validation, "sample": _expect_sample}


def _expect_step(value: Any, name: str = "step") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_STEPS:
        raise ValueError(f"{name} is {short(value)}; expected a whole number from 0 to {_MOST_STEPS}")


def _expect_number(value: Any, name: str, finite: bool = True) -> None:
    """Raises ValueError unless a value is a number that a float holds; not `finite`: NaN and infinity are some too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if not isinstance(value, int) or abs(value) < 1 << 1000 else math.inf
        if math.isfinite(number) or (isinstance(value, float) and not finite):
            return
    raise ValueError(f"{name} is {short(value)}; expected a {'finite ' if finite else ''}number")


def _expect_entries(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raises ValueError where an entry that is there, and not null, has another type."""
    for name, kind in types.items():
        if values.get(name) is not None and not isinstance(values[name], kind):
            expected = "a text" if kind is str else "an object"
            raise ValueError(f"{name} is {short(values[name])}; expected {expected}")


def _expect_flat(value: Any) -> None:
    """Raises ValueError for a value that is nested more deeply than anything a run writes."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _DEPTH:
            raise ValueError(f"it is nested more than {_DEPTH} levels deep")
        if isinstance(item, dict | list):
            waiting += [(part, depth + 1) for part in (item.values() if isinstance(item, dict) else item)]
