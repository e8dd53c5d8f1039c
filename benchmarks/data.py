"""Data at size: reading a folder of pictures, filling and checking the cache of their latents, and time per batch; and
an index of prompts, opened and shuffled.

The encoder is a mean over cells, so that the figures are those of the data alone. Pictures are the demo's size; each
has other pixels, so no two share a key.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..training.common.callbacks import Callbacks
from ..training.common.parallel import worker_count
from ..training.config.checks import check_range
from ..training.config.folder import FolderConfig
from ..training.data.cache import LatentCache
from ..training.data.dataset import load_folder
from ..training.data.examples import Dataset
from ..training.data.order import BatchOrder
from ..training.data.prompts import PromptFile, PromptOrder
from ..training.recipes.latents import CroppedLatents
from .study import markdown_table

DESCRIPTION = "Data at size: seconds to read pictures, cache latents and check them, milliseconds per batch, memory."
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How much data the `data` benchmark makes."""

    images: int = 2000
    """Pictures; 20000 are the size of the source's run."""
    prompts: int = 1_000_000
    """Lines of the file of prompts."""
    side: int = 128
    """Pixels of a picture's side, a multiple of 8."""
    batches: int = 200
    """Batches that are read."""

    def __post_init__(self) -> None:
        check_range(self, images=(1, 10**7), prompts=(1, 10**9), side=(8, 4096), batches=(1, 10**6))


@dataclass
class Stages:
    """The measured stages, a row each."""

    callbacks: Callbacks
    rows: list[dict]

    def measure(self, name: str, count: int, run: Callable[[], Result]) -> Result:
        """Runs a stage; its row has seconds, milliseconds for each of `count`, and growth of the process's memory."""
        self.callbacks.on_text(name)
        process = psutil.Process()
        memory, began = process.memory_info().rss, time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        grown = (process.memory_info().rss - memory) / 2**20
        each = round(1000 * seconds / count, 4)
        self.rows.append(
            {"stage": name, "count": count, "seconds": round(seconds, 2), "ms each": each, "grown MiB": round(grown, 1)}
        )
        return result


def write_pictures(folder: Path, count: int, side: int) -> None:
    """PNG files of a gradient with noise, and a caption for each."""
    ramp = np.linspace(0, 200, side)[:, None, None] + np.zeros((side, side, 3))
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 55, (side, side, 3))
        Image.fromarray((ramp + noise).astype(np.uint8)).save(folder / f"{number:07}.png", compress_level=1)
        (folder / f"{number:07}.txt").write_text(f"picture number {number}", encoding="utf-8")


def write_prompts(path: Path, count: int) -> None:
    """A file of prompts, a line each."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"a picture of number {number}, on a white background\n" for number in range(count))


def mean_of_cells(image: Tensor) -> Tensor:
    """(1, 4, H / 8, W / 8): stands for a VAE."""
    cells = functional.avg_pool2d(image, 8)
    return torch.cat([cells, cells[:, :1]], dim=1)


def read_batches(order: BatchOrder, latents: CroppedLatents, numbers: range) -> None:
    """What a training reads for each batch before the text."""
    for number in numbers:
        torch.stack([latents.latent(slot) for slot in order.batch(number)])


def measure_pictures(stages: Stages, config: DataConfig, batch_size: int, root: Path) -> None:
    """The stages of a data set of pictures."""
    folder, count, batches = root / "pictures", config.images, config.batches
    folder.mkdir()
    write_pictures(folder, count, config.side)
    options = FolderConfig(folder=folder, resolution=config.side)
    dataset: Dataset = stages.measure("read the folder", count, lambda: load_folder(options))
    stages.measure("fingerprint", count, lambda: dataset.fingerprint)

    def cache(memory: int = 512 << 20) -> LatentCache:
        return LatentCache(root / "cache", mean_of_cells, "mean", memory)

    stages.measure("fill the cache", count, lambda: cache().fill(dataset))
    stages.measure("check a full cache", count, lambda: cache().fill(dataset))
    order = BatchOrder(dataset, batch_size, 0)
    cold, warm = CroppedLatents(cache(0), [dataset], 0), CroppedLatents(cache(), [dataset], 0)
    stages.measure("shuffle an epoch", count, lambda: order.batch(1))
    stages.measure("batches from disk", batches, lambda: read_batches(order, cold, range(1, batches + 1)))
    read_batches(order, warm, range(1, batches + 1))
    stages.measure("batches from memory", batches, lambda: read_batches(order, warm, range(1, batches + 1)))


def measure_prompts(stages: Stages, config: DataConfig, batch_size: int, root: Path) -> None:
    """The stages of a file of prompts."""
    path, count, batches = root / "prompts.txt", config.prompts, config.batches
    write_prompts(path, count)
    prompts = stages.measure("open the prompts", count, lambda: PromptFile(path))
    order = PromptOrder(prompts, batch_size, 0)
    stages.measure("shuffle the prompts", count, lambda: order.batch(1))
    stages.measure("batches of prompts", batches, lambda: [order.batch(n) for n in range(1, batches + 1)])


def run_data_bench(config: DataConfig, batch_size: int, callbacks: Callbacks) -> dict:
    """Measures every stage once, in a folder that is removed afterwards.

    Returns:
        "rows" by stage with the count, seconds, milliseconds each and MiB by which the process grew; "threads" and
        "table".
    """
    stages = Stages(callbacks, [])
    with tempfile.TemporaryDirectory() as folder:
        measure_pictures(stages, config, batch_size, Path(folder))
        measure_prompts(stages, config, batch_size, Path(folder))
    return {
        "batch_size": batch_size,
        "threads": worker_count(),
        "rows": stages.rows,
        "table": markdown_table(stages.rows),
    }
