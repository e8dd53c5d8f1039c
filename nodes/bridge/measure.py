"""Measuring and fitting text encoders as ComfyUI's CLIP objects: std, scale, closed-form projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...training.models.protocols import Conditioning
from ...training.text_encoder.fit import FitReport, fit_projection
from ...training.text_encoder.scale import PROMPTS, ScaleReport, TokenStatistics, scale_to, token_statistics
from ..clips.t5_clip import clone_with_projection, encode_states, expect_t5, is_t5_clip, own_context, t5_parts
from ..clips.t5_tokens import is_token
from ..common.inputs import expect_given


class MeasurableClip:
    """Any CLIP as far as measuring its outputs goes: one prompt at a time, parentheses taken as text."""

    def __init__(self, clip):
        expect_given(clip=clip)
        self.clip = clip

    def tokenize(self, texts: list[str]) -> dict:
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        (text,) = texts
        return self.clip.tokenize(text, disable_weights=True)

    def encode(self, tokens: dict) -> Conditioning:
        """Of a T5 beside a kept CLIP the T5's own tokens, which alone a scale changes."""
        context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return Conditioning(own_context(self.clip, context, tokens) if is_t5_clip(self.clip) else context, pooled)

    def real_tokens(self, tokens: dict) -> Tensor:
        """(1, L) bool over what `encode` returns: see `prompt_tokens`; all tokens of a resampler."""
        resampled = t5_parts(self.clip).projection.tokens if is_t5_clip(self.clip) else None
        return torch.ones(1, resampled, dtype=torch.bool) if resampled else self.prompt_tokens(tokens)

    def prompt_tokens(self, tokens: dict) -> Tensor:
        """(1, L) bool: without start tokens and what follows a section's first end token."""
        key, sections = next(iter(tokens.items()))
        owner = self.clip.tokenizer
        segments = getattr(owner, key, None) or getattr(owner, f"clip_{key}")
        return torch.tensor([[real for section in sections for real in _real(section, segments)]])

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(L, D) output of one prompt and (L,) which of it are words and end token: `training.text_encoder.fit`."""
        tokens = self.tokenize([prompt])
        with torch.inference_mode(False):
            return self.encode(tokens).context[0].clone(), self.real_tokens(tokens)[0]

    def pooled(self, prompt: str) -> Tensor | None:
        """(P,) pooled output of one prompt, or None."""
        with torch.inference_mode(False):
            pooled = self.encode(self.tokenize([prompt])).pooled
            return None if pooled is None else pooled[0].clone()

    def scaled(self, factor: float) -> MeasurableClip:
        return MeasurableClip(clone_with_projection(self.clip, t5_parts(self.clip).projection.scaled(factor)))


def scale_clip(clip, target_std: float, prompts: Sequence[str] = PROMPTS) -> tuple[Any, ScaleReport]:
    """A clone of a T5 CLIP with std `target_std` over `prompts`, and the measurements before and after."""
    expect_t5(clip)
    scaled, report = scale_to(MeasurableClip(clip), target_std, prompts)
    return clone_with_projection(clip, t5_parts(scaled.clip).projection, report.target), report


def scaled_or_measured(
    clip, mode: str, target_std: float, reference, prompts: Sequence[str]
) -> tuple[Any, dict[str, TokenStatistics], str]:
    """A scaled clone, or with mode "off" the CLIP itself; statistics by name ("before" and "after", or "measured", and
    "reference" when one is given); a report. ValueError for mode "match reference" without one, and for a CLIP to scale
    that is no T5."""
    if mode != "off":
        expect_t5(clip)
    if mode == "match reference" and reference is None:
        raise ValueError("reference is not connected; expected the original CLIP for 'match reference'.")
    beside = {} if reference is None else {"reference": clip_statistics(reference, prompts)}
    if mode == "off":
        figures = {"measured": clip_statistics(clip, prompts)} | beside
        text = f"std of real tokens: {figures['measured'].std:.4f} over {len(prompts)} prompts (unchanged)"
    else:
        target = beside["reference"].std if mode == "match reference" else target_std
        clip, report = scale_clip(clip, target, prompts)
        figures, text = {"before": report.before, "after": report.after} | beside, report.text()
    return clip, figures, "\n".join([text, *(f"{name}: {one.text()}" for name, one in figures.items())])


class UnprojectedClip(MeasurableClip):
    """A T5 CLIP as far as fitting its projection goes: its states before the projection."""

    def encode(self, tokens: dict) -> Conditioning:
        return encode_states(self.clip, tokens)

    def real_tokens(self, tokens: dict) -> Tensor:
        return self.prompt_tokens(tokens)


def fit_clip(clip, reference, prompts: Sequence[str], method: str = "ridge") -> tuple[Any, FitReport]:
    """A clone of a T5 CLIP whose projection is fitted to another CLIP's output, and how near it gets."""
    expect_t5(clip)
    pooled_width = t5_parts(clip).projection.pooled_width
    own, target = UnprojectedClip(clip), MeasurableClip(reference)
    projection, report = fit_projection(own, target, prompts, pooled_width=pooled_width, method=method)
    return clone_with_projection(clip, projection), report


def is_fitted(clip) -> bool:
    """Whether a CLIP is a T5 whose projection was fitted: no other has a bias."""
    return is_t5_clip(clip) and t5_parts(clip).projection.linear.bias is not None


def clip_statistics(clip, prompts: Sequence[str] = PROMPTS) -> TokenStatistics:
    """How loud the real tokens of any CLIP with one token sequence (SD1.5, SD2, SDXL, T5) are."""
    return token_statistics(MeasurableClip(clip), prompts)


def clip_std(clip, prompts: Sequence[str] = PROMPTS) -> float:
    """std over all elements of real tokens; the CLIP as for `clip_statistics`."""
    return clip_statistics(clip, prompts).std


def _real(section: list, segments) -> list[bool]:
    ids = [entry[0] for entry in section]
    end = next((i for i, entry in enumerate(ids) if is_token(entry, segments.end_token)), len(ids) - 1)
    return [segments.tokens_start <= i <= end for i in range(len(ids))]
