"""A CLIP as a `TextEncoder`, and a T5 CLIP as the core's own encoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ...training.formats.lora_names import TEXT
from ...training.models.concepts import Concept, Vocabulary
from ...training.models.parameters import ParameterRef, parameter_refs
from ...training.models.protocols import Conditioning
from ...training.text_encoder.t5 import T5TextEncoder, t5_model
from ...training.text_encoder.t5_file import T5Weights
from ...training.trainables.lora import layers_of
from ..clips import t5_clip
from ..clips.concept_tokens import concepts_of, vocabularies_of, with_concepts
from ..clips.fingerprint import clip_fingerprint
from ..common.weights import patched_weight
from .denoiser import ComfyDenoiser
from .layers import training_layers
from .static import static_clip

CLIP_PROMPT_TOKENS = 75
"""Tokens of a prompt in one of a CLIP's windows of 77, which has a start and an end token."""
UNUSED = re.compile(r".*(logit_scale|(?<!clip_g\.transformer\.)text_projection(\.weight)?)")
"""Weights of a CLIP that no UNet reads: logit scales, and text projections but for CLIP-G's (`clip_fingerprint`)."""


class ComfyTextEncoder:
    """Implements `TextEncoder` with a CLIP. Captions are plain text: brackets in them are not prompt weights.

    Tokens are the texts themselves, since ComfyUI tokenizes and encodes one prompt at a time; of CLIPs that train,
    `encode_together` encodes several.

    Args:
        clip: a CLIP. Of a T5 CLIP, `projection` is a copy that may train; other CLIPs have none.
        denoiser: the UNet that must stay loaded together with the CLIP; only `training` requires it.
    """

    def __init__(self, clip, denoiser: ComfyDenoiser | None = None):
        self.clip, self._denoiser, self._trains = clip, denoiser, False
        self.concepts = concepts_of(clip)
        self._is_t5 = t5_clip.is_t5_clip(clip)
        self.projection = t5_clip.t5_parts(clip).projection if self._is_t5 else None
        self.fingerprint = fingerprint_of(clip)
        self.width, self.pooled_width = t5_clip.output_widths(clip) if self._is_t5 else self._measure_widths()

    def _measure_widths(self) -> tuple[int, int]:
        empty = self.encode(self.tokenize([""]))
        return empty.context.shape[-1], 0 if empty.pooled is None else empty.pooled.shape[-1]

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return vocabularies_of(self.clip)

    @property
    def max_prompt_tokens(self) -> int:
        source = self.clip.cond_stage_model.retune_source if self._is_t5 else None
        return source.padding.max_tokens - 1 if source else CLIP_PROMPT_TOKENS

    @property
    def chunks_long_prompts(self) -> bool:
        return not self._is_t5

    def with_concepts(self, concepts: Iterable[Concept]) -> ComfyTextEncoder:
        """A text encoder with further concepts; it shares the projection that may train."""
        other = copy.copy(self)
        other.clip = with_concepts(self.clip, concepts)
        other.concepts = concepts_of(other.clip)
        other.fingerprint = fingerprint_of(other.clip)
        return other

    def tokenize(self, texts: list[str]) -> list[str]:
        return texts

    def backbone(self, tokens: list[str]) -> Conditioning:
        if self._trains and len(tokens) > 1 and not self._is_t5:
            together = encode_together(self.clip, [self._tokens_of(text) for text in tokens])
            if together is not None:
                return together
        with nullcontext() if self._trains else torch.no_grad():
            return Conditioning.cat(self._encode_prompt(text) for text in tokens)

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        if self.projection is None:
            return states
        device = next(self.projection.parameters()).device  # the UNet's; with --lowvram the CLIP is on the CPU
        return self.projection.project(states.to(device), time)

    def encode(self, tokens: list[str]) -> Conditioning:
        return self.project(self.backbone(tokens))

    @property
    def layers(self) -> dict[str, nn.Module]:
        found = layers_of(self._static_clip().cond_stage_model, "text_encoders.{}".format)
        return {path: layer for path, layer in found.items() if not UNUSED.fullmatch(path.removeprefix(TEXT))}

    @property
    def weights(self) -> dict[str, ParameterRef]:
        clip = self._static_clip() if self._trains else self.clip  # nobody changes those of a frozen one
        refs = parameter_refs(clip.cond_stage_model, "text_encoders.")
        return {name: ref for name, ref in refs.items() if not UNUSED.fullmatch(name)}

    @contextmanager
    def training(self) -> Iterator[None]:
        """While entered, the CLIP stays loaded, and `backbone` records gradients.

        ComfyUI adds residuals in place, to tensors that the norms save for backward; so the norms get copies.
        """
        from comfy.text_encoders.t5 import T5LayerNorm

        patcher, modules = self._static_clip().patcher, self.clip.cond_stage_model.modules()
        norms = [module for module in modules if isinstance(module, (nn.LayerNorm, T5LayerNorm))]
        hooks = [norm.register_forward_pre_hook(_copy_input) for norm in norms]
        self._denoiser.keep_loaded.append(patcher)
        self._trains = True
        try:
            self._denoiser.load()
            with training_layers(self.clip.cond_stage_model):
                yield
        finally:
            self._trains = False
            self._denoiser.keep_loaded.remove(patcher)
            for hook in hooks:
                hook.remove()

    def _static_clip(self):
        """The CLIP, replaced by a clone without dynamic VRAM where it has that."""
        self.clip = static_clip(self.clip)
        return self.clip

    def _tokens_of(self, text: str) -> dict:
        return self.clip.tokenize(text, disable_weights=True)

    def _encode_prompt(self, text: str) -> Conditioning:
        tokens = self._tokens_of(text)
        if self._is_t5:
            return t5_clip.encode_states(self.clip, tokens, trains=self._trains)
        if self._trains:
            alone = encode_together(self.clip, [tokens])
            return _encode_loaded(self.clip, tokens) if alone is None else alone
        context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return Conditioning(context.float().clone(), None if pooled is None else pooled.float().clone())


def _copy_input(_module, inputs: tuple) -> tuple:
    return inputs[0].clone(), *inputs[1:]


def _encode_loaded(clip, tokens: dict) -> Conditioning:
    """As `clip.encode_from_tokens`, with gradients; the CLIP must be loaded. ComfyUI brings the result to the CPU."""
    t5_clip.set_clip_options(clip)
    context, pooled = clip.cond_stage_model.encode_token_weights(tokens)[:2]
    return Conditioning(context.float(), None if pooled is None else pooled.float())


def encode_together(clip, prompts: Sequence[dict]) -> Conditioning | None:
    """Prompts without weights in one forward pass of each CLIP, with gradients; the CLIP must be loaded.

    `encode_token_weights` reads a list of windows of 77 tokens, runs them as one batch and returns them as one long
    prompt with the first one's pooled output, on the CPU. This calls the `encode` that it calls, for the windows of all
    prompts, and leaves the result on the device: the host does not wait for it.

    Args:
        clip: a CLIP.
        prompts: as `clip.tokenize` returns them, all weights 1.

    Returns:
        None where they cannot be one batch: prompts of different numbers of windows, and encoders other than CLIP-L,
        CLIP-H, CLIP-G and SDXL's pair. T5s and language models read prompts of different lengths without padding.
    """
    from comfy.sd1_clip import SD1ClipModel, SDClipModel
    from comfy.sdxl_clip import SDXLClipModel

    model = clip.cond_stage_model
    parts = {name: getattr(model, f"clip_{name}", None) for name in sorted(prompts[0], key="lhg".find)}
    known = isinstance(model, (SD1ClipModel, SDXLClipModel)) and set(parts) <= set("lhg")
    if not known or not all(isinstance(p, SDClipModel) and not p.enable_attention_masks for p in parts.values()):
        return None
    if len({tuple(map(len, tokens[name])) for tokens in prompts for name in parts}) > 1:
        return None
    t5_clip.set_clip_options(clip)
    encoded = [_encode_windows(part, [tokens[name] for tokens in prompts]) for name, part in parts.items()]
    return Conditioning(torch.cat([states for states, _ in encoded], dim=-1), encoded[-1][1])


def _encode_windows(part, prompts: Sequence[list]) -> tuple[Tensor, Tensor | None]:
    """(B, L, D) states of one CLIP of prompts of as many windows, and (B, P) of the first window of each."""
    count = len(prompts[0])
    states, pooled = part.encode([[token for token, _ in window] for windows in prompts for window in windows])[:2]
    return states.float().reshape(len(prompts), -1, states.shape[-1]), None if pooled is None else pooled[
        ::count
    ].float()


def fingerprint_of(clip) -> str:
    """Hash of all that a CLIP's encoding depends on, except the projection of a T5 CLIP."""
    return t5_clip.backbone_fingerprint(clip) if t5_clip.is_t5_clip(clip) else clip_fingerprint(clip)


def with_projection(clip, weights: Mapping[str, Tensor]):
    """A clone of a T5 CLIP in whose projection these weights are replaced; any CLIP itself when there are none."""
    if not weights:
        return clip
    parts = t5_clip.t5_parts(clip)
    state = parts.projection.state_dict()
    parts.projection.load_state_dict(state | {name: value.float() for name, value in weights.items()})
    return t5_clip.clone_with_projection(clip, parts.projection, parts.target_std)


def core_text_encoder(clip) -> T5TextEncoder:
    """The core's encoder (transformers, fp32, CPU) with a T5 CLIP's weights, tokenizer, projection and padding.

    Raises ValueError for a T5 CLIP with a kept CLIP, which the core's encoder does not have.
    """
    parts = t5_clip.t5_parts(clip)
    if parts.keeps_clip:
        raise ValueError("the T5 stands beside a kept CLIP; expected a T5 alone. Load it without keep_clip.")
    source = parts.source
    model = t5_model(T5Weights(t5_state(clip), source.config, source.file_hash))
    return T5TextEncoder(model, source.tokenizer, parts.projection, source.padding, source.file_hash)


def t5_state(clip) -> dict[str, Tensor]:
    """A T5 CLIP's T5 weights under `T5EncoderModel` names: fp32 copies, the clone's patches applied."""
    t5_clip.expect_t5(clip)
    prefix = f"{clip.cond_stage_model.retune_source.name}.transformer."
    names = [name for name in clip.patcher.model_state_dict() if name.startswith(prefix)]
    return {name.removeprefix(prefix): patched_weight(clip.patcher, name) for name in names}
