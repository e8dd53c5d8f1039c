"""Prompts to train on: a text file, one a line, or JSON lines with weights; their order, batch by batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..generators import generator
from .captions import read_text
from .images import content_key


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how often it is shown beside others; weight: above 0."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class PromptSlot:
    """One place in a batch: `index` in batch `number`, both of which name its draws."""

    prompt: str
    number: int
    index: int


def read_prompts(path: Path) -> list[Prompt]:
    """A .txt file with a prompt a line, or a .jsonl file of objects with `prompt` (or `text`) and, if you like,
    `weight`. Blank lines and, in text files, lines that begin with # are left out. Raises ValueError naming the line.
    """
    path = Path(path)
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), start=1)]
    if path.suffix.lower() == ".jsonl":
        found = [_from_json(line, f"{path}, line {number}") for number, line in lines if line]
    else:
        found = [Prompt(line) for _, line in lines if line and not line.startswith("#")]
    return expect_prompts(found, str(path))


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
    return Prompt(" ".join(text.split()), float(weight))


def expect_prompts(prompts: Sequence[Prompt], where: str) -> list[Prompt]:
    """The prompts; ValueError when there are none."""
    if not prompts:
        raise ValueError(f"{where} hold no prompts; expected at least one, one a line.")
    return list(prompts)


def fingerprint_of(prompts: Sequence[Prompt]) -> str:
    """Changes with texts, weights and order."""
    return content_key(json.dumps([[prompt.text, prompt.weight] for prompt in prompts]).encode())


class PromptOrder:
    """Endless batches of prompts, drawn by weight; nothing is kept from one to the next.

    Equal weights: every epoch shows each prompt once, in an order of its own. Else each place is a draw by weight.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int):
        self.prompts = expect_prompts(prompts, "prompts")
        self.batch_size, self.seed = batch_size, seed
        self._equal = len({prompt.weight for prompt in prompts}) == 1

    def batch(self, number: int) -> list[PromptSlot]:
        """The slots of a batch, counted from 1."""
        places = range((number - 1) * self.batch_size, number * self.batch_size)
        return [PromptSlot(self._at(place), number, index) for index, place in enumerate(places)]

    def _at(self, place: int) -> str:
        if not self._equal:
            weights = torch.tensor([prompt.weight for prompt in self.prompts], dtype=torch.float64)
            draw = torch.multinomial(weights, 1, generator=generator(self.seed, "prompt", place))
            return self.prompts[draw.item()].text
        epoch, rest = divmod(place, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompts", epoch))
        return self.prompts[order[rest].item()].text
