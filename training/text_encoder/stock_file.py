"""Text encoders in the stock layout, one file each, as ComfyUI's own loaders and transformers read them.

The files are safetensors with all weights, fp32 by default. CLIP: `text_model.*` as in transformers' CLIPTextModel, for
SDXL's second one also `text_projection.weight`. `text_encoder/model.safetensors` of a diffusers folder and
https://huggingface.co/comfyanonymous/flux_text_encoders have the same names. T5: `shared.weight` and `encoder.*`. The
metadata entry `retune.run` describes the run that trained them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import write_tensors
from ..common.foreign import metadata_json, read_tensors, reading

METADATA = "retune.run"
"""Metadata entry with facts about the run, as JSON."""
CLIPS = ("clip_l", "clip_g", "clip_h")
"""ComfyUI's names of the CLIPs: SD1.x's and SDXL's first, SDXL's second, SD2.x's."""
_NAMES = re.compile(r"(?:text_encoders\.)?(clip_[lgh]|t5base|t5xxl)\.transformer\.(.+)")
_PROJECTION = "text_projection.weight"


def split_by_encoder(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups weights by text encoder and converts their names to the stock ones.

    Args:
        weights: ComfyUI's name -> tensor, such as `clip_l.transformer.text_model...`, with or without the prefix
            `text_encoders.`. Other names are left out, and so are text projections except for SDXL's second CLIP: no
            UNet reads the others.

    Returns:
        Encoder ("clip_l", ...) -> {stock name: fp32 tensor}.
    """
    encoders: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        match = _NAMES.fullmatch(name)
        if match and (match[2] != _PROJECTION or match[1] == "clip_g"):
            encoders.setdefault(match[1], {})[match[2]] = value.detach().to("cpu", torch.float32)
    return encoders


def write_stock_files(
    paths: Mapping[str, Path],
    weights: Mapping[str, Tensor],
    run: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes text encoders as files of the stock layout, each atomically.

    Args:
        paths: Encoder ("clip_l", ...) -> file.
        weights: The weights of all encoders, see `split_by_encoder`.
        run: Facts about the run that trained them, see `about_run`.
        dtype: Dtype of the stored tensors.

    Raises:
        ValueError: The weights lack an encoder.
    """
    encoders = split_by_encoder(weights)
    for encoder, path in paths.items():
        if encoder not in encoders:
            raise ValueError(f"the text encoder has no {encoder}; expected one of {', '.join(encoders) or 'none'}.")
        tensors = {name: value.to(dtype) for name, value in encoders[encoder].items()}
        write_tensors(path, tensors, {"format": "pt", METADATA: json.dumps(run)})


def read_stock_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a CLIP from a file of the stock layout.

    Returns:
        Its tensors `text_model.*`, and the facts about its run (see `about_run`), {} if the file has none.

    Raises:
        ValueError: The file has no CLIP text encoder. Also the errors of `read_tensors`.
    """
    tensors, metadata = read_tensors(path)
    clip = {name: value for name, value in tensors.items() if name.startswith("text_model.")}
    if "text_model.embeddings.token_embedding.weight" not in clip:
        raise ValueError(f"{Path(path).name} holds no CLIP text encoder; expected tensors text_model.*")
    with reading(path):
        return clip, metadata_json(metadata, METADATA, default={})


def encoder_names(names: Iterable[str]) -> list[str]:
    """The text encoders (CLIPs and T5s) that weights of these names belong to, in order of first appearance."""
    return list(dict.fromkeys(match[1] for name in names if (match := _NAMES.fullmatch(name))))
