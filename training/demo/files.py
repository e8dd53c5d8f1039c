"""Paths of the demo model's weights and tokenizers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.foreign import open_tensors

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("demo.safetensors", "t5.safetensors", "scorer.safetensors", "aesthetic.safetensors")
NAMES += ("clip_tokenizer", "t5_tokenizer")
LORAS = ("warm edges", "crescents")
NAMES += tuple(f"loras/{name}.safetensors" for name in LORAS)
EMBEDDINGS = ("heart",)
NAMES += tuple(f"embeddings/{name}.safetensors" for name in EMBEDDINGS)
UNET_PREFIX = "model.diffusion_model."
"""As in models/ldm.py, which this folder stands beside."""
TEXT_ENCODERS = ("glossy",)
NAMES += tuple(f"text_encoders/{name}.safetensors" for name in TEXT_ENCODERS)


def weights_path(name: str) -> Path:
    """The path of one of `NAMES`; ValueError for another name, FileNotFoundError for a missing file."""
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(NAMES)}.")
    path = WEIGHTS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. Reinstall the package, or in a checkout build the demo model (four hours on two "
            "CPU cores): python -m retune.tools.build_demo"
        )
    return path


def demo_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What shapes do not tell of the demo model, for a file with its UNet; empty for other models.

    ComfyUI's save nodes leave the description out that the demo model's own file has in its metadata.

    shapes: of a file's tensors, by name.
    """
    if not (WEIGHTS / NAMES[0]).is_file():
        return {}
    own, config = _demo_file()
    unet = {name: shape for name, shape in shapes.items() if name in own}
    return json.loads(config) if unet == own else {}


@functools.cache
def _demo_file() -> tuple[dict[str, tuple[int, ...]], str]:
    """The shapes of the demo model's UNet, and its `retune.config`."""
    with open_tensors(weights_path(NAMES[0])) as file:
        unet = {name: shape for name, shape in file.shapes.items() if name.startswith(UNET_PREFIX)}
        return unet, file.metadata["retune.config"]
