"""What tells one CLIP from another."""

from __future__ import annotations

from ...training.common.fingerprint import tensors_fingerprint
from ...training.models.concepts import with_fingerprints
from ..common.weights import patched_weight
from .concept_tokens import concepts_of


def clip_fingerprint(clip) -> str:
    """Weights with their patches, layer choice, tokenizer options and concepts of a CLIP, wherever it is loaded.

    The text projection is left out but for SDXL's second CLIP: no UNet reads another's, most files lack it, and ComfyUI
    then leaves whatever was in that memory, so that the same file would have another fingerprint in every process.
    """
    names = [name for name, _ in clip.cond_stage_model.named_parameters()]
    read = [name for name in names if name.startswith("clip_g.") or not name.endswith(".text_projection.weight")]
    weights = ((name, patched_weight(clip.patcher, name)) for name in read)
    plain = tensors_fingerprint(weights, clip.layer_idx, getattr(clip, "tokenizer_options", {}))
    return with_fingerprints(plain, concepts_of(clip))
