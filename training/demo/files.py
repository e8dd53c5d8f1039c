"""Paths of the demo model's weights and tokenizers."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("demo.safetensors", "t5.safetensors", "scorer.safetensors", "aesthetic.safetensors")
NAMES += ("clip_tokenizer", "t5_tokenizer")
LORAS = ("warm edges", "crescents")
NAMES += tuple(f"loras/{name}.safetensors" for name in LORAS)
EMBEDDINGS = ("heart",)
NAMES += tuple(f"embeddings/{name}.safetensors" for name in EMBEDDINGS)
TEXT_ENCODERS = ("glossy",)
NAMES += tuple(f"text_encoders/{name}.safetensors" for name in TEXT_ENCODERS)


def weights_path(name: str) -> Path:
    """The path of one of `NAMES`; ValueError for another name, FileNotFoundError for a missing file."""
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(NAMES)}.")
    path = WEIGHTS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. Reinstall the package, or in a checkout build the demo model (two hours on two "
            "CPU cores): python -m retune.tools.build_demo"
        )
    return path
