"""Latents and masks of a data set's images: cached for all runs, cropped for each slot of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.rng import generator
from ..data.cache import LatentCache, TextCache
from ..data.examples import Dataset
from ..data.order import Slot
from ..models.protocols import TextToImage


class CroppedLatents:
    """Latents and masks of slots; a random crop is the same for both.

    Args:
        cache: of the uncropped latents.
        datasets: the data sets that slots come from; each has its way of cropping.
        seed: of random crops.
    """

    def __init__(self, cache: LatentCache, datasets: Sequence[Dataset], seed: int):
        self._cache, self._seed = cache, seed
        self._crops = {example.key: dataset.crop for dataset in datasets for example in dataset.examples}

    def latent(self, slot: Slot) -> Tensor:
        """(C, h, w)."""
        return self._crop(self._cache.get, slot)

    def mask(self, slot: Slot) -> Tensor | None:
        """(1, h, w) in 0..1, or None for an image without a mask."""
        return self._crop(self._cache.mask, slot)

    def _crop(self, read: Callable[..., Tensor | None], slot: Slot) -> Tensor | None:
        crop = self._crops[slot.example.key]
        if crop == "random":
            random = generator(self._seed, "crop", slot.epoch, slot.index, slot.example.key)
            return read(slot.example, slot.flip, crop=crop, generator=random)
        return read(slot.example, slot.flip)


def latent_cache(model: TextToImage, cache_folder: Path) -> LatentCache:
    """The cache of a model's latents; cache_folder: shared by all runs."""
    vae = model.autoencoder
    return LatentCache(cache_folder / "latents", vae.encode, vae.fingerprint, downscale=vae.downscale)


def fill_cache(cache: LatentCache | TextCache, contents: Dataset | Sequence[str], callbacks: Callbacks) -> None:
    """Fills a cache by the main process; others must wait (`World.barrier`) before they read."""
    if world().is_main:
        cache.fill(contents, lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"))
