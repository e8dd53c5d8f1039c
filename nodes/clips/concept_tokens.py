"""Concepts in ComfyUI's prompts: a clone of a CLIP whose tokenizers read a token as its vectors.

A token is replaced by `embedding:` and a name that no file has, and ComfyUI's own code does the rest: prompt weights,
windows of 77 tokens, `embedding:` with real files. A CLIP's clones share its tokenizers, so they are copied here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from ...training.config.tokens import STOCK_MARK
from ...training.models.concepts import Concept, Vocabulary, add_concepts, expect_vectors, split_tokens
from ..common.weights import patched_weight
from .mixins import add_mixin

PLACEHOLDER = "retune-concept-"
"""With a concept's index after it: the embedding's name that ComfyUI's tokenizer reads."""


def with_concepts(clip, concepts: Iterable[Concept]):
    """A clone of a CLIP whose prompts may use these concepts in addition to those it has.

    With a T5 and a kept CLIP only the T5 reads them: add the kept CLIP's before. Raises ValueError for a concept
    without vectors of the right width for each text encoder.
    """
    combined = add_concepts(concepts_of(clip), concepts)
    expect_vectors(combined, embedding_widths(clip))
    tokenizer = copy.copy(clip.tokenizer)
    for name, part in _tokenizers(clip):
        setattr(tokenizer, name, _with_concepts(part, name, combined))
    clone = clip.clone()
    clone.tokenizer = tokenizer
    return clone


def concepts_of(clip) -> tuple[Concept, ...]:
    """The concepts that a CLIP's prompts may use."""
    return next((part.retune_concepts for _, part in _tokenizers(clip) if hasattr(part, "retune_concepts")), ())


def embedding_widths(clip) -> dict[str, int]:
    """Width of the token embeddings of each text encoder, by ComfyUI's name of it."""
    return {name: _token_embedding(clip, name)[1].shape[1] for name, _ in _tokenizers(clip)}


def vocabularies_of(clip) -> dict[str, Vocabulary]:
    """Vocabulary of each text encoder, by ComfyUI's name of it, with the CLIP's patches on the token embeddings."""
    vocabularies = {}
    for name, part in _tokenizers(clip):
        table = patched_weight(clip.patcher, _token_embedding(clip, name)[0])
        vocabularies[name] = Vocabulary(table, partial(_ids, part), partial(_decode, part))
    return vocabularies


def _token_embedding(clip, name: str) -> tuple[str, Tensor]:
    """Name and weight of a text encoder's token embeddings."""
    ends = ("token_embedding.weight", ".shared.weight")
    weights = clip.cond_stage_model.named_parameters()
    return next((key, weight) for key, weight in weights if key.startswith(f"{name}.") and key.endswith(ends))


def _tokenizers(clip) -> Iterator[tuple[str, Any]]:
    """Name of each text encoder, and ComfyUI's tokenizer for it."""
    from comfy.sd1_clip import SDTokenizer

    return ((name, part) for name, part in vars(clip.tokenizer).items() if isinstance(part, SDTokenizer))


def _ids(tokenizer, text: str) -> list[int]:
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    return list(tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start : end])


def _decode(tokenizer, token: int) -> str:
    return tokenizer.tokenizer.decode([token]).strip()


def _with_concepts(tokenizer, encoder: str, concepts: tuple[Concept, ...]):
    """A copy of the tokenizer of a text encoder that reads these concepts."""
    copied = add_mixin(copy.copy(tokenizer), ConceptTokens)
    copied.retune_encoder, copied.retune_concepts = encoder, concepts
    if copied.embedding_directory is None:  # ComfyUI then reads no embeddings at all
        copied.embedding_directory = []
    return copied


class ConceptTokens:
    """Mixin of ComfyUI's SDTokenizer: tokens of `retune_concepts` become their vectors for `retune_encoder`."""

    def tokenize_with_weights(self, text, *args, **options):
        weighted = not options.get("disable_weights", self.disable_weights)
        return super().tokenize_with_weights(_with_placeholders(text, self.retune_concepts, weighted), *args, **options)

    def _try_get_embedding(self, embedding_name):
        name, *rest = embedding_name.split() or [""]
        if not name.startswith(PLACEHOLDER):
            return super()._try_get_embedding(embedding_name)
        concept = self.retune_concepts[int(name.removeprefix(PLACEHOLDER))]
        return concept.vectors[self.retune_encoder], name, " ".join(rest)


def _with_placeholders(text: str, concepts: tuple[Concept, ...], weighted: bool) -> str:
    """A prompt with `embedding:` and a placeholder instead of every token.

    ComfyUI reads `embedding:` after a blank and, if prompt weights are read (`weighted`), at the start of a part in
    brackets.
    """
    indices = {concept.token.lower(): index for index, concept in enumerate(concepts)}
    replaced, *rest = split_tokens(text, indices)
    for token, after in zip(rest[::2], rest[1::2], strict=True):
        opens = weighted and replaced.endswith("(") and not replaced.endswith("\\(")
        blank = "" if not replaced or replaced[-1].isspace() or opens else " "
        replaced += f"{blank}{STOCK_MARK}{PLACEHOLDER}{indices[token.lower()]} {after}"
    return replaced
