"""Caches latents, masks and text embeddings on disk, keyed by content and encoder.

Each value has a file of its own, in one of 256 folders by its key, so that a run killed while it fills the cache goes
on where it was. Each is encoded on its own (never as part of a batch) and read back from disk even the first time, so
that a run with a full cache uses the same bits as the run that filled it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..common.text import plain_text
from ..models.protocols import Conditioning
from .examples import Dataset, Example
from .folder import Progress
from .store import MEMORY, Entry, Store, Tensors

PREFIX = "before."
"""Prefix of the names under which a conditioning's own prefix is stored."""
VERSION = 1
"""Increase it whenever the same image or caption would be prepared differently."""


class LatentCache:
    """Caches a data set's latents and masks, in float32.

    Latents are keyed by the image's content, target size and mirroring, and by the encoder; masks by the mask's
    content, the same sizes and `downscale`. Random crops are not cached but encoded whenever they are needed.

    Args:
        folder: Where the cache is.
        encode: (1, 3, H, W) image in 0..1 -> (1, C, h, w) latent.
        encoder_fingerprint: Changes with the encoder's weights.
        memory: Size of the part in memory, in bytes.
        downscale: Pixels per latent cell along each side.
    """

    def __init__(
        self,
        folder: str | Path,
        encode: Callable[[Tensor], Tensor],
        encoder_fingerprint: str,
        memory: int = MEMORY,
        downscale: int = 8,
    ):
        self._encode = encode
        self._fingerprint = encoder_fingerprint
        self._downscale = downscale
        self._store = Store(Path(folder), memory)

    def get(
        self, example: Example, flip: bool = False, *, crop: str = "center", generator: torch.Generator | None = None
    ) -> Tensor:
        """The latent (C, h, w) of an image, encoded first if it is not on disk.

        Args:
            example: The image.
            flip: Mirror it.
            crop: "center" or "random".
            generator: Required for "random".
        """
        if crop == "random":
            return self._encode_latent(example, flip, crop, generator)["latent"][0]
        return self._store.get(self._latent_entry(example, flip))["latent"][0].clone()

    def mask(
        self, example: Example, flip: bool = False, *, crop: str = "center", generator: torch.Generator | None = None
    ) -> Tensor | None:
        """The mask (1, h, w) of an image, averaged over each latent cell; None for an image without a mask.

        Arguments as `get`. A random crop equals the latent's if the generator is in the same state.
        """
        if example.mask is None:
            return None
        if crop == "random":
            return self._downscale_mask(example, flip, crop, generator)["mask"][0]
        return self._store.get(self._mask_entry(example, flip))["mask"][0].clone()

    def fill(self, dataset: Dataset, on_progress: Progress | None = None) -> int:
        """Encodes missing latents, mirrored ones too if the data set mirrors, then missing masks.

        Does nothing for random crops.

        Returns:
            The number of encoded values.

        Raises:
            OSError: (ENOSPC) The disk is too small, estimated from the first value.
        """
        if dataset.crop == "random":
            return 0
        flips = (False, True) if dataset.flip else (False,)
        examples = dataset.examples

        def latents() -> Iterator[Entry]:
            return (self._latent_entry(example, flip) for example in examples for flip in flips)

        def masks() -> Iterator[Entry]:
            return (self._mask_entry(example, flip) for example in examples if example.mask for flip in flips)

        filled = self._store.fill(latents, "latents", on_progress)
        return filled + self._store.fill(masks, "masks", on_progress)

    def _latent_entry(self, example: Example, flip: bool) -> Entry:
        key = _key("latent", VERSION, self._fingerprint, example.key, example.width, example.height, "center", flip)
        size = example.width * example.height
        load = partial(example.load, flip=flip)
        return Entry(key, size, example.name, load, partial(self._encode_image, name=example.name))

    def _encode_latent(self, example: Example, flip: bool, crop: str, generator: torch.Generator | None) -> Tensors:
        return self._encode_image(example.load(flip=flip, crop=crop, generator=generator), example.name)

    def _encode_image(self, image: Tensor, name: str) -> Tensors:
        """The latent of an image (3, H, W) in 0..1."""
        with torch.no_grad():
            return _to_stored({"latent": self._encode(image[None])}, f"the latent of {name}")

    def _mask_entry(self, example: Example, flip: bool) -> Entry:
        size, mask = (example.width, example.height), example.mask
        key = _key("mask", VERSION, mask.key, mask.alpha, *size, self._downscale, "center", flip)
        name = f"mask of {example.name}"
        load = partial(self._downscale_mask, example, flip, "center", None)
        return Entry(key, size[0] * size[1], name, load, lambda mask: mask)

    def _downscale_mask(self, example: Example, flip: bool, crop: str, generator: torch.Generator | None) -> Tensors:
        """A mask (1, 1, h, w) averaged over each latent cell."""
        pixels = example.load_mask(flip=flip, crop=crop, generator=generator)
        cells = example.height // self._downscale, example.width // self._downscale
        mask = torch.nn.functional.interpolate(pixels[None], cells, mode="area")
        return _to_stored({"mask": mask}, f"the mask of {example.name}")


class TextCache:
    """Caches text embeddings, in float32 and without padding that their mask hides (see `trim_padding`).

    Args:
        folder: Where the cache is.
        encode: List of one caption -> Conditioning of batch size 1.
        encoder_fingerprint: Changes with the text encoder.
        memory: Size of the part in memory, in bytes.
    """

    def __init__(
        self,
        folder: str | Path,
        encode: Callable[[list[str]], Conditioning],
        encoder_fingerprint: str,
        memory: int = MEMORY,
    ):
        self._encode = encode
        self._fingerprint = encoder_fingerprint
        self._store = Store(Path(folder), memory)

    def get(self, caption: str) -> Conditioning:
        """The conditioning (batch size 1) of a caption, encoded first if it is not on disk."""
        return self._conditioning(self._store.get(self._entry(caption)))

    def get_in_memory(self, caption: str) -> Conditioning:
        """As `get`, for a caption that may not recur: if it is encoded now, it is cached in memory but not on disk."""
        return self._conditioning(self._store.get(self._entry(caption), write=False))

    @staticmethod
    def _conditioning(stored: Tensors) -> Conditioning:
        tensors = {name: tensor.clone() for name, tensor in stored.items()}
        prefix = _from_tensors(tensors, PREFIX) if f"{PREFIX}context" in tensors else None
        return replace(_from_tensors(tensors), prefix=prefix)

    def fill(self, captions: Iterable[str], on_progress: Progress | None = None) -> int:
        """Encodes missing captions; returns their number.

        One at a time: in a batch the last bits of an embedding depend on the others in it, and which captions are
        missing together depends on where an earlier run was killed.
        """
        captions = captions if isinstance(captions, Sequence) else list(captions)
        return self._store.fill(lambda: map(self._entry, captions), "captions", on_progress)

    def _entry(self, caption: str) -> Entry:
        key = _key("text", VERSION, self._fingerprint, plain_text(caption))
        return Entry(key, 1.0, caption, lambda: caption, self._encode_caption)

    def _encode_caption(self, caption: str) -> Tensors:
        """Encodes a caption; ValueError unless the text encoder returns a batch of one."""
        with torch.no_grad():
            conditioning = trim_padding(self._encode([caption]))
        if len(conditioning) != 1:
            raise ValueError(f"the text encoder returned a batch of {len(conditioning)} for one caption; expected 1.")
        tensors = _to_tensors(conditioning)
        if conditioning.prefix is not None:
            tensors |= _to_tensors(trim_padding(conditioning.prefix), PREFIX)
        return _to_stored(tensors, f"the embedding of {caption!r}")


def trim_padding(conditioning: Conditioning) -> Conditioning:
    """Cuts the tokens after the last attended one; if the mask hides no other token, it becomes None."""
    mask = conditioning.mask
    if mask is None:
        return conditioning
    attended = mask.any(0).nonzero()
    length = int(attended[-1]) + 1 if len(attended) else 1
    mask = mask[:, :length]
    return replace(conditioning, context=conditioning.context[:, :length], mask=None if mask.all() else mask)


def _to_tensors(conditioning: Conditioning, prefix: str = "") -> Tensors:
    """Context, pooled and mask by name (with `prefix`), without the conditioning's own prefix."""
    parts = {name: getattr(conditioning, name) for name in ("context", "pooled", "mask")}
    return {prefix + name: tensor for name, tensor in parts.items() if tensor is not None}


def _from_tensors(tensors: Tensors, prefix: str = "") -> Conditioning:
    return Conditioning(*(tensors.get(prefix + name) for name in ("context", "pooled", "mask")))


def _key(*parts: str | int | bool) -> str:
    """The SHA-256 of everything that determines an entry's value."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _to_stored(tensors: Tensors, what: str) -> Tensors:
    """Copies tensors to the CPU as float32 (masks as bool). Raises ValueError if `what` is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{what} is not finite; expected finite values. Run the encoder in fp32 or bf16.")
    with torch.inference_mode(False):
        return {
            name: tensor.to("cpu", torch.bool if tensor.dtype == torch.bool else torch.float32).contiguous().clone()
            for name, tensor in tensors.items()
        }
