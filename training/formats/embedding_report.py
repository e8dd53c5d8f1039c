"""How learned vectors lie among the words that a text encoder knows, and what an embedding file is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models.concepts import Concept, Vocabulary
from .embedding import EmbeddingFile
from .embedding_fit import family_of
from .lora_report import Base, base_from_metadata

_ROWS = 8192
"""Words compared at once: T5-XXL's whole table in fp32 is half a gigabyte."""


@dataclass(frozen=True)
class VectorStatistics:
    """norm: Euclidean. ratio: norm / the vocabulary's median norm. nearest: (word, cosine), the most alike first."""

    norm: float
    ratio: float
    nearest: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        words = ", ".join(f"{word or '(blank)'} {cosine:.2f}" for word, cosine in self.nearest)
        return f"norm {self.norm:.3g}, {self.ratio:.2f} x the words' median; nearest words {words}"


def median_norm(vocabulary: Vocabulary) -> float:
    """Median of the Euclidean norms of a vocabulary's token embeddings."""
    return torch.cat([rows.float().norm(dim=1) for rows in vocabulary.table.detach().split(_ROWS)]).median().item()


def nearest_words(vocabulary: Vocabulary, vectors: Tensor, count: int = 3) -> list[tuple[tuple[str, float], ...]]:
    """For each of (n, D) vectors the `count` words of the highest cosine similarity, as (word, cosine)."""
    table = vocabulary.table.detach()
    units = normalize(vectors.detach().float().to(table.device))
    cosines = torch.cat([units @ normalize(rows.float()).T for rows in table.split(_ROWS)], dim=1)
    values, ids = cosines.topk(min(count, len(table)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [tuple((vocabulary.word(i), v) for i, v in zip(*pair, strict=True)) for pair in pairs]


def vector_statistics(vocabulary: Vocabulary, vectors: Tensor, count: int = 3) -> list[VectorStatistics]:
    """The figures of each of (n, D) vectors."""
    norms, median = vectors.detach().float().norm(dim=1).tolist(), median_norm(vocabulary)
    nearest = nearest_words(vocabulary, vectors, count)
    return [VectorStatistics(norm, norm / median, words) for norm, words in zip(norms, nearest, strict=True)]


def is_vocabulary_word(vocabulary: Vocabulary, token: str) -> bool:
    """Whether the text encoder knows the token, in these letters or in small ones, as one word already."""
    texts = [vocabulary.ids(word) for word in (token, token.lower())]
    return any(len(ids) == 1 and vocabulary.word(ids[0]).lower() == token.lower() for ids in texts)


def token_warnings(token: str, vocabularies: Mapping[str, Vocabulary]) -> list[str]:
    """One line when the token is a word that a text encoder knows."""
    knowing = [name for name, vocabulary in vocabularies.items() if is_vocabulary_word(vocabulary, token)]
    if not knowing:
        return []
    return [f"{token} is a word that {' and '.join(knowing)} knows; prompts now get the embedding in its place."]


def base_of_embedding(file: EmbeddingFile) -> Base:
    """The model family that a file's metadata names."""
    said = base_from_metadata(file.metadata)
    named = file.metadata.get("base_model", "")
    return said if said.family or not named else Base(named, f"base_model {named}")


def embedding_warnings(
    files: Sequence[EmbeddingFile], concept: Concept, vocabularies: Mapping[str, Vocabulary]
) -> list[str]:
    """Token known already, another base model by metadata, vectors of zeros; one line each."""
    found, family = token_warnings(concept.token, vocabularies), family_of(vocabularies)
    for file in files:
        base = base_of_embedding(file)
        if base.family and family and base.family != family:
            found.append(f"{file.name} was made for {base}; this text encoder is {family}'s.")
    zeros = [name for name, vectors in concept.vectors.items() if not vectors.any(dim=1).all()]
    return found + [f"{files[0].name} has vectors of zeros for {name}; they say nothing." for name in zeros]


def embedding_report(files: Sequence[EmbeddingFile], concept: Concept, vocabularies: Mapping[str, Vocabulary]) -> str:
    """Format, token, what the file says of itself and the figures of each vector, in a few lines; warnings last."""
    lines = [f"{' + '.join(file.name for file in files)}: {files[0].layout}, token {concept.token}"]
    for file in files:
        said = {
            "name": file.token,
            "base": str(base_of_embedding(file)),
            "checkpoint": file.checkpoint,
            "step": file.step,
        }
        lines.append(f"  {file.name} says: " + ", ".join(f"{key} {value}" for key, value in said.items() if value))
    for name, vectors in concept.vectors.items():
        count, width = vectors.shape
        lines.append(f"  {name}: {count} vector{'s' * (count > 1)} of {width} numbers")
        figures = vector_statistics(vocabularies[name], vectors)
        lines += [f"    {number}: {figure}" for number, figure in enumerate(figures, start=1)]
    return "\n".join(lines + [f"  warning: {line}" for line in embedding_warnings(files, concept, vocabularies)])
