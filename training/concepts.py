"""Words that stand for learned vectors, and prompts that hold them (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .fingerprint import tensors_fingerprint

STOCK_MARK = "embedding:"
"""ComfyUI's own way to name an embedding's file in a prompt; what follows it is never one of our words."""


@dataclass(frozen=True)
class Concept:
    """A word and what text encoders read in its place.

    vectors: ComfyUI's name of a text encoder ("clip_l", "clip_g", "clip_h", "t5xxl", ...) -> (n, D) token embeddings.
    The mapping is read when a prompt is tokenized, so that values which train may be put into it.
    """

    token: str
    vectors: Mapping[str, Tensor]

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


def check_token(token: str) -> str:
    """The token without blanks around it. Raises ValueError for one that cannot stand in a prompt."""
    word = token.strip()
    if not word or re.search(r"[\s,]", word) or word.lower().startswith(STOCK_MARK):
        raise ValueError(f"token is {token!r}; expected one word without blanks and commas, such as <cat-toy>.")
    return word


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
    """A prompt as texts, blanks reduced to one and empty ones left out, and the concepts between them."""
    named = {concept.token.lower(): concept for concept in concepts}
    parts = split_tokens(text, named)
    if len(parts) == 1:
        return [text]
    words = [" ".join(part.split()) if i % 2 == 0 else named[part.lower()] for i, part in enumerate(parts)]
    return [word for word in words if word != ""]


def add_concepts(present: Sequence[Concept], more: Iterable[Concept]) -> tuple[Concept, ...]:
    """Both; of two concepts of one token (case aside) the later one counts."""
    return tuple({concept.token.lower(): concept for concept in (*present, *more)}.values())
