"""Words that stand for learned vectors, and prompts that hold them (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.fingerprint import tensors_fingerprint
from ..config.tokens import STOCK_MARK


@dataclass(frozen=True)
class Concept:
    """A word and what text encoders read in its place.

    vectors: ComfyUI's name of a text encoder ("clip_l", "clip_g", "clip_h", "t5xxl", ...) -> (n, D) token embeddings.
    The mapping is read when a prompt is tokenized, so that values which train may be put into it.
    """

    token: str
    vectors: dict[str, Tensor]

    @property
    def fingerprint(self) -> str:
        return tensors_fingerprint(sorted(self.vectors.items()), self.token)


@dataclass(frozen=True)
class Vocabulary:
    """The words that a text encoder was trained with.

    table: (V, D) token embeddings, as the encoder holds them. ids: token ids of a text without special ones. word: the
    text of one id.
    """

    table: Tensor
    ids: Callable[[str], list[int]]
    word: Callable[[int], str]


def split_tokens(text: str, tokens: Iterable[str]) -> list[str]:
    """A prompt cut at every token: text, token, text, ..., token, text; texts may be empty.

    Upper and lower case are alike, as CLIP reads them. A token that begins or ends with a letter or digit counts only
    where no letter, digit, hyphen or underscore touches it; none counts behind `embedding:`. Longer tokens win.
    """
    words = sorted(tokens, key=len, reverse=True)
    if not words:
        return [text]
    return re.split(f"({'|'.join(map(_pattern, words))})", text, flags=re.IGNORECASE)


def _pattern(token: str) -> str:
    before = r"(?<![\w-])" if re.match(r"\w", token) else ""
    after = r"(?![\w-])" if re.search(r"\w$", token) else ""
    return rf"(?<!{STOCK_MARK}){before}{re.escape(token)}{after}"


def pieces(text: str, concepts: Sequence[Concept]) -> list[str | Concept]:
    """A prompt as texts, empty ones left out, and the concepts between them.

    The blanks are as ComfyUI leaves them around `embedding:` (a T5 reads some): one at least before the first concept,
    none at the ends of later texts.
    """
    named = {concept.token.lower(): concept for concept in concepts}
    first, *rest = split_tokens(text, named)
    if not rest:
        return [text]
    found: list[str | Concept] = [first if first == "" or first[-1].isspace() else f"{first} "]
    for token, after in zip(rest[::2], rest[1::2], strict=True):
        found += [named[token.lower()], " ".join(after.split())]
    return [piece for piece in found if piece != ""]


def add_concepts(present: Sequence[Concept], more: Iterable[Concept]) -> tuple[Concept, ...]:
    """Both; of two concepts of one token (case aside) the later one counts."""
    return tuple({concept.token.lower(): concept for concept in (*present, *more)}.values())


def expect_vectors(concepts: Iterable[Concept], widths: Mapping[str, int]) -> None:
    """Raises ValueError for a concept without vectors of the width that each encoder (name -> width) reads."""
    for concept in concepts:
        for name, width in widths.items():
            given = concept.vectors.get(name)
            if given is None:
                held = ", ".join(concept.vectors) or "none"
                raise ValueError(
                    f"{concept.token} has vectors for {held}; expected some for {name}. It is of another model."
                )
            if given.ndim != 2 or given.shape[1] != width or not len(given):
                shape = " x ".join(map(str, given.shape))
                raise ValueError(f"{concept.token} is {shape} for {name}; expected vectors of {width} numbers.")


def with_fingerprints(fingerprint: str, concepts: Sequence[Concept]) -> str:
    """An encoder's fingerprint with its concepts'; as it was without any."""
    if not concepts:
        return fingerprint
    return hashlib.sha256(" ".join([fingerprint, *(c.fingerprint for c in concepts)]).encode()).hexdigest()


def concept_rows(concepts: Sequence[Concept], name: str, first: int) -> dict[str, list[int]]:
    """Token -> ids of its vectors in the encoder `name`, counted through from `first`."""
    rows = {}
    for concept in concepts:
        rows[concept.token] = list(range(first, first + len(concept.vectors[name])))
        first += len(rows[concept.token])
    return rows


@contextmanager
def embedding(table: nn.Embedding, ids: Tensor, concepts: Sequence[Concept], name: str) -> Iterator[Tensor]:
    """While entered, ids beyond the vocabulary (see `concept_rows`) give the concepts' vectors, with gradients.

    Yields the ids (B, L) to run the network on: zero there. The table is neither changed nor trained.
    """
    beyond = ids >= len(table.weight)
    if not beyond.any():
        yield ids
        return
    vectors = torch.cat([concept.vectors[name] for concept in concepts]).to(table.weight.device)
    learned = vectors[(ids - len(table.weight)).clamp(min=0)]
    handle = table.register_forward_hook(lambda _m, _i, found: torch.where(beyond[..., None], learned.to(found), found))
    try:
        yield ids.masked_fill(beyond, 0)
    finally:
        handle.remove()
