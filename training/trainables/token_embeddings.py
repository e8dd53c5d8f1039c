"""Embeddings of new tokens as a trainable. The text encoder's own vocabulary is never written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..common.rng import generator
from ..formats.embedding_report import median_norm
from ..models.concepts import Concept, Vocabulary, pieces
from ..models.stored import exact
from .base import SwappedTrainable

log = logging.getLogger(__name__)


def first_vectors(
    text: str, count: int, name: str, vocabulary: Vocabulary, known: Sequence[Concept], random: torch.Generator
) -> Tensor:
    """Initial vectors of a new token, from the tokens of a text.

    Args:
        text: its tokens' vectors are used, the first `count` of them, or each repeated to make up the number. An empty
            text draws normal vectors of the vocabulary's median norm.
        count: number of vectors.
        name: the text encoder's.
        vocabulary: of that text encoder.
        known: concepts that the text may contain.
        random: for the draws of an empty text.

    Returns:
        (count, D) fp32.

    Raises:
        ValueError: the text has no token.
    """
    table = exact(vocabulary.table.detach())
    if not text:
        drawn = torch.randn(count, table.shape[1], generator=random)
        return (drawn / drawn.norm(dim=1, keepdim=True) * median_norm(vocabulary)).to(table.device)
    parts = pieces(text, known)
    vectors = [p.vectors[name].detach() if isinstance(p, Concept) else table[vocabulary.ids(p)] for p in parts]
    rows = torch.cat([part.to(table) for part in vectors])
    if not len(rows):
        raise ValueError(f"initial_text is {text!r}, no token of this text encoder; expected a word or two.")
    if len(rows) > count:
        log.warning("initial_text %r is %d tokens; the first %d are taken. Raise vectors.", text, len(rows), count)
    indices = torch.arange(count) * len(rows) // count if len(rows) < count else torch.arange(count)
    return rows[indices.to(rows.device)].clone()


def start_concept(
    token: str, text: str, count: int, vocabularies: Mapping[str, Vocabulary], known: Sequence[Concept], seed: int
) -> Concept:
    """A concept before training, its vectors from `first_vectors`; random ones come from (seed, token, encoder)."""
    vectors = {
        name: first_vectors(text, count, name, vocabulary, known, generator(seed, "embedding", token, name))
        for name, vocabulary in vocabularies.items()
    }
    return Concept(token, vectors)


class TokenEmbeddings(SwappedTrainable):
    """The vectors of concepts: fp32 masters named `<token>/<encoder>`, (n, D) each.

    Args:
        concepts: those that the text encoder was given by `with_concepts`; their mappings of vectors are changed while
            attached.
        networks: roots that are frozen while mounted.
        norms: encoder -> length to which every vector is scaled wherever it is read; its gradient then has no part
            along the vector. Encoders that are left out have free lengths.
        device: where the masters are.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        networks: Sequence[nn.Module],
        norms: Mapping[str, float],
        device: torch.device,
    ):
        self._norms = dict(norms)
        self._places = {f"{c.token}/{name}": (c, name) for c in concepts for name in c.vectors}
        masters = {
            key: nn.Parameter(concept.vectors[name].detach().to(device, torch.float32, copy=True))
            for key, (concept, name) in self._places.items()
        }
        super().__init__(masters, networks)

    def vectors(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The masters, or other values of the same names, as the text encoder reads them."""
        values = self.parameters if values is None else values
        return {key: self._scaled(values[key], name) for key, (_, name) in self._places.items()}

    def _scaled(self, vectors: Tensor, name: str) -> Tensor:
        if name not in self._norms:
            return vectors
        return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12) * self._norms[name]

    def _current(self) -> dict[str, Tensor]:
        return {key: concept.vectors[name] for key, (concept, name) in self._places.items()}

    def _replacements(self, values: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.vectors(values)

    def _swap(self, tensors: Mapping[str, Tensor]) -> None:
        for key, value in tensors.items():
            concept, name = self._places[key]
            concept.vectors[name] = value

    def concepts(self, values: Mapping[str, Tensor] | None = None) -> tuple[Concept, ...]:
        """New concepts with these values (the masters' without them), fp32 on the CPU."""
        by_token: dict[str, dict[str, Tensor]] = {}
        for key, vectors in self.vectors(values).items():
            concept, name = self._places[key]
            by_token.setdefault(concept.token, {})[name] = vectors.detach().to("cpu", torch.float32, copy=True)
        return tuple(Concept(token, vectors) for token, vectors in by_token.items())
