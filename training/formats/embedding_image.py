"""Embeddings in pictures, as A1111 saves them: JSON in the text chunk `sd-ti-embedding`, or in the pixels.

In the pixels, zlib-compressed JSON fills a strip along the left and the right edge, each separated from the picture by
a black column. The left strip has the low half of every byte, the right one the high half, in the low four bits of
each channel, xor-ed with the low four bits of a fixed pseudo-random sequence
(AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion/image_embedding.py).
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

from ..common.foreign import existing_file, reading

CHUNK = "sd-ti-embedding"
"""Name of the PNG text chunk."""
TENSOR = "TORCHTENSOR"
"""Key of a tensor, as nested lists, in A1111's JSON."""
MAX_PIXELS = 1 << 24
"""Limit of a picture's size; A1111's have less than a million."""
MAX_JSON_BYTES = 64 * 2**20
"""Limit of the decompressed JSON; 256 vectors of 4096 numbers need half of it."""


def read_embedding_image(path: str | Path) -> tuple[str, dict]:
    """Reads the embedding in a PNG or a lossless WebP.

    Returns:
        Where it is stored ("text chunk" or "pixels"), and A1111's dictionary.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The picture has no embedding or is damaged.
    """
    from PIL import Image

    path = existing_file(path)
    with reading(path, "no picture", "Download it again."), Image.open(path, formats=("PNG", "WEBP")) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{path.name} is {width}x{height}; expected a picture of at most {MAX_PIXELS} pixels.")
        chunk = getattr(image, "text", {}).get(CHUNK)
        pixels = None if chunk else np.array(image.convert("RGB"))
    if chunk:
        return "text chunk", _parse_json(path.name, lambda: base64.b64decode(chunk, validate=True))
    strips = _find_strips(pixels)
    if strips is None:
        raise ValueError(
            f"{path.name} is a picture without an embedding; expected one that A1111 saved. It is lost when a picture "
            "is resized or saved as JPEG."
        )
    return "pixels", _parse_json(path.name, lambda: _decompress(*strips))


def _parse_json(name: str, data: Callable[[], bytes]) -> dict:
    """The dictionary in the JSON that `data()` returns; ValueError if decoding fails."""
    try:
        return json.loads(data(), object_hook=_decode_tensor)
    except (zlib.error, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: the embedding in the picture is damaged ({error}). Download it again.") from error


def _decode_tensor(entry: dict) -> Any:
    """Turns {"TORCHTENSOR": nested lists} into a tensor; other dictionaries stay."""
    return torch.tensor(entry[TENSOR], dtype=torch.float32) if TENSOR in entry else entry


def _find_strips(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The strips left of the first and right of the last black column, (H, W, 3) each; None unless equally wide."""
    bright = pixels.any(axis=2)
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if not len(rows):
        return None
    low = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~low.any(axis=(0, 2)))
    if len(black) < 2 or low.shape[1] - 1 - black[-1] != black[0]:
        return None
    return low[:, : black[0]], low[:, black[-1] + 1 :]


def _decompress(low: np.ndarray, high: np.ndarray) -> bytes:
    """The zlib-compressed data in the left (low half bytes) and right (high half bytes) strip."""
    noise = _sequence(low.size).reshape(low.shape) & 0x0F
    packed = ((high ^ noise) << 4 | (low ^ noise)).astype(np.uint8).tobytes()
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(packed, MAX_JSON_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it does not end within {MAX_JSON_BYTES // 2**20} MB")
    return data


def _sequence(count: int) -> np.ndarray:
    """The first `count` numbers x mod 255 of the generator x -> 1664525 x + 1013904223 mod 2^32, started at 0.

    n steps at once are x -> a x + c, where c is the n-th number; 2 n steps have the factor a^2. So each pass of the
    loop doubles the computed part.
    """
    numbers = np.array([1013904223], dtype=np.uint32)
    factor = np.array([1664525], dtype=np.uint32)
    while len(numbers) < count:
        numbers = np.concatenate([numbers, numbers * factor + numbers[-1]])
        factor = factor * factor
    return (numbers[:count] % 255).astype(np.uint8)
