"""What nobody expects in a file: values in JSON, numbers in names, bytes anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

CANARY = "CANARY"
"""A file of this name beside the mutated one shows that code in it was run."""


def odd_value(random: Random) -> Any:
    """A value that nobody expects there."""
    deep: Any = []
    for _ in range(random.choice((3, 400))):
        deep = [deep]
    return random.choice(
        (
            *(None, True, False, -1, 0, 1, 2**31, 2**63, 999_999_999, 10**400, 1.5, -0.0, 1e308, 1e-320),
            *(float("nan"), float("inf"), "", " ", "0", "NaN", "x" * 100_000, "\ud800", "\0", "../../etc/passwd"),
            *("(a+)+$", "^" + "(.*)*" * 12 + "$", "[", "\u2028", "<script>", [], {}, [[]], [1] * 1000, deep, {"": {}}),
        )
    )


def slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            yield item, key
            waiting.append(item[key])


def changed(value: Any, random: Random) -> Any:
    """A JSON value with something in it replaced, removed, renamed or doubled."""
    places = list(slots(value))
    if not places or random.random() < 0.1:
        return odd_value(random)
    holder, key = random.choice(places)
    match random.randrange(5):
        case 0 | 1:
            holder[key] = odd_value(random)
        case 2:
            del holder[key]
        case 3 if isinstance(holder, dict):
            holder[numbered(str(key), random)] = holder.pop(key)
        case _:
            holder[key] = [holder[key], holder[key]]
    return value


def numbered(name: str, random: Random) -> str:
    """A name with another number in it, or another part."""
    number = random.choice(("999999999", "-1", "1" * 5000, "00", "1", "٣", ""))
    return random.choice(
        (re.sub(r"\d+", number, name, count=random.choice((0, 1))), name + number, name[1:], "", name * 2)
    )


def overwritten(path: Path, random: Random, others: Sequence[Path]) -> None:
    """Bits flipped, parts cut out, doubled, moved, overwritten or appended."""
    data = bytearray(path.read_bytes())
    at, size = random.randrange(len(data) + 1), random.choice((1, 2, 8, 64, 4096))
    match random.randrange(8):
        case 0:
            for _ in range(random.choice((1, 4, 100))):
                if data:
                    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + size]
        case 3:
            data[at:at] = data[at : at + size]
        case 4:
            data[at : at + size] = random.randbytes(min(size, len(data) - at))
        case 5:
            data += bytes(size) if random.random() < 0.5 else random.randbytes(size)
        case 6:
            data[:8] = random.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
        case _:
            data[at:at] = random.choice((b"\xff" * size, b"\0" * size, b"[" * 4096, b"../" * size, b"\r\n"))
    path.write_bytes(data)
