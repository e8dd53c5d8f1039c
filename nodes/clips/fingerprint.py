"""A hash of all that a CLIP's encoding depends on."""

from __future__ import annotations

from ...training.common.fingerprint import tensors_fingerprint
from ...training.models.concepts import with_fingerprints
from ..common.weights import patched_weight
from .concept_tokens import concepts_of


def clip_fingerprint(clip) -> str:
    """Hash of a CLIP's patched weights, layer choice, tokenizer options and concepts, the same after a restart.

    Text projections are left out, except CLIP-G's: no UNet reads another. Most files lack it, and ComfyUI then leaves
    it uninitialised, so that the same file would have a different hash in every process.
    """
    names = [name for name, _ in clip.cond_stage_model.named_parameters()]
    read = [name for name in names if name.startswith("clip_g.") or not name.endswith(".text_projection.weight")]
    weights = ((name, patched_weight(clip.patcher, name)) for name in read)
    without_concepts = tensors_fingerprint(weights, clip.layer_idx, getattr(clip, "tokenizer_options", {}))
    return with_fingerprints(without_concepts, concepts_of(clip))
