"""Concepts in ComfyUI's prompts: a clone of a CLIP whose tokenizers read a token as its vectors.

A token is rewritten to `embedding:` with a name that no file has, and ComfyUI's own code does the rest: prompt weights,
windows of 77 tokens, `embedding:` with real files. A clone has copies of the tokenizers, since clones share them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor

from ...training.config.tokens import STOCK_MARK
from ...training.models.concepts import Concept, Vocabulary, add_concepts, expect_vectors, split_tokens

MARK = "retune-concept-"
"""Followed by a concept's place: an embedding's name as ComfyUI's tokenizer sees it."""


def with_concepts(clip, concepts: Iterable[Concept]):
    """A clone of a CLIP (of ComfyUI or a T5 of this package) whose prompts know these concepts beside those it has.

    Beside a T5 a kept CLIP stays as it is: give it its own concepts before. Raises ValueError for a concept without
    vectors of the right width for each text encoder.
    """
    known = add_concepts(concepts_of(clip), concepts)
    expect_vectors(known, widths_of(clip))
    tokenizer = copy.copy(clip.tokenizer)
    for name, part in _parts(clip):
        setattr(tokenizer, name, _listening(part, name, known))
    clone = clip.clone()
    clone.tokenizer = tokenizer
    return clone


def concepts_of(clip) -> tuple[Concept, ...]:
    """The concepts that a CLIP's prompts know."""
    return next((part.retune_concepts for _, part in _parts(clip) if hasattr(part, "retune_concepts")), ())


def widths_of(clip) -> dict[str, int]:
    """How wide the token embeddings of each text encoder are, by its name."""
    return {name: _table(clip, name)[1].shape[1] for name, _ in _parts(clip)}


def vocabularies_of(clip) -> dict[str, Vocabulary]:
    """The words of a CLIP's text encoders by ComfyUI's name of each; patches on the table are applied."""
    from ..common.weights import patched_weight

    found = {}
    for name, part in _parts(clip):
        table = patched_weight(clip.patcher, _table(clip, name)[0])
        found[name] = Vocabulary(table, partial(_ids, part), partial(_word, part))
    return found


def _table(clip, name: str) -> tuple[str, Tensor]:
    """Name and weight of a text encoder's token embeddings."""
    ends = ("token_embedding.weight", ".shared.weight")
    weights = clip.cond_stage_model.named_parameters()
    return next((key, weight) for key, weight in weights if key.startswith(f"{name}.") and key.endswith(ends))


def _parts(clip) -> Iterator[tuple[str, Any]]:
    """ComfyUI's tokenizer of each text encoder, by the encoder's name."""
    from comfy.sd1_clip import SDTokenizer

    return ((name, part) for name, part in vars(clip.tokenizer).items() if isinstance(part, SDTokenizer))


def _ids(part, text: str) -> list[int]:
    end = -1 if part.tokenizer_adds_end_token else None
    return list(part.tokenizer(text)["input_ids"][part.tokens_start : end])


def _word(part, token: int) -> str:
    return part.tokenizer.decode([token]).strip()


def _listening(part, name: str, concepts: tuple[Concept, ...]):
    """A copy of a tokenizer that knows the concepts; name: of its encoder."""
    other = copy.copy(part)
    other.__class__ = _listening_class(getattr(part, "retune_kind", type(part)))
    other.retune_name, other.retune_concepts = name, concepts
    if other.embedding_directory is None:  # ComfyUI then reads no embeddings at all
        other.embedding_directory = []
    return other


@cache
def _listening_class(kind: type) -> type:
    class Listening(kind):
        retune_kind = kind

        def tokenize_with_weights(self, text, *args, **options):
            weighted = not options.get("disable_weights", self.disable_weights)
            return super().tokenize_with_weights(_marked(text, self.retune_concepts, weighted), *args, **options)

        def _try_get_embedding(self, embedding_name):
            name, *rest = embedding_name.split() or [""]
            if not name.startswith(MARK):
                return super()._try_get_embedding(embedding_name)
            concept = self.retune_concepts[int(name.removeprefix(MARK))]
            return concept.vectors[self.retune_name], name, " ".join(rest)

    return Listening


def _marked(text: str, concepts: tuple[Concept, ...], weighted: bool) -> str:
    """A prompt with `embedding:` and a mark in place of every token.

    ComfyUI finds `embedding:` behind a blank, or where a part with a weight of its own begins, if weights are read.
    """
    places = {concept.token.lower(): place for place, concept in enumerate(concepts)}
    before, *rest = split_tokens(text, places)
    marked = before
    for token, after in zip(rest[::2], rest[1::2], strict=True):
        opens = weighted and marked.endswith("(") and not marked.endswith("\\(")
        blank = "" if not marked or marked[-1].isspace() or opens else " "
        marked += f"{blank}{STOCK_MARK}{MARK}{places[token.lower()]} {after}"
    return marked
