"""Lists and counts in messages and reports."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[str], limit: int = 4) -> str:
    """The first `limit` items, comma-separated, then "and N more" if some are left out."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def count_noun(count: int, noun: str) -> str:
    """A count with its noun, such as "1 image" or "3 images"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
