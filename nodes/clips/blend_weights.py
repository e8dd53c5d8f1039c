"""Text encoders blended in their weights: `set` patches on a clone of the first, so that no weight is edited."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

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
from .concept_tokens import concepts_of, widths_of, with_concepts
from .t5_clip import clone_with_projection, expect_t5, is_t5_clip, t5_parts

log = logging.getLogger(__name__)

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
"""How a weight may be stored to be blended; a patch keeps the dtype, since ComfyUI would round to it anyway."""


def blend_weights(clips: Sequence, weights: Sequence[float]):
    """A CLIP whose weights are sum_i w_i W_i, W_i with the patches (LoRA) that encoder i carries.

    The encoders are parts ("clip_l", "clip_g", ...). The first must have every part. A part that others lack is shared
    by those that have it (`renormalised_weights`): a CLIP-L of SD1.5 is mixed into SDXL's, and SDXL's CLIP-G stays.
    Weight 1 on one encoder with all parts and 0 on the others gives that encoder. Concepts (`with_concepts`) come from
    all. Raises ValueError for other structures, and for what weights cannot hold: hooks, layer choices that differ.
    """
    expect_blendable(clips)
    parts = [_parts(clip) for clip in clips]
    for number, (clip, own) in enumerate(zip(clips[1:], parts[1:], strict=True), 2):
        _expect_fit(clips[0], parts[0], clip, own, number)
    chosen = only_one(weights)
    if chosen is not None and parts[chosen].keys() == parts[0].keys():
        return with_all_concepts(clips[chosen], clips, weights)
    result = clips[0].clone()
    for part, tensors in parts[0].items():
        held = [part in own for own in parts]
        own_weights = renormalised_weights(weights, held)
        if not all(held):
            owners = ", ".join(str(number) for number, has in enumerate(held, 1) if has)
            log.info("%s is only in text encoder %s: it is not mixed with the others", part, owners)
        if own_weights is None or only_one(own_weights) == 0:
            continue
        for name in tensors:
            _set(result, name, [clip if has else None for clip, has in zip(clips, held, strict=True)], own_weights)
    if is_t5_clip(result):
        result = _with_projection(result, clips, weights)
    return with_all_concepts(result, clips, weights)


def _with_projection(result, clips: Sequence, weights: Sequence[float]):
    """The T5 with the mixed projection; as it is where all have the same one."""
    projections = [t5_parts(clip).projection for clip in clips]
    mixed = blend_projections(weights, projections)
    first, *others = (projection.state_dict() for projection in projections)
    if all(torch.equal(first[name], other[name]) for other in others for name in first) and is_close_to_one(
        sum(weights)
    ):
        return result
    return clone_with_projection(result, mixed)


def expect_blendable(clips: Sequence) -> None:
    """Raises ValueError for an empty CLIP and for hooks, which change weights by the sampler's step."""
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
    """The place of the only weight, if it is 1 and all others are 0."""
    used = [place for place, weight in enumerate(weights) if weight]
    return used[0] if len(used) == 1 and weights[used[0]] == 1 else None


def with_all_concepts(result, clips: Sequence, weights: Sequence[float]):
    """`result` with the words that any of the CLIPs knows; of two for one word that of the larger weight counts.

    One for other encoders than those of `result` is left out, with a warning.
    """
    found = [(weight, concept) for weight, clip in zip(weights, clips, strict=True) for concept in concepts_of(clip)]
    if not found:
        return result.clone()
    known: dict[str, Concept] = {}
    widths = widths_of(result)
    for _, concept in sorted(found, key=lambda pair: -pair[0]):
        if any(name not in concept.vectors or concept.vectors[name].shape[1] != widths[name] for name in widths):
            log.warning("%s is left out: it has no vectors for all of %s", concept.token, ", ".join(widths))
            continue
        kept = known.setdefault(concept.token.lower(), concept)
        if kept.fingerprint != concept.fingerprint:
            log.warning("%s differs between the encoders; that of the largest weight counts", concept.token)
    return with_concepts(result, known.values())


def shapes_of(clip) -> dict[str, torch.Size]:
    """Name -> shape of every weight of a CLIP."""
    return {name: weight.shape for name, weight in clip.cond_stage_model.named_parameters()}


def _parts(clip) -> dict[str, dict[str, torch.Size]]:
    """Text encoder ("clip_l", "t5xxl", ...) -> its weights' shapes by their full names."""
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes_of(clip).items():
        parts.setdefault(name.split(".")[0], {})[name] = shape
    return parts


def _expect_fit(first, first_parts: dict, clip, parts: dict, number: int) -> None:
    """Raises ValueError when the weights of text encoder `number` cannot be added to those of the first."""
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
    """Whether a LoRA was put on a CLIP without merging it into the weights."""
    return bool(getattr(clip.patcher, "injections", None))


def _expect_same_t5(first, clip, number: int) -> None:
    """Two T5 of one shape must read prompts alike, beside the same kept CLIP."""
    expect_t5(first)
    expect_t5(clip)
    one, two = (each.cond_stage_model.retune_source for each in (first, clip))
    if one.tokenizer.fingerprint != two.tokenizer.fingerprint:
        raise ValueError(f"text encoder {number} has another tokenizer than text encoder 1; expected the same.")
    if one.padding != two.padding:
        raise ValueError(
            f"text encoder {number} is read with {two.padding}; expected that of text encoder 1, {one.padding}. Load "
            "both with the same max_tokens and pad."
        )
    kept = [each.cond_stage_model.retune_kept for each in (first, clip)]
    if kept[0] is not kept[1] and (None in kept or kept[0].fingerprint() != kept[1].fingerprint()):
        raise ValueError(
            f"text encoder {number} keeps another CLIP than text encoder 1; expected the same. Blend these before Load "
            "T5, and connect the blend to keep_clip of both."
        )


def _set(result, name: str, owners: Sequence, weights: Sequence[float]) -> None:
    """Gives `result` the mixed weight as its only patch there; none where nothing changes."""
    with torch.inference_mode(False), torch.no_grad():
        mixed = weighted_sum(weights, list(_weights(owners, weights, name)))
        if torch.equal(mixed, patched_weight(result.patcher, name)):
            return
    dtype = _stored(result, name)
    result.patcher.patches.pop(name, None)  # the mixture holds them
    result.add_patches({name: ("set", (mixed.to(dtype),))})


def _weights(owners: Sequence, weights: Sequence[float], name: str) -> Iterator[Tensor]:
    """Patched weights in fp32; an empty tensor for those that `weighted_sum` does not read."""
    for owner, weight in zip(owners, weights, strict=True):
        if owner is None or not weight:
            yield torch.empty(0)
        else:
            _stored(owner, name)
            yield patched_weight(owner.patcher, name)


def _stored(clip, name: str) -> torch.dtype:
    """dtype of a weight; ValueError when it is packed (fp8, int8)."""
    import comfy.utils

    weight = comfy.utils.get_attr(clip.patcher.model, name)
    if weight.dtype not in PLAIN or type(weight.data) is not Tensor:
        raise ValueError(
            f"{name} is stored as {weight.dtype} ({type(weight.data).__name__}); expected fp32, fp16 or bf16. Load "
            'the text encoder unquantised, or blend in space "embeddings".'
        )
    return weight.dtype
