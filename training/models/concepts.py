"""Tokens that stand for learned vectors, and prompts that hold them (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..common.fingerprint import tensors_fingerprint
from ..common.text import plain_text
from ..common.transfer import upload
from ..config.tokens import STOCK_MARK

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Concept:
    """A token of prompts and the learned vectors that text encoders read in its place."""

    token: str
    vectors: dict[str, Tensor]
    """ComfyUI's name of a text encoder ("clip_l", "clip_g", "clip_h", "t5xxl", ...) -> (n, D) token embeddings. Read at
    every tokenization, so vectors under training may be placed here."""

    @property
    def fingerprint(self) -> str:
        return tensors_fingerprint(sorted(self.vectors.items()), self.token)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a text encoder was trained with."""

    table: Tensor
    """(V, D) token embeddings of the encoder."""
    ids: Callable[[str], list[int]]
    """text -> token ids, without start and end token."""
    word: Callable[[int], str]
    """token id -> text."""


def split_tokens(text: str, tokens: Iterable[str]) -> list[str]:
    """Splits a prompt at every token: text, token, text, ..., token, text; texts may be empty.

    Case is ignored, as CLIP's tokenizer does. A token that begins or ends with a letter or digit counts only where no
    letter, digit, hyphen or underscore touches it; none counts directly after `embedding:`. Longer tokens win.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return [text]
    return re.split(f"({'|'.join(map(_pattern, longest_first))})", text, flags=re.IGNORECASE)


def _pattern(token: str) -> str:
    before = r"(?<![\w-])" if re.match(r"\w", token) else ""
    after = r"(?![\w-])" if re.search(r"\w$", token) else ""
    return rf"(?<!{STOCK_MARK}){before}{re.escape(token)}{after}"


@cache
def _warn_of_stock_mark() -> None:
    """Warns once of ComfyUI's way to name an embedding's file in a prompt."""
    log.warning(
        "a prompt has %s, which is read as words here; ComfyUI puts the vectors of that file there. Give the embedding "
        "a token of its own instead, and write the token.",
        STOCK_MARK,
    )


def pieces(text: str, concepts: Sequence[Concept]) -> list[str | Concept]:
    """A prompt as non-empty texts, their escaped brackets plain, with the concepts between them.

    Spaces are as ComfyUI leaves them around `embedding:` (some count for a T5): at least one before the first concept,
    none at the ends of later texts.
    """
    if re.search(rf"(?:^|\s){STOCK_MARK}", text):
        _warn_of_stock_mark()
    named = {concept.token.lower(): concept for concept in concepts}
    first, *rest = split_tokens(text, named)
    if not rest:
        return [plain_text(text)]
    parts: list[str | Concept] = [first if first == "" or first[-1].isspace() else f"{first} "]
    for token, after in zip(rest[::2], rest[1::2], strict=True):
        parts += [named[token.lower()], " ".join(after.split())]
    return [plain_text(part) if isinstance(part, str) else part for part in parts if part != ""]


def add_concepts(present: Sequence[Concept], more: Iterable[Concept]) -> tuple[Concept, ...]:
    """Both together; of two concepts with the same token (case ignored) the later one counts."""
    return tuple({concept.token.lower(): concept for concept in (*present, *more)}.values())


def expect_vectors(concepts: Iterable[Concept], widths: Mapping[str, int]) -> None:
    """Raises ValueError unless every concept has vectors for each encoder (name -> width), of its width."""
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
    """An encoder's fingerprint combined with those of its concepts; unchanged without any."""
    if not concepts:
        return fingerprint
    return hashlib.sha256(" ".join([fingerprint, *(c.fingerprint for c in concepts)]).encode()).hexdigest()


def concept_rows(concepts: Sequence[Concept], name: str, first: int) -> dict[str, list[int]]:
    """Token -> ids of its vectors in the encoder `name`, numbered from `first`."""
    rows = {}
    for concept in concepts:
        rows[concept.token] = list(range(first, first + len(concept.vectors[name])))
        first += len(rows[concept.token])
    return rows


@contextmanager
def embedding(table: nn.Embedding, ids: Tensor, concepts: Sequence[Concept], name: str) -> Iterator[Tensor]:
    """While entered, an embedding table also maps ids beyond its vocabulary, to the concepts' vectors.

    Gradients reach these vectors; the table is neither changed nor trained.

    Args:
        table: the encoder's token embeddings.
        ids: (B, L) token ids on the CPU, those of concepts as `concept_rows` numbers them.
        concepts: with vectors for the encoder.
        name: of the encoder.

    Yields:
        The ids (B, L) to run the network on, on its device, with zeros in place of those beyond the vocabulary.
    """
    device, beyond = table.weight.device, ids >= len(table.weight)
    if not beyond.any():
        yield upload(ids, device)
        return
    vectors = torch.cat([concept.vectors[name] for concept in concepts]).to(device)
    learned = vectors[upload((ids - len(table.weight)).clamp(min=0), device)]
    is_learned = upload(beyond[..., None], device)
    handle = table.register_forward_hook(lambda _m, _i, rows: torch.where(is_learned, learned.to(rows), rows))
    try:
        yield upload(ids.masked_fill(beyond, 0), device)
    finally:
        handle.remove()
