"""The CLIP connected to `keep_clip`, whose tokens come before a T5's: users of ELLA (arXiv 2403.05135) prefer that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...training.models.protocols import Conditioning
from .fingerprint import clip_fingerprint


@dataclass(frozen=True)
class KeptClip:
    """A CLIP with its patches and layer choice, kept with a T5; ComfyUI loads and offloads it separately.

    A LoRA or a layer choice that is applied to the T5 afterwards does not change it.
    """

    clip: Any
    width: int
    pooled_width: int
    """0 without a pooled output."""

    @staticmethod
    def of(clip, width: int) -> KeptClip:
        """Measures a CLIP's widths on an empty prompt. Raises ValueError for a T5 and for any but `width`."""
        if hasattr(clip.cond_stage_model, "retune_source"):
            raise ValueError("keep_clip is a T5 from Load T5; expected the CLIP that the model was trained with.")
        context, pooled = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
        kept = KeptClip(clip, context.shape[-1], 0 if pooled is None else pooled.shape[-1])
        if kept.width != width:
            raise ValueError(
                f"keep_clip gives a width of {kept.width}; expected the projection's {width}. Connect the CLIP of the "
                "model that the T5 is loaded for."
            )
        return kept

    def gives_pooled(self, width: int) -> bool:
        """Whether there is a pooled output. Raises ValueError unless it has the `width` that the model reads."""
        if width and self.pooled_width not in (0, width):
            raise ValueError(f"keep_clip gives a pooled output of {self.pooled_width}; expected the model's {width}.")
        return self.pooled_width > 0

    def encode(self, tokens: dict, *, without: str) -> Conditioning:
        """ComfyUI's encoding of one prompt, from all its tokens but those of the encoder named `without` (the T5)."""
        its_tokens = {name: sections for name, sections in tokens.items() if name != without}
        context, pooled = self.clip.encode_from_tokens(its_tokens, return_pooled=True)
        return Conditioning(context, pooled)

    def fingerprint(self) -> str:
        """Hash of all that `encode` depends on (`clip_fingerprint`)."""
        with torch.inference_mode(False):
            return clip_fingerprint(self.clip)
