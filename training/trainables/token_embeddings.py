"""Token embeddings as what trains: new words beside a text encoder's vocabulary, whose table is never touched."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..common.rng import generator
from ..formats.embedding_report import median_norm
from ..models.concepts import Concept, Vocabulary, pieces
from ..models.parameters import frozen

log = logging.getLogger(__name__)


def first_vectors(
    text: str, count: int, name: str, vocabulary: Vocabulary, known: Sequence[Concept], random: torch.Generator
) -> Tensor:
    """What `count` vectors start from, (count, D) fp32: those of a text's tokens, cut, or each repeated to fill up.

    known: concepts whose tokens the text may hold; name: of the text encoder. An empty text gives normal draws of the
    vocabulary's median norm. Raises ValueError for a text without a single token.
    """
    table = vocabulary.table.detach().float()
    if not text:
        drawn = torch.randn(count, table.shape[1], generator=random)
        return (drawn / drawn.norm(dim=1, keepdim=True) * median_norm(vocabulary)).to(table.device)
    parts = pieces(text, known)
    found = [p.vectors[name].detach() if isinstance(p, Concept) else table[vocabulary.ids(p)] for p in parts]
    rows = torch.cat([part.to(table) for part in found])
    if not len(rows):
        raise ValueError(f"initial_text is {text!r}, no token of this text encoder; expected a word or two.")
    if len(rows) > count:
        log.warning("initial_text %r is %d tokens; the first %d are taken. Raise vectors.", text, len(rows), count)
    places = torch.arange(count) * len(rows) // count if len(rows) < count else torch.arange(count)
    return rows[places.to(rows.device)].clone()


def start_concept(
    token: str, text: str, count: int, vocabularies: Mapping[str, Vocabulary], known: Sequence[Concept], seed: int
) -> Concept:
    """A new word before training, see `first_vectors`; random vectors are drawn from (seed, token, encoder)."""
    vectors = {
        name: first_vectors(text, count, name, vocabulary, known, generator(seed, "embedding", token, name))
        for name, vocabulary in vocabularies.items()
    }
    return Concept(token, vectors)


class TokenEmbeddings:
    """Trainable: the vectors of concepts, fp32 masters named `<token>/<encoder>`, (n, D) each.

    concepts: what the text encoder was given by `with_concepts`; their mappings of vectors are what is changed while
    attached. networks: roots that are frozen meanwhile. norms: encoder -> length that every vector is brought to
    wherever it is read, or empty: they are free. Gradients then have no part along the vector.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        networks: Sequence[nn.Module],
        norms: Mapping[str, float],
        device: torch.device,
    ):
        self._networks, self._norms = list(networks), dict(norms)
        self._originals: dict[str, Tensor] = {}
        self._places = {f"{c.token}/{name}": (c, name) for c in concepts for name in c.vectors}
        self.parameters = {
            key: nn.Parameter(concept.vectors[name].detach().to(device, torch.float32, copy=True))
            for key, (concept, name) in self._places.items()
        }

    def __len__(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def values(self) -> dict[str, Tensor]:
        """The masters as plain tensors, without copying."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the masters; names and shapes must match exactly."""
        given = {name: tuple(value.shape) for name, value in values.items()}
        own = {name: tuple(value.shape) for name, value in self.parameters.items()}
        if given != own:
            raise ValueError(f"saved vectors are {given}; expected {own}.")
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def rate(self, name: str) -> float:
        return 1.0

    def vectors(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The masters, or other values of the same names, as the text encoder reads them."""
        values = self.parameters if values is None else values
        return {key: self._of_length(values[key], name) for key, (_, name) in self._places.items()}

    def _of_length(self, vectors: Tensor, name: str) -> Tensor:
        if name not in self._norms:
            return vectors
        return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12) * self._norms[name]

    @contextmanager
    def attach(self, values: Mapping[str, Tensor] | None = None, rng_key: tuple[int, ...] = ()) -> Iterator[None]:
        """Puts the vectors in effect on the text encoder; see `SelectedWeights.attach`."""
        originals = {key: concept.vectors[name] for key, (concept, name) in self._places.items()}
        with frozen(self._networks):
            try:
                self._originals = originals
                self._put(self.vectors(values))
                yield
            finally:
                self._originals = {}
                self._put(originals)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While entered, inside `attach`, the text encoder is what it was before it."""
        attached = {key: concept.vectors[name] for key, (concept, name) in self._places.items()}
        try:
            self._put(self._originals)
            yield
        finally:
            self._put(attached)

    def _put(self, vectors: Mapping[str, Tensor]) -> None:
        for key, value in vectors.items():
            concept, name = self._places[key]
            concept.vectors[name] = value

    def concepts(self, values: Mapping[str, Tensor] | None = None) -> tuple[Concept, ...]:
        """Concepts of their own with these values, fp32 on the CPU."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, vectors in self.vectors(values).items():
            concept, name = self._places[key]
            found.setdefault(concept.token, {})[name] = vectors.detach().to("cpu", torch.float32, copy=True)
        return tuple(Concept(token, vectors) for token, vectors in found.items())
