"""A T5 with a projection as ComfyUI's own CLIP object: it encodes, offloads, clones and takes LoRA like any other.

The projection is not a submodule of the managed model but a plain object on it, and a clone's projection is an object
patch. Under dynamic VRAM ComfyUI restores parameters by name after it has applied object patches, which would write the
original's projection into the clone's; and it does not apply key patches to modules that are not its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...training.common.fingerprint import tensors_fingerprint
from ...training.demo.files import WEIGHTS, weights_path
from ...training.models.concepts import with_fingerprints
from ...training.models.protocols import Conditioning
from ...training.text_encoder.projection import Projection, detached_copy
from ...training.text_encoder.t5 import Padding
from ...training.text_encoder.t5_file import T5Weights, read_t5
from ...training.text_encoder.tokenizers import find_tokenizer
from ..common.weights import patched_weight
from .concept_tokens import concepts_of
from .frozen_projection import FrozenProjection
from .kept_clip import KeptClip
from .t5_tokens import T5Source
from .timed_clip import timed

DEMO = "demo"
DTYPES = {"default": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMFYUI_BUCKETS = 32
"""Relative position buckets of ComfyUI's T5."""


@dataclass(frozen=True, kw_only=True)
class T5Parts:
    """What a T5 CLIP consists of."""

    source: T5Source
    projection: Projection
    patched: bool
    """Whether the T5's weights carry patches (a LoRA), which a saved text encoder does not hold."""
    target_std: float | None
    """What the projection's output was scaled to, before any training; None when it was not."""
    keeps_clip: bool
    """Whether the context of another CLIP comes before the T5's."""


def load_t5_clip(
    t5: str | Path,
    projection: Projection,
    *,
    max_tokens: int = 256,
    pad: str = "none",
    dtype: str = "default",
    tokenizer: str | Path | None = None,
    target_std: float | None = None,
    keep_clip=None,
    embedding_directory: Sequence[str] | None = None,
    disable_dynamic: bool = False,
):
    """A comfy.sd.CLIP of a T5 followed by a projection; its pooled output is the projection's, None without one.

    Args:
        t5: file, Hugging Face folder, or "demo".
        projection: from the T5's width to the denoiser's.
        max_tokens, pad: see `Padding`; longer prompts are cut with a warning.
        dtype: how T5's weights are stored, one of `DTYPES`; "default" is ComfyUI's choice, fp32 for the demo. The T5
            computes in fp32 always.
        tokenizer: its path; by default it is searched for (`find_tokenizer`).
        target_std: what the projection was scaled to, for the record of a saved text encoder.
        keep_clip: another CLIP. Its context comes before the T5's, and its pooled output, if any, replaces the T5's.
        embedding_directory: where `embedding:` is searched; by default ComfyUI's folders.
        disable_dynamic: whether ComfyUI's dynamic VRAM is not used for this CLIP.

    Raises:
        ValueError: for an unknown dtype, a projection or keep_clip of another width, or what `read_t5` refuses.
        FileNotFoundError: when the T5 or its tokenizer is missing.
    """
    import comfy.sd
    import folder_paths

    from .t5_model import clip_target

    path = weights_path("t5.safetensors") if str(t5) == DEMO else Path(t5)
    storage, padding = _storage_dtype(dtype, path), Padding(max_tokens=max_tokens, pad=pad)
    kept = None if keep_clip is None else KeptClip.of(keep_clip, projection.width)
    weights = read_t5(path, storage)
    _check_fit(weights.config, projection, path)
    source = _source(path, weights, tokenizer, padding, dtype)
    clip = comfy.sd.CLIP(
        clip_target(source, FrozenProjection(projection, target_std), kept),
        embedding_directory=embedding_directory or folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weight.numel() for weight in weights.state_dict.values()),
        state_dict=[weights.state_dict],
        model_options={"dtype": storage},
        disable_dynamic=disable_dynamic,
    )
    options = {"max_tokens": max_tokens, "pad": pad, "dtype": dtype, "tokenizer": tokenizer, "target_std": target_std}
    options |= {"keep_clip": keep_clip, "embedding_directory": embedding_directory}
    clip.patcher.cached_patcher_init = (_load_t5_patcher, (t5, projection, options))
    return timed(clip) if projection.bands else clip


def _load_t5_patcher(t5, projection: Projection, options: dict, disable_dynamic: bool = False):
    """An independent copy of the ModelPatcher, which ComfyUI asks for (another GPU, a deep copy)."""
    return load_t5_clip(t5, projection, **options, disable_dynamic=disable_dynamic).patcher


def _storage_dtype(dtype: str, path: Path) -> torch.dtype:
    """The dtype in which T5's weights are stored, for a name in `DTYPES`."""
    import comfy.model_management

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    is_demo = WEIGHTS.resolve() in path.resolve().parents
    chosen = torch.float32 if is_demo and dtype == "default" else DTYPES[dtype]
    return chosen or comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())


def _source(path: Path, weights: T5Weights, tokenizer, padding: Padding, dtype: str) -> T5Source:
    """The record of a T5 file, with its tokenizer."""
    import comfy.sd

    comfyui = Path(comfy.sd.__file__).parents[1]
    return T5Source(
        path=path,
        file_hash=weights.file_hash,
        config=weights.config,
        tokenizer=find_tokenizer(path, weights.config, path=tokenizer, comfyui=comfyui),
        padding=padding,
        dtype=dtype,
    )


def _check_fit(config: dict, projection: Projection, path: Path) -> None:
    """Raises ValueError when the projection does not fit a T5, or ComfyUI cannot run that T5."""
    if projection.in_width != config["d_model"]:
        raise ValueError(
            f"the projection reads a width of {projection.in_width}; expected {config['d_model']}, the width of "
            f"{path.name}. Use the T5 that the projection was made for, or a new projection."
        )
    if config["relative_attention_num_buckets"] != COMFYUI_BUCKETS:
        raise ValueError(
            f"{path.name} has {config['relative_attention_num_buckets']} relative position buckets; ComfyUI's T5 "
            f"has {COMFYUI_BUCKETS}. Use another T5."
        )


def is_t5_clip(clip) -> bool:
    """Whether a CLIP comes from `load_t5_clip`, or is a clone of one."""
    return clip is not None and hasattr(clip.cond_stage_model, "retune_source")


def expect_t5(clip) -> None:
    """Raises ValueError for anything but a T5 CLIP."""
    if clip is None:
        raise ValueError("clip is empty; expected a T5 from Load T5 or Load Text Encoder.")
    if not is_t5_clip(clip):
        raise ValueError(
            f"the CLIP is {type(clip.cond_stage_model).__name__}; expected a T5 from Load T5 or Load Text Encoder"
        )


def t5_parts(clip) -> T5Parts:
    """T5 file and projection (a copy that may train) of a T5 CLIP. Raises ValueError for other CLIPs."""
    expect_t5(clip)
    model, frozen = clip.cond_stage_model, _projection(clip)
    return T5Parts(
        source=model.retune_source,
        projection=detached_copy(frozen.projection).requires_grad_(True),
        patched=bool(clip.patcher.patches),
        target_std=frozen.target_std,
        keeps_clip=model.retune_kept is not None,
    )


def _projection(clip) -> FrozenProjection:
    """A clone's projection, which may be another than that of the model it shares."""
    return clip.patcher.get_model_object("projection")


def output_widths(clip) -> tuple[int, int]:
    """Widths of a T5 CLIP's context and pooled output, 0 without one; a kept CLIP's pooled output replaces the T5's."""
    expect_t5(clip)
    projection, kept = _projection(clip).projection, clip.cond_stage_model.retune_kept
    return projection.width, (kept.pooled_width if kept is not None else 0) or projection.pooled_width


def clone_with_projection(clip, projection: Projection, target_std: float | None = None):
    """A clone of a T5 CLIP with another projection; it shares T5's weights and patches, and `clip` is unchanged.

    Args:
        clip: a T5 CLIP.
        projection: copied; from the T5's width to any width.
        target_std: what `projection` was scaled to, for the record of a saved text encoder.
    """
    expect_t5(clip)
    source = clip.cond_stage_model.retune_source
    _check_fit(source.config, projection, source.path)
    clone = clip.clone()
    clone.patcher.add_object_patch("projection", FrozenProjection(projection, target_std))
    return timed(clone) if projection.bands else clone


def set_clip_options(clip) -> None:
    """Sets layer and device on the model of any CLIP, as ComfyUI does before it encodes."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": clip.patcher.load_device})


def encode_states(clip, tokens: dict, *, trains: bool = False) -> Conditioning:
    """T5's token states before the projection, as ordinary tensors.

    Args:
        clip: a T5 CLIP.
        tokens: as `clip.tokenize` returns them.
        trains: whether gradients are recorded; the T5 must then be loaded.

    Returns:
        context: (1, L, d_model). mask: None with pad "max_tokens", where pads are part of the context, else all True.
    """
    expect_t5(clip)
    model = clip.cond_stage_model
    set_clip_options(clip)
    if not trains:
        clip.load_model(tokens)
    with torch.inference_mode(False), nullcontext() if trains else torch.no_grad():
        states = Conditioning.cat([model.backbone(tokens)])  # cat copies, so that nothing is an inference tensor
        real = torch.ones(states.context.shape[:2], dtype=torch.bool, device=states.context.device)
    return replace(states, mask=real if model.retune_source.padding.pad == "none" else None)


def t5_context(clip, context: Tensor, tokens: dict) -> Tensor:
    """The T5's tokens of a T5 CLIP's context (B, L, D), without those of a kept CLIP, which come first."""
    model = clip.cond_stage_model
    if model.retune_kept is None:
        return context
    resampled = _projection(clip).projection.tokens
    return context[:, -(resampled or sum(map(len, tokens[model.retune_source.name]))) :]


def backbone_fingerprint(clip) -> str:
    """Hash of all that `encode_states` of a T5 CLIP depends on, the same after a restart.

    T5 file, dtype, tokenizer, padding, tokenizer options, layer, patched weights, concepts, kept CLIP, and whether the
    projection has a pooled output.
    """
    expect_t5(clip)
    model, patcher = clip.cond_stage_model, clip.patcher
    source, projection = model.retune_source, _projection(clip).projection
    identity = (source.file_hash, source.dtype, source.tokenizer.fingerprint, source.padding, clip.layer_idx)
    weights = ((name, patched_weight(patcher, name)) for name in patcher.model_state_dict() if name in patcher.patches)
    patched = tensors_fingerprint(weights) if patcher.patches else ""
    options = sorted(clip.tokenizer_options.items())
    more = ("pooled",) if projection.pooled_width else ()
    more += () if model.retune_kept is None else (model.retune_kept.fingerprint(),)
    unnamed = hashlib.sha256(repr((*identity, patched, options, *more)).encode()).hexdigest()
    return with_fingerprints(unnamed, concepts_of(clip))
