"""The model inside a T5 CLIP: ComfyUI's T5 followed by a projection. Imports ComfyUI, so it is itself imported late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import comfy.model_management
import torch
from comfy import sd1_clip
from comfy.text_encoders.t5 import T5
from torch import Tensor

from ...training.models.protocols import Conditioning
from ...training.text_encoder.projection import masked_mean
from .frozen_projection import FrozenProjection
from .kept_clip import KeptClip
from .t5_tokens import T5Source, real_tokens, t5_tokenizer, warn_of_second_text


def clip_target(source: T5Source, projection: FrozenProjection, kept: KeptClip | None) -> SimpleNamespace:
    """The `target` of comfy.sd.CLIP: what makes the model and the tokenizer, and their parameters."""

    def tokenizer(embedding_directory=None, tokenizer_data=None):
        sdxl, other = projection.projection.pooled_width > 0, None if kept is None else kept.clip
        return t5_tokenizer(source, embedding_directory, sdxl=sdxl, keep_clip=other)

    return SimpleNamespace(clip=partial(T5WithProjection, source, projection, kept), tokenizer=tokenizer, params={})


class T5Backbone(sd1_clip.SDClipModel):
    """ComfyUI's T5 with the sizes of a config, read from the T5's file."""

    def __init__(self, config: dict, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(config),
            model_class=T5,
            special_tokens={"end": config["eos_token_id"], "pad": config["pad_token_id"]},
            enable_attention_masks=True,
            model_options=model_options or {},
        )


class T5WithProjection(sd1_clip.SD1ClipModel):
    """The `cond_stage_model` of a T5 CLIP.

    A CLIP's clones share it. `projection` is the original's: a clone's is an object patch of the same name.

    Args:
        source: the T5's file and how it is read.
        projection: from the T5's width to the denoiser's.
        kept: the CLIP whose context comes before the T5's, or None.
        device, dtype, model_options: as ComfyUI passes them.
    """

    def __init__(self, source: T5Source, projection: FrozenProjection, kept: KeptClip | None, **options):
        super().__init__(name=source.name, clip_model=partial(T5Backbone, source.config), **options)
        self.retune_source, self.retune_kept = source, kept
        self.projection = projection
        self.retune_time: Tensor | None = None
        self._caches, self._cached = False, None

    @contextmanager
    def caching_states(self, enabled: bool) -> Iterator[None]:
        """While entered, one prompt is encoded once and projected at every `retune_time` that is set.

        Not enabled, T5 runs each time, which weights that hooks change require.
        """
        self._caches = enabled
        try:
            yield
        finally:
            self._caches, self._cached, self.retune_time = False, None, None

    def backbone(self, tokens: dict) -> Conditioning:
        """Token states before the projection (`TextEncoder.backbone`), prompt weights applied, on T5's device."""
        name, kept = self.retune_source.name, self.retune_kept
        states = self._token_states(tokens)
        states = states.to(getattr(self, name).execution_device or states.device)
        real = real_tokens(tokens[name], self.retune_source).to(states.device)[None]
        mean = masked_mean(states, real) if self.projection.projection.pooled_width else None
        prefix = None if kept is None else kept.encode(tokens, without=name).to(states.device, torch.float32)
        return Conditioning(states, mean, None, prefix)

    def _token_states(self, tokens: dict) -> Tensor:
        """As `encode_token_weights` of ComfyUI's class, which brings states to the CPU even without prompt weights."""
        windows = tokens[self.retune_source.name]
        if any(weighted[1] != 1 for window in windows for weighted in window):
            return super().encode_token_weights(tokens)[0]
        states = getattr(self, self.clip).encode([[weighted[0] for weighted in window] for window in windows])[0]
        return torch.cat(states.split(1), dim=-2)

    def memory_estimation_function(self, tokens, device=None) -> int:
        """Bytes that ComfyUI keeps free in addition to T5's weights: the copy of the projection."""
        return self.projection.nbytes

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, Tensor | None]:
        if self.retune_kept is None:
            warn_of_second_text(tokens, self.retune_source)
        states = self._cached or self.backbone(tokens)
        if self._caches:
            self._cached = states
        result = self.projection.project(states, self.retune_time)
        result = result.to(comfy.model_management.intermediate_device())
        return result.context, result.pooled
