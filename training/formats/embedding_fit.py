"""Which text encoder each vector of an embedding file is for."""

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
"""Width of token embeddings -> the text encoder that has it."""
_FAMILIES = {("clip_l",): "SD1.x", ("clip_h",): "SD2.x", ("clip_g", "clip_l"): "SDXL", ("clip_g",): "SDXL"}


def family_of(encoders: Iterable[str]) -> str:
    """Model family of a set of text encoders: SD1.x, SD2.x, SDXL, or T5 when one is among them; else empty."""
    names = sorted(encoders)
    return "T5" if any(_is_t5(name) for name in names) else _FAMILIES.get(tuple(names), "")


def assign_to_encoders(
    file: EmbeddingFile, vocabularies: Mapping[str, Vocabulary], second: EmbeddingFile | None = None
) -> dict[str, Tensor]:
    """The (n, D) vectors of every text encoder, in the order of `vocabularies`.

    A part goes to the encoder that it names, else to the first one of its width that has none yet, CLIP before T5.
    second: a file with what the first one lacks. Errors: ValueError when a part fits no encoder, an encoder gets none,
    or numbers of vectors differ.
    """
    widths = {name: vocabulary.table.shape[1] for name, vocabulary in vocabularies.items()}
    found: dict[str, Tensor] = {}
    for source in [file] if second is None else [file, second]:
        for encoder, vectors in source.parts:
            place = _place(source, encoder, vectors.shape[1], widths, found)
            found[place] = vectors
    if missing := [name for name in widths if name not in found]:
        raise ValueError(
            f"{file.name} has vectors for {' and '.join(found)} alone; expected some for {' and '.join(missing)} too, "
            f"since this text encoder is {_ours(widths)}. Give the file that has them as second_file, or use it with "
            f"{' and '.join(_meant(widths[name]) for name in found)}."
        )
    counts = {name: len(found[name]) for name in widths}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{file.name} has unequal numbers of vectors ({listed}); expected as many for each encoder.")
    return {name: found[name] for name in widths}


def _place(source: EmbeddingFile, encoder: str, width: int, widths: Mapping[str, int], taken: Mapping) -> str:
    """The encoder that a part is for; ValueError when there is none."""
    named = [name for name in widths if encoder in ("", name) or _is_t5(encoder) and _is_t5(name)]
    fitting = sorted((name for name in named if widths[name] == width), key=_is_t5)
    free = [name for name in fitting if name not in taken]
    if free:
        return free[0]
    if fitting:
        raise ValueError(f"{source.name} brings vectors for {fitting[0]}, which has some already; expected them once.")
    part = f"{encoder}, {width} wide" if encoder else f"{width} wide"
    raise ValueError(
        f"{source.name} is for {_meant(width)} ({part}); expected one for this text encoder, which is {_ours(widths)}. "
        "Use it with the model it was trained for."
    )


def _meant(width: int) -> str:
    return WIDTHS.get(width, "another model")


def _ours(widths: Mapping[str, int]) -> str:
    """Such as "SDXL's (clip_l 768, clip_g 1280)"."""
    family = family_of(widths)
    listed = ", ".join(f"{name} {width}" for name, width in widths.items())
    return f"{family}'s ({listed})" if family else listed


def _is_t5(name: str) -> bool:
    return name.startswith("t5")
