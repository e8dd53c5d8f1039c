"""Text encoders as files of the stock layout, one for each: what ComfyUI's own loaders and transformers read.

Safetensors, whole, fp32 if nothing else is asked for. CLIP: `text_model.*` as transformers' CLIPTextModel names it, for
SDXL's second one `text_projection.weight` too; so are the names in `text_encoder/model.safetensors` of a diffusers
folder and in https://huggingface.co/comfyanonymous/flux_text_encoders. T5: `shared.weight` and `encoder.*`. The
metadata entry `retune.run` says what run they come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import read_tensors, write_tensors

METADATA = "retune.run"
CLIPS = ("clip_l", "clip_g", "clip_h")
"""ComfyUI's names of the CLIPs of SD1.x and SDXL, SDXL's second, and SD2."""
_NAMES = re.compile(r"(?:text_encoders\.)?(clip_[lgh]|t5base|t5xxl)\.transformer\.(.+)")
_PROJECTION = "text_projection.weight"


def split_by_encoder(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Encoder ("clip_l", ...) -> its tensors under their stock names, in fp32, from ComfyUI's names of them.

    weights: `clip_l.transformer.text_model...` and the like, `text_encoders.` before them or not; others are left out,
    and so is a text projection, but for that of SDXL's second CLIP: no UNet reads another's.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        match = _NAMES.fullmatch(name)
        if match and (match[2] != _PROJECTION or match[1] == "clip_g"):
            parts.setdefault(match[1], {})[match[2]] = value.detach().to("cpu", torch.float32)
    return parts


def write_stock_files(
    paths: Mapping[str, Path],
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes each encoder of `paths` from `weights` (see `split_by_encoder`), whole or not at all; about: see
    `about_run`.

    Raises ValueError for an encoder that the weights do not hold.
    """
    parts = split_by_encoder(weights)
    for part, path in paths.items():
        if part not in parts:
            raise ValueError(f"the text encoder has no {part}; expected one of {', '.join(parts) or 'none'}.")
        tensors = {name: value.to(dtype) for name, value in parts[part].items()}
        write_tensors(path, tensors, {"format": "pt", METADATA: json.dumps(about)})


def read_stock_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A CLIP's tensors under `text_model.` names, and what `about_run` said of it, empty for a file without that.

    Errors: ValueError for a file without a CLIP text encoder, and those of `read_tensors`.
    """
    tensors, metadata = read_tensors(path)
    found = {name: value for name, value in tensors.items() if name.startswith("text_model.")}
    if "text_model.embeddings.token_embedding.weight" not in found:
        raise ValueError(f"{Path(path).name} holds no CLIP text encoder; expected tensors text_model.*")
    return found, json.loads(metadata.get(METADATA, "{}"))


def encoder_names(names: Iterable[str]) -> list[str]:
    """The encoders that weights of these names belong to, in their order, CLIPs and T5s alike."""
    return list(dict.fromkeys(match[1] for name in names if (match := _NAMES.fullmatch(name))))
