"""Reports on embeddings: where their vectors lie among the vocabulary's, and the contents of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..demo.editions import BASE, edition_of_tokens, made_for_another
from ..models.concepts import Concept, Vocabulary
from .embedding import EmbeddingFile
from .embedding_fit import family_of
from .lora_report import Base, base_from_metadata

_CHUNK = 8192
"""Token embeddings compared at once: T5-XXL's whole table in fp32 is half a gigabyte."""


@dataclass(frozen=True)
class VectorStatistics:
    """Statistics of one embedding vector.

    Args:
        norm: Euclidean norm.
        ratio: norm / the median norm of the vocabulary's token embeddings.
        nearest: (word, cosine similarity) of the most similar words, the most similar first.
    """

    norm: float
    ratio: float
    nearest: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        words = ", ".join(f"{word or '(blank)'} {cosine:.2f}" for word, cosine in self.nearest)
        return f"norm {self.norm:.3g}, {self.ratio:.2f} x the words' median; nearest words {words}"


def median_norm(vocabulary: Vocabulary) -> float:
    """Median Euclidean norm of a vocabulary's token embeddings."""
    return torch.cat([rows.float().norm(dim=1) for rows in vocabulary.table.detach().split(_CHUNK)]).median().item()


def nearest_words(vocabulary: Vocabulary, vectors: Tensor, count: int = 3) -> list[tuple[tuple[str, float], ...]]:
    """The `count` words most similar to each of (n, D) vectors, as (word, cosine similarity) pairs."""
    table = vocabulary.table.detach()
    units = normalize(vectors.detach().float().to(table.device))
    cosines = torch.cat([units @ normalize(rows.float()).T for rows in table.split(_CHUNK)], dim=1)
    values, ids = cosines.topk(min(count, len(table)))
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [tuple((vocabulary.word(i), cosine) for i, cosine in zip(*row, strict=True)) for row in rows]


def vector_statistics(vocabulary: Vocabulary, vectors: Tensor, count: int = 3) -> list[VectorStatistics]:
    """`VectorStatistics` of each of (n, D) vectors, with its `count` nearest words."""
    norms, median = vectors.detach().float().norm(dim=1).tolist(), median_norm(vocabulary)
    nearest = nearest_words(vocabulary, vectors, count)
    return [VectorStatistics(norm, norm / median, words) for norm, words in zip(norms, nearest, strict=True)]


def is_vocabulary_word(vocabulary: Vocabulary, token: str) -> bool:
    """Whether a text is a single token of the vocabulary, as written or in lower case."""
    texts = [vocabulary.ids(word) for word in (token, token.lower())]
    return any(len(ids) == 1 and vocabulary.word(ids[0]).lower() == token.lower() for ids in texts)


def token_warnings(token: str, vocabularies: Mapping[str, Vocabulary]) -> list[str]:
    """A warning if the token is an ordinary word of a text encoder's vocabulary; else an empty list."""
    encoders = [name for name, vocabulary in vocabularies.items() if is_vocabulary_word(vocabulary, token)]
    if not encoders:
        return []
    return [f"{token} is a word that {' and '.join(encoders)} knows; prompts now get the embedding in its place."]


def base_of_embedding(file: EmbeddingFile) -> Base:
    """The model family in a file's metadata."""
    base = base_from_metadata(file.metadata)
    name = file.metadata.get("base_model", "")
    return base if base.family or not name else Base(name, f"base_model {name}")


def embedding_warnings(
    files: Sequence[EmbeddingFile], concept: Concept, vocabularies: Mapping[str, Vocabulary]
) -> list[str]:
    """Warnings about a token that is an ordinary word, a file for another model, or vectors of zeros."""
    warnings, family = token_warnings(concept.token, vocabularies), family_of(vocabularies)
    edition = next((name for v in vocabularies.values() if (name := edition_of_tokens(v.table))), "")
    for file in files:
        base = base_of_embedding(file)
        if base.family and family and base.family != family:
            warnings.append(f"{file.name} was made for {base}; this text encoder is {family}'s.")
    for file in files:
        if line := made_for_another(file.metadata.get(BASE, ""), edition):
            warnings.append(f"{file.name} {line}")
    zeros = [name for name, vectors in concept.vectors.items() if not vectors.any(dim=1).all()]
    return warnings + [f"{files[0].name} has vectors of zeros for {name}; they say nothing." for name in zeros]


def embedding_report(files: Sequence[EmbeddingFile], concept: Concept, vocabularies: Mapping[str, Vocabulary]) -> str:
    """Layout, token, metadata and vector statistics of a loaded embedding, as text; warnings come last.

    Args:
        files: The files it was read from.
        concept: The token, and the vectors assigned to each text encoder.
        vocabularies: The model's text encoders: name -> vocabulary.
    """
    lines = [f"{' + '.join(file.name for file in files)}: {files[0].layout}, token {concept.token}"]
    lines += [f"  {file.name} says: {_file_entries(file)}" for file in files]
    for name, vectors in concept.vectors.items():
        count, width = vectors.shape
        lines.append(f"  {name}: {count} vector{'s' * (count > 1)} of {width} numbers")
        statistics = vector_statistics(vocabularies[name], vectors)
        lines += [f"    {number}: {line}" for number, line in enumerate(statistics, start=1)]
    return "\n".join(lines + [f"  warning: {line}" for line in embedding_warnings(files, concept, vocabularies)])


def _file_entries(file: EmbeddingFile) -> str:
    base = str(base_of_embedding(file))
    entries = {"name": file.token, "base": base, "checkpoint": file.checkpoint, "step": file.step}
    return ", ".join(f"{key} {value}" for key, value in entries.items() if value)
