"""A CLIP as a TextEncoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ...training.models.concepts import Concept, Vocabulary
from ...training.models.parameters import ParameterRef, parameter_refs
from ...training.models.protocols import Conditioning
from ..clips import t5_clip
from ..clips.concept_tokens import concepts_of, vocabularies_of, with_concepts
from ..clips.fingerprint import clip_fingerprint
from .denoiser import ComfyDenoiser
from .device import static_clip

CLIP_ROOM = 75
"""Tokens in one of a CLIP's windows of 77, its start and end token left out."""
UNREAD = re.compile(r".*(logit_scale|(?<!clip_g\.transformer\.)text_projection(\.weight)?)")
"""What no UNet reads of a CLIP: text projections but for that of SDXL's second one (see `clip_fingerprint`)."""


class ComfyTextEncoder:
    """TextEncoder over a CLIP. Captions are plain text: brackets in them are no prompt weights.

    For a T5 CLIP of this package `projection` is a copy that may train; for any other CLIP there is none.
    denoiser: the one it trains beside; needed for `training` alone.
    """

    def __init__(self, clip, denoiser: ComfyDenoiser | None = None):
        self.clip, self._denoiser, self._trains = clip, denoiser, False
        self.concepts = concepts_of(clip)
        self._is_t5 = t5_clip.is_t5_clip(clip)
        self.projection = t5_clip.t5_parts(clip).projection if self._is_t5 else None
        self.fingerprint = fingerprint_of(clip)
        self.width, self.pooled_width = t5_clip.widths_of(clip) if self._is_t5 else self._measured_widths()

    def _measured_widths(self) -> tuple[int, int]:
        empty = self.encode(self.tokenize([""]))
        return empty.context.shape[-1], 0 if empty.pooled is None else empty.pooled.shape[-1]

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return vocabularies_of(self.clip)

    @property
    def max_prompt_tokens(self) -> int:
        source = self.clip.cond_stage_model.retune_source if self._is_t5 else None
        return source.padding.max_tokens - 1 if source else CLIP_ROOM

    @property
    def chunks_long_prompts(self) -> bool:
        return not self._is_t5

    def with_concepts(self, concepts: Iterable[Concept]) -> ComfyTextEncoder:
        """Its `training` is its own; the projection that may train is shared."""
        other = copy.copy(self)
        other.clip = with_concepts(self.clip, concepts)
        other.concepts = concepts_of(other.clip)
        other.fingerprint = fingerprint_of(other.clip)
        return other

    def tokenize(self, texts: list[str]) -> list[str]:
        """The texts themselves: ComfyUI tokenizes and encodes one prompt at a time."""
        return texts

    def backbone(self, tokens: list[str]) -> Conditioning:
        with nullcontext() if self._trains else torch.no_grad():
            return Conditioning.cat(self._one(text) for text in tokens)

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        return states if self.projection is None else self.projection.project(states, time)

    def encode(self, tokens: list[str]) -> Conditioning:
        return self.project(self.backbone(tokens))

    @property
    def layers(self) -> dict[str, nn.Module]:
        found = self._static_clip().cond_stage_model.named_modules()
        linear = {path: layer for path, layer in found if isinstance(layer, nn.Linear)}
        return {f"text_encoders.{path}": layer for path, layer in linear.items() if not UNREAD.fullmatch(path)}

    @property
    def weights(self) -> dict[str, ParameterRef]:
        found = parameter_refs(self._static_clip().cond_stage_model, "text_encoders.")
        return {name: target for name, target in found.items() if not UNREAD.fullmatch(name)}

    @contextmanager
    def training(self) -> Iterator[None]:
        """ComfyUI's residuals are added in place, which would destroy what the norms before them keep for backward."""
        from comfy.text_encoders.t5 import T5LayerNorm

        patcher, modules = self._static_clip().patcher, self.clip.cond_stage_model.modules()
        norms = [module for module in modules if isinstance(module, (nn.LayerNorm, T5LayerNorm))]
        hooks = [norm.register_forward_pre_hook(_copy_first) for norm in norms]
        self._denoiser.keep_loaded.append(patcher)
        self._trains = True
        try:
            self._denoiser.load()
            yield
        finally:
            self._trains = False
            self._denoiser.keep_loaded.remove(patcher)
            for hook in hooks:
                hook.remove()

    def _static_clip(self):
        """The CLIP with weights that stay in place, from here on."""
        self.clip = static_clip(self.clip)
        return self.clip

    def _one(self, text: str) -> Conditioning:
        tokens = self.clip.tokenize(text, disable_weights=True)
        if self._is_t5:
            return t5_clip.encode_states(self.clip, tokens, trains=self._trains)
        if self._trains:
            return _encode_loaded(self.clip, tokens)
        context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return Conditioning(context.float().clone(), None if pooled is None else pooled.float().clone())


def _copy_first(_module, inputs: tuple) -> tuple:
    return inputs[0].clone(), *inputs[1:]


def _encode_loaded(clip, tokens: dict) -> Conditioning:
    """What `clip.encode_from_tokens` gives, of a CLIP that is loaded already, with gradients."""
    model = clip.cond_stage_model
    t5_clip.set_options(clip)
    context, pooled = model.encode_token_weights(tokens)[:2]
    return Conditioning(context.float(), None if pooled is None else pooled.float())


def fingerprint_of(clip) -> str:
    """Changes with whatever a CLIP makes of a prompt, but for the projection behind a T5."""
    return t5_clip.backbone_fingerprint(clip) if t5_clip.is_t5_clip(clip) else clip_fingerprint(clip)


def with_projection(clip, weights: Mapping[str, Tensor]):
    """A clone of a T5 CLIP whose projection has these weights; the CLIP itself when there are none."""
    if not weights:
        return clip
    parts = t5_clip.t5_parts(clip)
    state = parts.projection.state_dict()
    parts.projection.load_state_dict(state | {name: value.float() for name, value in weights.items()})
    return t5_clip.clone_with_projection(clip, parts.projection, parts.target_std)
