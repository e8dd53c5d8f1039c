"""Assigns the vectors of embedding files to a model's text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..models.concepts import Vocabulary
from .embedding import EmbeddingFile

WIDTHS = {
    768: "SD1.x's CLIP, or the first of SDXL's",
    1024: "SD2.x's CLIP",
    1280: "the second CLIP of SDXL",
    4096: "T5-XXL",
}
"""Width of token embeddings -> the text encoders of that width, for messages."""
_FAMILIES = {("clip_l",): "SD1.x", ("clip_h",): "SD2.x", ("clip_g", "clip_l"): "SDXL", ("clip_g",): "SDXL"}


def family_of(encoders: Iterable[str]) -> str:
    """Model family of a set of text encoders: SD1.x, SD2.x, SDXL, or T5 if any of them is a T5; "" if unknown."""
    names = sorted(encoders)
    return "T5" if any(_is_t5(name) for name in names) else _FAMILIES.get(tuple(names), "")


def assign_to_encoders(
    file: EmbeddingFile, vocabularies: Mapping[str, Vocabulary], second: EmbeddingFile | None = None
) -> dict[str, Tensor]:
    """Assigns the vectors of one or two embedding files to a model's text encoders.

    A part goes to the encoder that it names. An unnamed part goes to the first encoder of its width that has no vectors
    yet, CLIP before T5.

    Args:
        file: The embedding file.
        vocabularies: The model's text encoders: name -> vocabulary.
        second: A file with the vectors that `file` lacks, such as the second one of diffusers' SDXL embeddings.

    Returns:
        Encoder name -> (n, D) vectors, in the order of `vocabularies`.

    Raises:
        ValueError: A part fits no encoder, an encoder gets no vectors, or encoders get different numbers of vectors.
    """
    widths = {name: vocabulary.table.shape[1] for name, vocabulary in vocabularies.items()}
    assigned: dict[str, Tensor] = {}
    for source in [file] if second is None else [file, second]:
        for encoder, vectors in source.parts:
            assigned[_matching_encoder(source, encoder, vectors.shape[1], widths, assigned)] = vectors
    _check_assigned(file, assigned, widths)
    return {name: assigned[name] for name in widths}


def _matching_encoder(
    source: EmbeddingFile, encoder: str, width: int, widths: Mapping[str, int], assigned: Mapping[str, Tensor]
) -> str:
    """The encoder that a part belongs to; ValueError if none is free.

    Args:
        encoder: The part's encoder, or "" if the file does not name it.
        width: D of the part's vectors.
        widths: The model's encoders: name -> width.
        assigned: Encoders that have vectors already.
    """
    named = [name for name in widths if encoder in ("", name) or _is_t5(encoder) and _is_t5(name)]
    fitting = sorted((name for name in named if widths[name] == width), key=_is_t5)
    free = [name for name in fitting if name not in assigned]
    if free:
        return free[0]
    if fitting:
        raise ValueError(f"{source.name} brings vectors for {fitting[0]}, which has some already; expected them once.")
    raise _other_model(source, encoder, width, widths)


def _other_model(source: EmbeddingFile, encoder: str, width: int, widths: Mapping[str, int]) -> ValueError:
    """The error for a part that fits no encoder; arguments as in `_matching_encoder`."""
    part = f"{encoder}, {width} wide" if encoder else f"{width} wide"
    return ValueError(
        f"{source.name} is for {_describe_width(width)} ({part}); expected one for this text encoder, which is "
        f"{_describe_encoders(widths)}. Use it with the model it was trained for."
    )


def _check_assigned(file: EmbeddingFile, assigned: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """Raises ValueError unless every encoder has vectors, and all the same number of them."""
    if missing := [name for name in widths if name not in assigned]:
        raise ValueError(
            f"{file.name} has vectors for {' and '.join(assigned)} alone; expected some for {' and '.join(missing)} "
            f"too, since this text encoder is {_describe_encoders(widths)}. Give the file that has them as "
            f"second_file, or use it with {' and '.join(_describe_width(widths[name]) for name in assigned)}."
        )
    counts = {name: len(assigned[name]) for name in widths}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{file.name} has unequal numbers of vectors ({text}); expected as many for each encoder.")


def _describe_width(width: int) -> str:
    """The text encoder with token embeddings of this width, such as "T5-XXL"."""
    return WIDTHS.get(width, "another model")


def _describe_encoders(widths: Mapping[str, int]) -> str:
    """Family and widths of a model's encoders, such as "SDXL's (clip_l 768, clip_g 1280)"."""
    family = family_of(widths)
    text = ", ".join(f"{name} {width}" for name, width in widths.items())
    return f"{family}'s ({text})" if family else text


def _is_t5(name: str) -> bool:
    return name.startswith("t5")
