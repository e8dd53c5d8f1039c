"""Measures CLIPs (std of their output), scales T5 CLIPs, fits their projections or has them learn another CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
from torch import Tensor

from ...training.models.protocols import Conditioning
from ...training.text_encoder.distil import fit_or_distil
from ...training.text_encoder.fit import FitReport
from ...training.text_encoder.scale import PROMPTS, ScaleReport, TokenStatistics, scale_to, token_statistics
from ..clips.t5_clip import clone_with_projection, encode_states, expect_t5, is_t5_clip, t5_context, t5_parts
from ..clips.t5_tokens import end_index
from ..common.inputs import expect_given


class MeasurableClip:
    """Any CLIP with the methods that `training.text_encoder.scale` and `fit` measure with.

    One prompt is encoded at a time; brackets in it are not prompt weights.
    """

    def __init__(self, clip):
        expect_given(clip=clip)
        self.clip = clip

    def tokenize(self, texts: list[str]) -> dict:
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        (text,) = texts
        return self.clip.tokenize(text, disable_weights=True)

    def encode(self, tokens: dict) -> Conditioning:
        """The CLIP's output; without a kept CLIP's tokens, which a scale does not change."""
        context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return Conditioning(t5_context(self.clip, context, tokens) if is_t5_clip(self.clip) else context, pooled)

    def real_tokens(self, tokens: dict) -> Tensor:
        """(1, L) bool over the context of `encode`: as `prompt_tokens`, but all tokens of a resampler."""
        resampled = t5_parts(self.clip).projection.tokens if is_t5_clip(self.clip) else None
        return torch.ones(1, resampled, dtype=torch.bool) if resampled else self.prompt_tokens(tokens)

    def prompt_tokens(self, tokens: dict) -> Tensor:
        """(1, L) bool: False for start tokens and for what follows the first end token of each window."""
        name, windows = next(iter(tokens.items()))
        tokenizer = getattr(self.clip.tokenizer, name, None) or getattr(self.clip.tokenizer, f"clip_{name}")
        return torch.tensor([[real for window in windows for real in _real(window, tokenizer)]])

    def states(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(L, D) output of one prompt and (L,) bool as `real_tokens`, for `training.text_encoder.fit`."""
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
    """A clone of a T5 CLIP whose output has std `target_std` over `prompts`, and the statistics before and after."""
    expect_t5(clip)
    scaled, report = scale_to(MeasurableClip(clip), target_std, prompts)
    return clone_with_projection(clip, t5_parts(scaled.clip).projection, report.target), report


def scaled_or_measured(
    clip, mode: str, target_std: float, reference, prompts: Sequence[str]
) -> tuple[Any, dict[str, TokenStatistics], str]:
    """Scales a T5 CLIP to a target std, or only measures any CLIP.

    Args:
        clip: a T5 CLIP, or with mode "off" any CLIP.
        mode: "match reference", "off", or any other word for `target_std`.
        target_std: std over all elements of real tokens.
        reference: the CLIP whose std "match reference" aims at; measured in any mode.
        prompts: what the std is measured on.

    Returns:
        The scaled clone, or with mode "off" the CLIP itself; statistics by name ("before" and "after", or "measured";
        "reference" when one is given); a report.

    Raises:
        ValueError: for "match reference" without a reference, and for a CLIP to scale that is not a T5 CLIP.
    """
    if mode != "off":
        expect_t5(clip)
    if mode == "match reference" and reference is None:
        raise ValueError("reference is not connected; expected the original CLIP for 'match reference'.")
    statistics = {} if reference is None else {"reference": clip_statistics(reference, prompts)}
    if mode == "off":
        figures = {"measured": clip_statistics(clip, prompts)} | statistics
        text = f"std of real tokens: {figures['measured'].std:.4f} over {len(prompts)} prompts (unchanged)"
    else:
        target = statistics["reference"].std if mode == "match reference" else target_std
        clip, report = scale_clip(clip, target, prompts)
        figures, text = {"before": report.before, "after": report.after} | statistics, report.text()
    return clip, figures, "\n".join([text, *(f"{name}: {figure.text()}" for name, figure in figures.items())])


class UnprojectedClip(MeasurableClip):
    """A T5 CLIP whose measured output is the states before its projection, to which a projection is fitted."""

    def encode(self, tokens: dict) -> Conditioning:
        return encode_states(self.clip, tokens)

    def real_tokens(self, tokens: dict) -> Tensor:
        return self.prompt_tokens(tokens)


def fit_clip(clip, reference, prompts: Sequence[str], method: str = "ridge") -> tuple[Any, FitReport]:
    """Fits a T5 CLIP's projection to another CLIP's output, in closed form or by distillation on ComfyUI's device.

    Args:
        clip: a T5 CLIP.
        reference: the CLIP to imitate, such as the model's own.
        prompts: what both encode.
        method: as for `fit_or_distil`.

    Returns:
        A clone with the new projection, and a report of the error that is left.
    """
    expect_t5(clip)
    pooled_width = t5_parts(clip).projection.pooled_width
    states, target = UnprojectedClip(clip), MeasurableClip(reference)
    how = {"method": method, "pooled_width": pooled_width, "device": management.get_torch_device()}
    projection, report = fit_or_distil(states, target, prompts, **how, on_step=_progress())
    return clone_with_projection(clip, projection), report


def _progress() -> Callable[[int, int], None]:
    """Shows steps on the node that runs, and stops where the user cancels."""
    bar = comfy.utils.ProgressBar(1)

    def on_step(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_step


def is_fitted(clip) -> bool:
    """Whether a CLIP is a T5 CLIP with a fitted projection: no other projection has a bias."""
    return is_t5_clip(clip) and t5_parts(clip).projection.linear.bias is not None


def clip_statistics(clip, prompts: Sequence[str] = PROMPTS) -> TokenStatistics:
    """Statistics of the real tokens of any CLIP with one token sequence (SD1.5, SD2, SDXL, T5) over `prompts`."""
    return token_statistics(MeasurableClip(clip), prompts)


def clip_std(clip, prompts: Sequence[str] = PROMPTS) -> float:
    """std over all elements of real tokens, for any CLIP that `clip_statistics` measures."""
    return clip_statistics(clip, prompts).std


def _real(window: list, tokenizer) -> list[bool]:
    end = end_index([entry[0] for entry in window], tokenizer.end_token)
    return [tokenizer.tokens_start <= i <= end for i in range(len(window))]
