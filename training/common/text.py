"""Lists and counts in messages and reports; lines of texts and of JSON files; brackets of captions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any


def first_few(items: Sequence[str], limit: int = 4) -> str:
    """The first `limit` items, comma-separated, then "and N more" if some are left out."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def count_noun(count: int, noun: str) -> str:
    """A count with its noun, such as "1 image" or "3 images"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def plain_text(text: str) -> str:
    """A caption as text encoders read it: the escaped brackets `\\(` and `\\)` are brackets.

    A backslash keeps ComfyUI from reading a bracket as a prompt weight, and taggers write it. ComfyUI takes it off also
    where weights are not read.
    """
    return text.replace("\\)", ")").replace("\\(", "(")


def text_lines(text: str) -> list[str]:
    """The lines of a text without blanks at their ends, cut at newline bytes only (also those of Windows).

    `str.splitlines` cuts at a dozen other characters too, such as U+2028, which are part of a line.
    """
    return [line.strip() for line in text.split("\n")]


def filled_lines(text: str) -> list[str]:
    """The `text_lines` that are not empty."""
    return [line for line in text_lines(text) if line]


def parse_numbers(text: str, what: str) -> list[float]:
    """Numbers between commas, semicolons or blanks. Raises ValueError, beginning with `what`, for any other part."""
    parts = [part for part in re.split(r"[\s,;]+", text) if part]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != len(parts) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{what} is {text!r}; expected numbers such as 0.4, 0.6.")
    return numbers


def parse_json_line(line: str, where: str) -> Any:
    """The value in a line of a JSON lines file. Raises ValueError, beginning with `where`, for what is not JSON."""
    from .foreign import explain, parse_json  # imports torch, which whoever cuts a text into lines need not wait for

    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {explain(error)}.") from error


def expect_whole_characters(text: str, what: str) -> str:
    """The text. Raises ValueError, beginning with `what`, for half a character (a lone surrogate) in it.

    JSON can hold one, also that of a workflow; tokenizers and files cannot.
    """
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise ValueError(f"{what} has half a character ({half!r}); expected whole characters. Type that place anew.")
    return text
