"""The CLIP that a T5 stands beside: its tokens come first, as users of ELLA (arXiv 2403.05135) found best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...training.models.protocols import Conditioning


@dataclass(frozen=True)
class KeptClip:
    """A CLIP as it was given, patches and layer choice included; ComfyUI loads and offloads it as ever.

    A LoRA or a layer choice put on the T5 afterwards does not reach it.
    """

    clip: Any
    width: int
    pooled_width: int
    """0 without a pooled output."""

    @staticmethod
    def of(clip, width: int) -> KeptClip:
        """Encodes an empty prompt to see what comes out. Raises ValueError for a width other than the projection's."""
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
        """Whether there is a pooled output. Raises ValueError when it is not of the `width` that the model reads."""
        if width and self.pooled_width not in (0, width):
            raise ValueError(f"keep_clip gives a pooled output of {self.pooled_width}; expected the model's {width}.")
        return self.pooled_width > 0

    def encode(self, tokens: dict, *, besides: str) -> Conditioning:
        """Batch of 1, ComfyUI's own encoding; tokens: all but those under the name `besides`, which is the T5's."""
        own = {name: sections for name, sections in tokens.items() if name != besides}
        context, pooled = self.clip.encode_from_tokens(own, return_pooled=True)
        return Conditioning(context, pooled)

    def fingerprint(self) -> str:
        """Changes with the CLIP's weights, patches, layer choice and tokenizer options."""
        from .fingerprint import clip_fingerprint

        with torch.inference_mode(False):
            return clip_fingerprint(self.clip)
