"""Prompts to train on: a text file, one a line, or JSON lines with weights; their order, batch by batch.

Files are read a line at a time: of a million prompts, where each begins and its weight are in memory, not their texts.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.rng import generator

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how often it is shown beside others; weight: above 0. category: what a report groups it by."""

    text: str
    weight: float = 1.0
    category: str = ""


@dataclass(frozen=True)
class PromptSlot:
    """One place in a batch: `index` in batch `number`, both of which name its draws."""

    prompt: str
    number: int
    index: int


class PromptFile(Sequence[Prompt]):
    """The prompts of a .txt file, one a line, or of a .jsonl file of objects with `prompt` (or `text`) and, if you
    like, `weight` and `category`. Blank lines and, in text files, lines that begin with # are left out.

    The file is checked once, then read where a prompt is asked for. weights: theirs, in order. Errors: ValueError
    naming the line, for a file without prompts, and for one that has changed since.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._json = self.path.suffix.lower() == ".jsonl"
        self._starts, self.weights = array("Q"), array("d")
        self._stamp = self._stat()
        for start, prompt in self._prompts():
            self._starts.append(start)
            self.weights.append(prompt.weight)
        expect_prompts(self._starts, str(self.path))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        self._expect_unchanged()
        with open(self.path, "rb") as file:
            file.seek(start)
            return self._prompt(file.readline(), 0)

    def __iter__(self) -> Iterator[Prompt]:
        self._expect_unchanged()
        return (prompt for _, prompt in self._prompts())

    def _prompts(self) -> Iterator[tuple[int, Prompt]]:
        """The byte at which each prompt's line begins, and the prompt."""
        with open(self.path, "rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                found = self._prompt(line, number)
                if found is not None:
                    yield start, found
                start += len(line)

    def _prompt(self, line: bytes, number: int) -> Prompt | None:
        where = f"{self.path}, line {number}"
        try:
            text = line.removeprefix(BYTE_ORDER_MARK).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text; expected UTF-8. Save the file as UTF-8.") from error
        if self._json:
            return _from_json(text, where) if text else None
        return Prompt(text) if text and not text.startswith("#") else None

    def _stat(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def _expect_unchanged(self) -> None:
        if self._stat() != self._stamp:
            raise ValueError(f"{self.path} has changed since its prompts were read. Put it back, or begin again.")


def read_prompts(path: Path) -> Sequence[Prompt]:
    """The prompts of a file, see `PromptFile`."""
    return PromptFile(path)


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    weight = row.get("weight", 1.0) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: no prompt; expected {{"prompt": "a cat", "weight": 1}}.')
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight is {weight!r}; expected a number above 0.")
    category = row.get("category", "")
    if not isinstance(category, str):
        raise ValueError(f"{where}: category is {category!r}; expected a text.")
    return Prompt(" ".join(text.split()), float(weight), category)


def expect_prompts(prompts: Sequence, where: str) -> None:
    """Raises ValueError when there are none."""
    if not len(prompts):
        raise ValueError(f"{where} hold no prompts; expected at least one, one a line.")


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes with texts, weights and order."""
    digest = hashlib.sha256(b"[")
    for number, prompt in enumerate(prompts):
        digest.update((", " * (number > 0) + json.dumps([prompt.text, prompt.weight])).encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]


class _Rest(Sequence[Prompt]):
    """Prompts without those at some places, which are in order."""

    def __init__(self, prompts: Sequence[Prompt], without: Sequence[int]):
        self._prompts, self._without = prompts, without
        left_out = set(without)
        self.weights = array("d", (w for i, w in enumerate(prompt_weights(prompts)) if i not in left_out))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> Prompt:
        place = range(len(self))[index]
        for other in self._without:
            place += other <= place
        return self._prompts[place]


def split_held_out(prompts: Sequence[Prompt], fraction: float, most: int) -> tuple[Sequence[Prompt], list[Prompt]]:
    """Prompts to train on, and every n-th held out so that it is that fraction, at most `most` of them; with a
    fraction above 0 at least one of two or more."""
    if not fraction or len(prompts) < 2:
        return prompts, []
    stride = max(2, round(1 / fraction))
    places = list(range(stride - 1, len(prompts), stride)[:most]) or [len(prompts) - 1]
    return _Rest(prompts, places), [prompts[i] for i in places]


def prompt_weights(prompts: Sequence[Prompt]) -> Sequence[float]:
    """The prompts' weights; a file's are at hand."""
    if isinstance(prompts, PromptFile | _Rest):
        return prompts.weights
    return [prompt.weight for prompt in prompts]


class PromptOrder:
    """Endless batches of prompts, drawn by weight; what a batch shows follows from its number alone.

    Equal weights: every epoch shows each prompt once, in an order of its own. Else each place is a draw by weight.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int):
        expect_prompts(prompts, "prompts")
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        weights = torch.tensor(prompt_weights(prompts), dtype=torch.float64)
        self._sums = None if (weights == weights[0]).all() else weights.cumsum(0)
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, number: int) -> list[PromptSlot]:
        """The slots of a batch, counted from 1."""
        places = range((number - 1) * self.batch_size, number * self.batch_size)
        return [PromptSlot(self._at(place), number, index) for index, place in enumerate(places)]

    def _at(self, place: int) -> str:
        if self._sums is None:
            epoch, rest = divmod(place, len(self.prompts))
            return self.prompts[int(self._order(epoch)[rest])].text
        draw = torch.rand((), generator=generator(self.seed, "prompt", place), dtype=torch.float64)
        chosen = int(torch.searchsorted(self._sums, draw * self._sums[-1], right=True))
        return self.prompts[min(chosen, len(self.prompts) - 1)].text

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            order = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompts", epoch))
            self._epoch = (epoch, order)
        return self._epoch[1]
