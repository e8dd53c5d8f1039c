"""Embeddings that A1111 puts into pictures: JSON in the text chunk `sd-ti-embedding`, and the same in the pixels.

In the pixels, zlib-packed JSON stands left and right of the picture, each between it and the edge and parted from it by
a black column: low halves of the bytes on the left, high halves on the right, in the low four bits of every channel,
each xor the low four bits of a fixed random sequence (AUTOMATIC1111/stable-diffusion-webui,
modules/textual_inversion/image_embedding.py).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHUNK = "sd-ti-embedding"
TENSOR = "TORCHTENSOR"
MOST_BYTES = 64 * 2**20
"""Longest JSON that is unpacked; 256 vectors of 4096 numbers need half of it."""


def read_embedding_image(path: str | Path) -> tuple[str, dict]:
    """("text chunk" or "pixels", A1111's dictionary) of a PNG or lossless WebP.

    Errors: ValueError for a picture without an embedding, or a damaged one; FileNotFoundError where there is none.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with Image.open(path) as image:
            chunk = getattr(image, "text", {}).get(CHUNK)
            pixels = None if chunk else np.array(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or no picture ({error}). Download it again.") from error
    if chunk:
        return "text chunk", _parsed(path.name, lambda: base64.b64decode(chunk, validate=True))
    blocks = _blocks(pixels)
    if blocks is None:
        raise ValueError(
            f"{path.name} is a picture without an embedding; expected one that A1111 saved. It is lost when a picture "
            "is resized or saved as JPEG."
        )
    return "pixels", _parsed(path.name, lambda: _unpacked(*blocks))


def _parsed(name: str, data: Callable[[], bytes]) -> dict:
    try:
        return json.loads(data(), object_hook=_tensor)
    except (zlib.error, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: the embedding in the picture is damaged ({error}). Download it again.") from error


def _tensor(entry: dict) -> Any:
    return torch.tensor(entry[TENSOR], dtype=torch.float32) if TENSOR in entry else entry


def _blocks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The coloured strips (H, W, 3) left of the first and right of the last black column; None without two alike."""
    bright = pixels.any(axis=2)
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if not len(rows):
        return None
    low = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~low.any(axis=(0, 2)))
    if len(black) < 2 or low.shape[1] - 1 - black[-1] != black[0]:
        return None
    return low[:, : black[0]], low[:, black[-1] + 1 :]


def _unpacked(low: np.ndarray, high: np.ndarray) -> bytes:
    noise = _sequence(low.size).reshape(low.shape) & 0x0F
    packed = ((high ^ noise) << 4 | (low ^ noise)).astype(np.uint8).tobytes()
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(packed, MOST_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it does not end within {MOST_BYTES // 2**20} MB")
    return data


def _sequence(count: int) -> np.ndarray:
    """(count,) numbers x mod 255 of x -> 1664525 x + 1013904223 mod 2^32, begun at 0.

    n steps at once are x -> a x + c with c the n-th number, and 2 n steps have a^2: so the known part is doubled.
    """
    found = np.array([1013904223], dtype=np.uint32)
    factor = np.array([1664525], dtype=np.uint32)
    while len(found) < count:
        found = np.concatenate([found, found * factor + found[-1]])
        factor = factor * factor
    return (found[:count] % 255).astype(np.uint8)
