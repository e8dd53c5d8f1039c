"""Caches latents, masks and text embeddings on disk, keyed by content and encoder.

Each value is encoded on its own (never as part of a batch) and read back from disk even the first time, so that a run
with a full cache uses the same bits as the run that filled it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..common.files import write_bytes
from ..common.foreign import FileError, read_bytes, reading
from ..common.text import plain_text
from ..models.protocols import Conditioning
from .examples import Dataset, Example
from .folder import Progress

log = logging.getLogger(__name__)

PREFIX = "before."
"""Prefix of the names under which a conditioning's own prefix is stored."""
Tensors = dict[str, Tensor]

MEMORY = 512 << 20
"""Default size of the part in memory, in bytes."""
SPARE_DISK = 64 << 20
"""Disk space to leave free, in bytes."""
LARGEST_ENTRY = 4 << 30
"""Bytes of an entry's file that is read."""
VERSION = 1
"""Increase it whenever the same image or caption would be prepared differently."""
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class Entry(NamedTuple):
    """A value of the cache: its `key`, its `size` relative to other entries, its `name` for messages, and `encode`."""

    key: str
    size: float
    name: str
    encode: Callable[[], Tensors]


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
        self._store = _Store(Path(folder), memory)

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
        latents = [self._latent_entry(example, flip) for example in dataset.examples for flip in flips]
        masks = [self._mask_entry(example, flip) for example in dataset.examples if example.mask for flip in flips]
        filled = self._store.fill(latents, "latents", on_progress)
        return filled + self._store.fill(masks, "masks", on_progress)

    def _latent_entry(self, example: Example, flip: bool) -> Entry:
        key = _key("latent", VERSION, self._fingerprint, example.key, example.width, example.height, "center", flip)
        size = example.width * example.height
        return Entry(key, size, example.name, lambda: self._encode_latent(example, flip, "center", None))

    def _encode_latent(self, example: Example, flip: bool, crop: str, generator: torch.Generator | None) -> Tensors:
        image = example.load(flip=flip, crop=crop, generator=generator)
        with torch.no_grad():
            return _to_stored({"latent": self._encode(image[None])}, f"the latent of {example.name}")

    def _mask_entry(self, example: Example, flip: bool) -> Entry:
        size, mask = (example.width, example.height), example.mask
        key = _key("mask", VERSION, mask.key, mask.alpha, *size, self._downscale, "center", flip)
        name = f"mask of {example.name}"
        return Entry(key, size[0] * size[1], name, lambda: self._downscale_mask(example, flip, "center", None))

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
        self._store = _Store(Path(folder), memory)

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
        """Encodes missing captions, one at a time; returns their number."""
        return self._store.fill([self._entry(caption) for caption in captions], "captions", on_progress)

    def _entry(self, caption: str) -> Entry:
        key = _key("text", VERSION, self._fingerprint, plain_text(caption))
        return Entry(key, 1.0, caption, lambda: self._encode_caption(caption))

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


class _Store:
    """Stores dictionaries of tensors in `folder/ab/abcd....safetensors`, and the most recently used ones in memory."""

    def __init__(self, folder: Path, memory: int):
        self.folder = folder
        self._memory = memory
        self._recent: OrderedDict[str, Tensors] = OrderedDict()
        self._recent_bytes = 0

    def get(self, entry: Entry, write: bool = True) -> Tensors:
        """The entry's tensors, encoded first if they are neither in memory nor on disk; written to disk if `write`."""
        if entry.key in self._recent:
            self._recent.move_to_end(entry.key)
            return self._recent[entry.key]
        tensors = self._read(entry.key)
        if tensors is None and not write:
            tensors = entry.encode()
        elif tensors is None:
            data = _pack(entry.encode())
            self._write(entry.key, data, len(data))
            tensors = self._read(entry.key)
            assert tensors is not None, "a cache entry cannot be read right after it was written"
        self._remember(entry.key, tensors)
        return tensors

    def fill(self, entries: Iterable[Entry], kind: str, on_progress: Progress | None) -> int:
        """Encodes and writes missing entries; `kind` is for messages.

        The size of the first written entry gives the estimate of the disk space for the rest.
        """
        entries = {entry.key: entry for entry in entries}
        missing = [entry for key, entry in entries.items() if self._read(key) is None]
        if on_progress and entries:
            on_progress(len(entries) - len(missing), len(entries), f"caching {kind}")
        remaining, bytes_per_size = sum(entry.size for entry in missing), 0.0
        for done, entry in enumerate(missing, start=1 + len(entries) - len(missing)):
            data = _pack(entry.encode())
            if not bytes_per_size:
                bytes_per_size = len(data) / entry.size
                self._check_space(bytes_per_size * remaining)
            self._write(entry.key, data, bytes_per_size * remaining)
            remaining -= entry.size
            if on_progress:
                on_progress(done, len(entries), f"caching {kind}: {entry.name}")
        return len(missing)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """The tensors of an entry on disk; None if it is missing or damaged."""
        path = self._path(key)
        try:
            data = read_bytes(path, LARGEST_ENTRY)
            with reading(path):
                return _unpack(data)
        except FileNotFoundError:
            return None
        except FileError as error:
            log.warning("a damaged entry of the cache is encoded again: %s", error)
            return None

    def _write(self, key: str, data: bytes, needed: float) -> None:
        """Writes an entry; `needed` is the disk space in bytes for it and the rest, for the message of a full disk."""
        try:
            write_bytes(self._path(key), data)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise self._disk_full(needed) from error
            raise

    def _check_space(self, needed: float) -> None:
        """Raises OSError (ENOSPC) unless `needed` bytes fit on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < needed + SPARE_DISK:
            raise self._disk_full(needed)

    def _disk_full(self, needed: float) -> OSError:
        free = shutil.disk_usage(self.folder).free / 2**20
        return OSError(
            errno.ENOSPC,
            f"the disk has {free:.0f} MiB free; expected about {(needed + SPARE_DISK) / 2**20:.0f} MiB for the rest of "
            "the cache. Free space or choose another folder; what is cached so far is kept",
            str(self.folder),
        )

    def _remember(self, key: str, tensors: Tensors) -> None:
        """Puts an entry into memory, and drops the least recently used ones beyond the limit."""
        self._recent[key] = tensors
        self._recent_bytes += _nbytes(tensors)
        while self._recent_bytes > self._memory and len(self._recent) > 1:
            self._recent_bytes -= _nbytes(self._recent.popitem(last=False)[1])


def _key(*parts: str | int | bool) -> str:
    """The SHA-256 of everything that determines an entry's value."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _to_stored(tensors: Tensors, what: str) -> Tensors:
    """Copies tensors to the CPU as float32 (masks as bool). Raises ValueError if `what` is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{what} is not finite; expected finite values. Run the encoder in fp32 or bf16.")
    with torch.inference_mode(False):
        return {
            name: tensor.to("cpu", torch.bool if tensor.dtype == torch.bool else torch.float32).contiguous().clone()
            for name, tensor in tensors.items()
        }


def _pack(tensors: Tensors) -> bytes:
    """The content of an entry's file, with a checksum in its metadata."""
    return save(tensors, metadata={"sha256": _digest(tensors)})


def _unpack(data: bytes) -> Tensors:
    """The tensors in an entry's file; ValueError if the checksum does not match.

    The file is read into memory, not mapped: a mapped file cannot be replaced on Windows.
    """
    with torch.inference_mode(False):
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header["__metadata__"]["sha256"] != _digest(tensors):
        raise ValueError("its checksum does not match")
    return tensors


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
