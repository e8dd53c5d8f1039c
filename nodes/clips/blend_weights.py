"""Text encoders blended in their weights, as `set` patches on a clone of the first: no weight is changed in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...training.models.concepts import Concept
from ...training.text_encoder.blend import (
    blend_projections,
    expect_same_shapes,
    is_close_to_one,
    renormalised_weights,
    weighted_sum,
)
from ..common.weights import patched_weight
from .concept_tokens import concepts_of, embedding_widths, with_concepts
from .t5_clip import clone_with_projection, expect_t5, is_t5_clip, t5_parts

log = logging.getLogger(__name__)

BLENDABLE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that can be blended. A patch has the weight's dtype, since ComfyUI would round to it anyway."""


def blend_weights(clips: Sequence, weights: Sequence[float]):
    """A CLIP whose weights are sum_i w_i W_i, where W_i has the patches (LoRA) of CLIP i applied.

    A CLIP has parts ("clip_l", "clip_g", ...). A part that only some CLIPs have is blended among these (`shares`): a
    CLIP-L of SD1.5 is blended into SDXL's, and SDXL's CLIP-G stays. Concepts come from all CLIPs. With weight 1 on one
    CLIP that has all parts and 0 on the others the result is a clone of that one.

    Args:
        clips: the first must have every part.
        weights: w_i, one for each CLIP.

    Raises:
        ValueError: for CLIPs of another structure, for hooks, and for layer choices that differ.
    """
    expect_blendable(clips)
    parts = [_parts(clip) for clip in clips]
    for number, (clip, its_parts) in enumerate(zip(clips[1:], parts[1:], strict=True), 2):
        _expect_fit(clips[0], parts[0], clip, its_parts, number)
    chosen = only_one(weights)
    if chosen is not None and parts[chosen].keys() == parts[0].keys():
        return with_all_concepts(clips[chosen], clips, weights)
    result = clips[0].clone()
    for part, tensors in parts[0].items():
        owners = [clip if part in its_parts else None for clip, its_parts in zip(clips, parts, strict=True)]
        part_weights = _part_weights(part, weights, owners)
        if part_weights is None or only_one(part_weights) == 0:
            continue
        for name in tensors:
            _set(result, name, owners, part_weights)
    if is_t5_clip(result):
        result = _with_projection(result, clips, weights)
    return with_all_concepts(result, clips, weights)


def _part_weights(part: str, weights: Sequence[float], owners: Sequence) -> list[float] | None:
    """Weights for a part whose owners are the CLIPs that have it, None for others; None where they sum to 0."""
    held = [owner is not None for owner in owners]
    if not all(held):
        numbers = ", ".join(str(number) for number, has in enumerate(held, 1) if has)
        log.info("%s is only in text encoder %s: it is not mixed with the others", part, numbers)
    return renormalised_weights(weights, held)


def _with_projection(result, clips: Sequence, weights: Sequence[float]):
    """A T5 CLIP with the blended projection; unchanged where all projections are equal."""
    projections = [t5_parts(clip).projection for clip in clips]
    blend = blend_projections(weights, projections)
    first, *others = (projection.state_dict() for projection in projections)
    if all(torch.equal(first[name], other[name]) for other in others for name in first) and is_close_to_one(
        sum(weights)
    ):
        return result
    return clone_with_projection(result, blend)


def expect_blendable(clips: Sequence) -> None:
    """Raises ValueError for an empty CLIP and for hooks, which change weights while sampling."""
    for number, clip in enumerate(clips, 1):
        if clip is None:
            raise ValueError(f"text encoder {number} is empty; expected a CLIP. Does the checkpoint hold one?")
        if has_hooks(clip):
            raise ValueError(
                f"text encoder {number} has hooks (Set CLIP Hooks); expected none. Blend first, in space "
                '"weights", and put hooks on the result.'
            )


def has_hooks(clip) -> bool:
    """Whether Set CLIP Hooks was used on a CLIP."""
    return clip.patcher.forced_hooks is not None or clip.apply_hooks_to_conds is not None


def only_one(weights: Sequence[float]) -> int | None:
    """The index of the weight that is 1, if all others are 0."""
    used = [index for index, weight in enumerate(weights) if weight]
    return used[0] if len(used) == 1 and weights[used[0]] == 1 else None


def with_all_concepts(result, clips: Sequence, weights: Sequence[float]):
    """A clone of `result` with the concepts of all CLIPs.

    Of two concepts with one token, the one of the CLIP with the larger weight is used. A concept that lacks vectors for
    an encoder of `result` is left out. Both are logged.
    """
    pairs = [(weight, concept) for weight, clip in zip(weights, clips, strict=True) for concept in concepts_of(clip)]
    if not pairs:
        return result.clone()
    by_weight = [concept for _, concept in sorted(pairs, key=lambda pair: -pair[0])]
    return with_concepts(result, _one_per_token(by_weight, embedding_widths(result)))


def _one_per_token(concepts: Iterable[Concept], widths: Mapping[str, int]) -> Iterable[Concept]:
    """The first concept of each token that has vectors of these widths; logs those that are left out."""
    chosen: dict[str, Concept] = {}
    for concept in concepts:
        if any(name not in concept.vectors or concept.vectors[name].shape[1] != widths[name] for name in widths):
            log.warning("%s is left out: it has no vectors for all of %s", concept.token, ", ".join(widths))
            continue
        first = chosen.setdefault(concept.token.lower(), concept)
        if first.fingerprint != concept.fingerprint:
            log.warning("%s differs between the encoders; that of the largest weight counts", concept.token)
    return chosen.values()


def shapes_of(clip) -> dict[str, torch.Size]:
    """Name -> shape of every weight of a CLIP."""
    return {name: weight.shape for name, weight in clip.cond_stage_model.named_parameters()}


def _parts(clip) -> dict[str, dict[str, torch.Size]]:
    """Part ("clip_l", "t5xxl", ...) -> full name -> shape of its weights."""
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes_of(clip).items():
        parts.setdefault(name.split(".")[0], {})[name] = shape
    return parts


def _expect_fit(first, first_parts: dict, clip, parts: dict, number: int) -> None:
    """Raises ValueError when the weights of text encoder `number` (from 1) cannot be added to those of the first."""
    if more := parts.keys() - first_parts.keys():
        raise ValueError(
            f"text encoder {number} has {', '.join(sorted(more))}, which text encoder 1 ({', '.join(first_parts)}) "
            'lacks. Connect the one with most parts first, or blend unlike encoders in space "embeddings".'
        )
    for part, shapes in parts.items():
        expect_same_shapes(first_parts[part], shapes, number)
    if parts.keys() == first_parts.keys() and clip.layer_idx != first.layer_idx:
        raise ValueError(
            f"text encoder {number} stops at layer {clip.layer_idx}, text encoder 1 at {first.layer_idx}; expected the "
            "same. Put CLIP Set Last Layer behind the blend."
        )
    if is_bypassed(clip) or is_bypassed(first):
        raise ValueError("a LoRA was put on without merging (bypass), so it is not in the weights. Use Load LoRA.")
    if is_t5_clip(first) or is_t5_clip(clip):
        _expect_same_t5(first, clip, number)


def is_bypassed(clip) -> bool:
    """Whether a CLIP has a LoRA that is added to the layers' outputs (bypass) instead of merged into the weights."""
    return bool(getattr(clip.patcher, "injections", None))


def _expect_same_t5(first, clip, number: int) -> None:
    """Raises ValueError for two T5 of one shape with different tokenizers, padding or kept CLIPs."""
    expect_t5(first)
    expect_t5(clip)
    expected, source = (each.cond_stage_model.retune_source for each in (first, clip))
    if expected.tokenizer.fingerprint != source.tokenizer.fingerprint:
        raise ValueError(f"text encoder {number} has another tokenizer than text encoder 1; expected the same.")
    if expected.padding != source.padding:
        raise ValueError(
            f"text encoder {number} is read with {source.padding}; expected that of text encoder 1, "
            f"{expected.padding}. Load both with the same max_tokens and pad."
        )
    kept = [each.cond_stage_model.retune_kept for each in (first, clip)]
    if kept[0] is not kept[1] and (None in kept or kept[0].fingerprint() != kept[1].fingerprint()):
        raise ValueError(
            f"text encoder {number} keeps another CLIP than text encoder 1; expected the same. Blend these before Load "
            "T5, and connect the blend to keep_clip of both."
        )


def _set(result, name: str, owners: Sequence, weights: Sequence[float]) -> None:
    """Makes the blended weight the only patch of a weight of `result`; no patch where it equals the present weight."""
    with torch.inference_mode(False), torch.no_grad():
        blend = weighted_sum(weights, list(_weights(owners, weights, name)))
        if torch.equal(blend, patched_weight(result.patcher, name)):
            return
    dtype = _blendable_dtype(result, name)
    result.patcher.patches.pop(name, None)  # they are in the blend
    result.add_patches({name: ("set", (blend.to(dtype),))})


def _weights(owners: Sequence, weights: Sequence[float], name: str) -> Iterator[Tensor]:
    """Each owner's patched weight in fp32; an empty tensor where there is no owner or its weight is 0."""
    for owner, weight in zip(owners, weights, strict=True):
        if owner is None or not weight:
            yield torch.empty(0)
        else:
            _blendable_dtype(owner, name)
            yield patched_weight(owner.patcher, name)


def _blendable_dtype(clip, name: str) -> torch.dtype:
    """dtype of a weight. Raises ValueError when it is quantised (fp8, int8)."""
    import comfy.utils

    weight = comfy.utils.get_attr(clip.patcher.model, name)
    if weight.dtype not in BLENDABLE or type(weight.data) is not Tensor:
        raise ValueError(
            f"{name} is stored as {weight.dtype} ({type(weight.data).__name__}); expected fp32, fp16 or bf16. Load "
            'the text encoder unquantised, or blend in space "embeddings".'
        )
    return weight.dtype
