"""Checks that every config makes of its own fields. Each raises ValueError."""

from __future__ import annotations

import re
from typing import Any

from ..common.files import is_reserved
from ..common.text import expect_whole_characters
from .fields import config_fields

RUN_NAME = re.compile(r"[\w][\w .()+=@-]*", re.UNICODE)
LONGEST_NAME = 100
"""Characters of a run's name."""
MOST_BYTES = 250
"""Bytes of a run's name in UTF-8: a file system takes 255, and the lock's name has five more."""


def check_fields(config: Any) -> None:
    """Raises ValueError where a field holds none of its choices, is not finite or outside its range, or has half a
    character.

    None is in every range.
    """
    fields = config_fields(type(config))
    for name, field in fields.items():
        if field.choices and getattr(config, name) not in field.choices:
            choices = ", ".join(map(str, field.choices))
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {choices}.")
    for name, field in fields.items():
        if not field.allows(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)}; expected {field.range or 'a finite number'}.")
    for name in fields:
        value = getattr(config, name)
        for text in value if isinstance(value, tuple | list) else [value]:
            if isinstance(text, str):
                expect_whole_characters(text, name)


def check_range(config: Any, **limits: tuple[float, float]) -> None:
    """Raises ValueError when a named field lies outside its (lowest, highest) limits, where these are not the field's.

    A limit that always holds belongs to the field itself, see `fields.setting`.
    """
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; expected {low} to {high}.")


def check_multiple(name: str, value: int, of: int = 8) -> None:
    """Raises ValueError unless `value` is a positive multiple of `of`, the step of an f8 autoencoder."""
    if value < of or value % of:
        below = max(of, value // of * of)
        raise ValueError(f"{name} is {value}; expected a positive multiple of {of}. Use {below} or {below + of}.")


def check_size(config: Any, what: str) -> None:
    """Raises ValueError unless the fields width and height are multiples of 8. what: whose size it is."""
    if config.width % 8 or config.height % 8:
        raise ValueError(f"{what} is {config.width}x{config.height}; expected multiples of 8.")


def check_run_name(name: str, what: str = "run name") -> None:
    """Raises ValueError unless `name` is a plain folder name on every system (no separators, no `..`)."""
    bad = not RUN_NAME.fullmatch(name) or name.endswith((".", " ")) or ".." in name or is_reserved(name)
    if bad or len(name) > LONGEST_NAME or len(name.encode("utf-8", "replace")) > MOST_BYTES:
        raise ValueError(
            f"{what} is {name!r}; expected a plain folder name (letters, digits, space, and .-_()+=@) of at most "
            f"{LONGEST_NAME} characters, without a dot or space at its end, that is no device's name on Windows such "
            "as CON or LPT1. Leave out path separators and '..'."
        )
