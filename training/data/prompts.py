"""Prompts to train on: files of prompts, a held-out part of them, and their order in batches.

A file is read line by line. Only the offset and the weight of each prompt are in memory, which suits a million prompts.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.foreign import existing_file, short
from ..common.rng import generator
from ..common.text import parse_json_line

MAX_LINE = 1 << 20
"""Bytes of the longest line that is read."""
MAX_WEIGHT = 1e30
"""Of a prompt; sums of a million such weights are finite."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prompt:
    """A prompt, its relative frequency in training (`weight`, above 0) and its group in reports (`category`)."""

    text: str
    weight: float = 1.0
    category: str = ""


@dataclass(frozen=True)
class PromptSlot:
    """A prompt at position `index` of batch `number`; (number, index) keys the random draws for it."""

    prompt: str
    number: int
    index: int


class PromptFile(Sequence[Prompt]):
    """The prompts of a text or JSON lines file, read from it on demand.

    A .txt file has one prompt per line. A .jsonl file has one object per line with `prompt` (or `text`) and optionally
    `weight` and `category`. Blank lines are skipped, in text files also lines that begin with #.

    Attributes:
        weights: The prompts' weights, in order.

    Raises:
        ValueError: A line is invalid (the message has its number), there are no prompts, or the file has changed since
            it was opened.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: Path):
        self.path = existing_file(path)
        self._json = self.path.suffix.lower() == ".jsonl"
        self._offsets, self.weights = array("Q"), array("d")
        self._opened_as = self._size_and_time()
        for offset, prompt in self._prompts():
            self._offsets.append(offset)
            self.weights.append(prompt.weight)
        expect_prompts(self._offsets, str(self.path))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        offset = self._offsets[index]
        self._expect_unchanged()
        with open(self.path, "rb") as file:
            file.seek(offset)
            return self._parse_line(file.readline(MAX_LINE), 0)

    def __iter__(self) -> Iterator[Prompt]:
        self._expect_unchanged()
        return (prompt for _, prompt in self._prompts())

    def _prompts(self) -> Iterator[tuple[int, Prompt]]:
        """(byte offset of its line, prompt) of each prompt."""
        with open(self.path, "rb") as file:
            offset = 0
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                prompt = self._parse_line(line, number)
                if prompt is not None:
                    yield offset, prompt
                offset += len(line)

    def _parse_line(self, line: bytes, number: int) -> Prompt | None:
        """The prompt in a line; None for a blank line or a comment. number: of the line, for messages."""
        where = f"{self.path}, line {number}"
        if len(line) == MAX_LINE:
            raise ValueError(f"{where} is longer than {MAX_LINE} bytes; expected a prompt. Is it a text file?")
        try:
            text = line.removeprefix(BYTE_ORDER_MARK).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text; expected UTF-8. Save the file as UTF-8.") from error
        if self._json:
            return _parse_json(text, where) if text else None
        return Prompt(text) if text and not text.startswith("#") else None

    def _size_and_time(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def _expect_unchanged(self) -> None:
        if self._size_and_time() != self._opened_as:
            raise ValueError(f"{self.path} has changed since its prompts were read. Put it back, or begin again.")


def read_prompts(path: Path) -> Sequence[Prompt]:
    """Opens a file of prompts, see `PromptFile`."""
    return PromptFile(path)


def _parse_json(line: str, where: str) -> Prompt:
    """The prompt in a line of JSON; `where` is its position, for messages."""
    row = parse_json_line(line, where)
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    weight = row.get("weight", 1.0) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: no prompt; expected {{"prompt": "a cat", "weight": 1}}.')
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise ValueError(f"{where}: weight is {short(weight)}; expected a number above 0, at most {MAX_WEIGHT:g}.")
    category = row.get("category", "")
    if not isinstance(category, str):
        raise ValueError(f"{where}: category is {category!r}; expected a text.")
    return Prompt(" ".join(text.split()), float(weight), category)


def expect_prompts(prompts: Sequence, where: str) -> None:
    """Raises ValueError for an empty list of prompts; `where` is its source, for the message."""
    if not len(prompts):
        raise ValueError(f"{where} hold no prompts; expected at least one, one a line.")


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """32 hex digits over texts, weights and order."""
    digest = hashlib.sha256(b"[")
    for number, prompt in enumerate(prompts):
        digest.update((", " * (number > 0) + json.dumps([prompt.text, prompt.weight])).encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]


class _PromptsExcept(Sequence[Prompt]):
    """A view of prompts without those at some indices, given in ascending order."""

    def __init__(self, prompts: Sequence[Prompt], excluded: Sequence[int]):
        self._prompts, self._excluded = prompts, excluded
        lookup = set(excluded)
        self.weights = array("d", (w for i, w in enumerate(prompt_weights(prompts)) if i not in lookup))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> Prompt:
        position = range(len(self))[index]
        for excluded in self._excluded:
            position += excluded <= position
        return self._prompts[position]


def split_held_out(prompts: Sequence[Prompt], fraction: float, max_count: int) -> tuple[Sequence[Prompt], list[Prompt]]:
    """Holds out every n-th prompt.

    Args:
        prompts: All prompts.
        fraction: Share to hold out, 0 to 0.5; above 0, at least one of two or more prompts is held out.
        max_count: Largest number to hold out.

    Returns:
        (prompts to train on, held-out prompts).
    """
    if not fraction or len(prompts) < 2:
        return prompts, []
    stride = max(2, round(1 / fraction))
    held_out = list(range(stride - 1, len(prompts), stride)[:max_count]) or [len(prompts) - 1]
    return _PromptsExcept(prompts, held_out), [prompts[i] for i in held_out]


def prompt_weights(prompts: Sequence[Prompt]) -> Sequence[float]:
    """The weights of prompts, in order; for a file without reading it again."""
    if isinstance(prompts, PromptFile | _PromptsExcept):
        return prompts.weights
    return [prompt.weight for prompt in prompts]


class PromptOrder:
    """An endless sequence of batches of prompts; a batch depends on its number and the seed alone.

    If all weights are equal, every epoch has each prompt once, in random order. Otherwise each prompt is drawn
    independently, with a probability in proportion to its weight.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int):
        expect_prompts(prompts, "prompts")
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        weights = torch.tensor(prompt_weights(prompts), dtype=torch.float64)
        if not (weights.isfinite().all() and (weights > 0).all() and weights.sum().isfinite()):
            raise ValueError("weights of prompts are not all finite and above 0; expected such numbers, such as 1.")
        self._cumulative = None if (weights == weights[0]).all() else weights.cumsum(0)
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, number: int) -> list[PromptSlot]:
        """The prompts of a batch; batches count from 1."""
        positions = range((number - 1) * self.batch_size, number * self.batch_size)
        return [PromptSlot(self._text_at(position), number, index) for index, position in enumerate(positions)]

    def largest(self) -> PromptSlot:
        """The first prompt: the pictures of all prompts have one size."""
        return PromptSlot(self.prompts[0].text, 0, 0)

    def _text_at(self, position: int) -> str:
        """The prompt at a position of the endless sequence."""
        if self._cumulative is None:
            epoch, offset = divmod(position, len(self.prompts))
            return self.prompts[int(self._permutation(epoch)[offset])].text
        draw = torch.rand((), generator=generator(self.seed, "prompt", position), dtype=torch.float64)
        index = int(torch.searchsorted(self._cumulative, draw * self._cumulative[-1], right=True))
        return self.prompts[min(index, len(self.prompts) - 1)].text

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            permutation = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompts", epoch))
            self._epoch = (epoch, permutation)
        return self._epoch[1]
