"""Latents and text embeddings on disk, keyed by content and encoder.

Every value is encoded alone (never as part of a batch) and read back from disk even the first time, so a run that finds
a full cache sees the same bits as the run that filled it.
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..common.files import write_bytes
from ..models.protocols import Conditioning
from .examples import Dataset, Example
from .folder import Progress

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
Job = tuple[str, float, str, Callable[[], Tensors]]
"""(key, relative size, what it is, how to make it)."""

MEMORY = 512 << 20
"""Default bytes kept in memory."""
SPARE_DISK = 64 << 20
VERSION = 1
"""Raise it whenever the same image or caption would be prepared differently."""
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class LatentCache:
    """Latents of whole data sets, and their masks. `encode` maps (1, 3, H, W) images in 0..1 to (1, C, h, w) latents.

    The key is the image's content, target size, crop and mirroring, and `encoder_fingerprint`; for masks the mask's
    content and `downscale`, pixels per latent cell. Random crops are never cached: they are encoded on the spot. Values
    are float32.
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
        self,
        example: Example,
        flip: bool = False,
        *,
        crop: str = "center",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The latent (C, h, w) of one image, encoded now if it is not on disk. crop "random" needs the generator."""
        if crop == "random":
            return self._tensors(example, flip, crop, generator)["latent"][0]
        return self._store.get(self._job(example, flip))["latent"][0].clone()

    def mask(
        self,
        example: Example,
        flip: bool = False,
        *,
        crop: str = "center",
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """The mask (1, h, w) of one image in latent cells, each the mean of its pixels; None for one without a mask.

        A random crop is the latent's where the generator is in the same state.
        """
        if example.mask is None:
            return None
        if crop == "random":
            return self._mask_tensors(example, flip, crop, generator)["mask"][0]
        return self._store.get(self._mask_job(example, flip))["mask"][0].clone()

    def fill(self, dataset: Dataset, on_progress: Progress | None = None) -> int:
        """Encodes what is missing, image by image, mirrored ones too if the data set mirrors, then their masks; returns
        how many.

        Does nothing for random crops. Raises OSError (ENOSPC) before encoding when the disk is too small.
        """
        if dataset.crop == "random":
            return 0
        flips = (False, True) if dataset.flip else (False,)
        jobs = [self._job(example, flip) for example in dataset.examples for flip in flips]
        masks = [self._mask_job(example, flip) for example in dataset.examples if example.mask for flip in flips]
        filled = self._store.fill(jobs, "latents", on_progress)
        return filled + self._store.fill(masks, "masks", on_progress)

    def _job(self, example: Example, flip: bool) -> Job:
        key = _key("latent", VERSION, self._fingerprint, example.key, example.width, example.height, "center", flip)
        return key, example.width * example.height, example.name, lambda: self._tensors(example, flip, "center", None)

    def _tensors(self, example: Example, flip: bool, crop: str, generator: torch.Generator | None) -> Tensors:
        image = example.load(flip=flip, crop=crop, generator=generator)
        with torch.no_grad():
            return _checked({"latent": self._encode(image[None])}, f"the latent of {example.name}")

    def _mask_job(self, example: Example, flip: bool) -> Job:
        size, mask = (example.width, example.height), example.mask
        key = _key("mask", VERSION, mask.key, mask.alpha, *size, self._downscale, "center", flip)
        name = f"mask of {example.name}"
        return key, size[0] * size[1], name, lambda: self._mask_tensors(example, flip, "center", None)

    def _mask_tensors(self, example: Example, flip: bool, crop: str, generator: torch.Generator | None) -> Tensors:
        pixels = example.load_mask(flip=flip, crop=crop, generator=generator)
        cells = example.height // self._downscale, example.width // self._downscale
        mask = torch.nn.functional.interpolate(pixels[None], cells, mode="area")
        return _checked({"mask": mask}, f"the mask of {example.name}")


class TextCache:
    """Text embeddings. `encode` maps a list of one caption to a Conditioning of batch 1.

    Contexts are stored without the pads that their mask hides (a mask that then hides nothing is None), as float32.
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
        """The conditioning (batch 1) of a caption, encoded now if it is not on disk."""
        return self._conditioning(self._store.get(self._job(caption)))

    def get_in_memory(self, caption: str) -> Conditioning:
        """As `get` for a caption that may never come again: if it has to be encoded, only memory keeps it."""
        return self._conditioning(self._store.get(self._job(caption), on_disk=False))

    @staticmethod
    def _conditioning(stored: Tensors) -> Conditioning:
        tensors = {name: tensor.clone() for name, tensor in stored.items()}
        prefix = _from_tensors(tensors, "before.") if "before.context" in tensors else None
        return replace(_from_tensors(tensors), prefix=prefix)

    def fill(self, captions: Iterable[str], on_progress: Progress | None = None) -> int:
        """Encodes the missing ones of `captions`, one at a time; returns how many."""
        return self._store.fill([self._job(caption) for caption in captions], "captions", on_progress)

    def _job(self, caption: str) -> Job:
        return _key("text", VERSION, self._fingerprint, caption), 1.0, caption, lambda: self._tensors(caption)

    def _tensors(self, caption: str) -> Tensors:
        with torch.no_grad():
            found = trim_padding(self._encode([caption]))
        if len(found) != 1:
            raise ValueError(f"the text encoder returned a batch of {len(found)} for one caption; expected 1.")
        tensors = _to_tensors(found)
        if found.prefix is not None:
            tensors |= _to_tensors(trim_padding(found.prefix), "before.")
        return _checked(tensors, f"the embedding of {caption!r}")


def trim_padding(conditioning: Conditioning) -> Conditioning:
    """Cuts the tokens behind the last attended one; a mask that hides nothing any more becomes None."""
    mask = conditioning.mask
    if mask is None:
        return conditioning
    attended = mask.any(0).nonzero()
    length = int(attended[-1]) + 1 if len(attended) else 1
    mask = mask[:, :length]
    return replace(conditioning, context=conditioning.context[:, :length], mask=None if mask.all() else mask)


def _to_tensors(conditioning: Conditioning, prefix: str = "") -> Tensors:
    """Without what stands before it."""
    parts = {name: getattr(conditioning, name) for name in ("context", "pooled", "mask")}
    return {prefix + name: tensor for name, tensor in parts.items() if tensor is not None}


def _from_tensors(tensors: Tensors, prefix: str = "") -> Conditioning:
    return Conditioning(*(tensors.get(prefix + name) for name in ("context", "pooled", "mask")))


class _Store:
    """Dictionaries of tensors in `folder/ab/abcd....safetensors`, the most recent ones also in memory."""

    def __init__(self, folder: Path, memory: int):
        self.folder = folder
        self._memory = memory
        self._held: OrderedDict[str, Tensors] = OrderedDict()
        self._held_bytes = 0

    def get(self, job: Job, on_disk: bool = True) -> Tensors:
        """The entry, made now if it is neither in memory nor on disk; without on_disk only memory then keeps it."""
        key, _, _, make = job
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        tensors = self._read(key)
        if tensors is None and not on_disk:
            tensors = make()
        elif tensors is None:
            data = _pack(make())
            self._write(key, data, len(data))
            tensors = self._read(key)
            assert tensors is not None, "a cache entry cannot be read right after it was written"
        self._hold(key, tensors)
        return tensors

    def fill(self, jobs: Iterable[Job], what: str, on_progress: Progress | None) -> int:
        """Makes the missing entries; the first one made tells what the rest will need on disk."""
        jobs = {job[0]: job for job in jobs}
        missing = [job for key, job in jobs.items() if self._read(key) is None]
        if on_progress and jobs:
            on_progress(len(jobs) - len(missing), len(jobs), f"caching {what}")
        left, rate = sum(job[1] for job in missing), 0.0
        for done, (key, weight, name, make) in enumerate(missing, start=1 + len(jobs) - len(missing)):
            data = _pack(make())
            if not rate:
                rate = len(data) / weight
                self._check_space(rate * left)
            self._write(key, data, rate * left)
            left -= weight
            if on_progress:
                on_progress(done, len(jobs), f"caching {what}: {name}")
        return len(missing)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        path = self._path(key)
        try:
            return _unpack(path.read_bytes())
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            log.warning("cache entry %s is damaged (%s); it is encoded again.", path, error)
            return None

    def _write(self, key: str, data: bytes, needed: float) -> None:
        try:
            write_bytes(self._path(key), data)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise self._full(needed) from error
            raise

    def _check_space(self, needed: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < needed + SPARE_DISK:
            raise self._full(needed)

    def _full(self, needed: float) -> OSError:
        free = shutil.disk_usage(self.folder).free / 2**20
        return OSError(
            errno.ENOSPC,
            f"the disk has {free:.0f} MiB free; expected about {(needed + SPARE_DISK) / 2**20:.0f} MiB for the rest of "
            "the cache. Free space or choose another folder; what is cached so far is kept",
            str(self.folder),
        )

    def _hold(self, key: str, tensors: Tensors) -> None:
        self._held[key] = tensors
        self._held_bytes += _bytes(tensors)
        while self._held_bytes > self._memory and len(self._held) > 1:
            self._held_bytes -= _bytes(self._held.popitem(last=False)[1])


def _key(*parts: str | int | bool) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _checked(tensors: Tensors, what: str) -> Tensors:
    """As they go to disk: float32 on the CPU. Raises ValueError for values that are not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{what} is not finite; expected finite values. Run the encoder in fp32 or bf16.")
    with torch.inference_mode(False):
        return {
            name: tensor.to("cpu", torch.bool if tensor.dtype == torch.bool else torch.float32).contiguous().clone()
            for name, tensor in tensors.items()
        }


def _pack(tensors: Tensors) -> bytes:
    return save(tensors, metadata={"sha256": _digest(tensors)})


def _unpack(data: bytes) -> Tensors:
    """Reads from memory, not from a mapping: a mapped file cannot be replaced on Windows."""
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
