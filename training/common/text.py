"""Lists and counts in messages and reports; lines of JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def first_few(items: Sequence[str], limit: int = 4) -> str:
    """The first `limit` items, comma-separated, then "and N more" if some are left out."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def count_noun(count: int, noun: str) -> str:
    """A count with its noun, such as "1 image" or "3 images"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def parse_json_line(line: str, where: str) -> Any:
    """The value in a line of a JSON lines file. Raises ValueError, beginning with `where`, for invalid JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
