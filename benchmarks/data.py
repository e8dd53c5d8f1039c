"""Data at size: reading a folder of pictures, filling and checking the cache of their latents, and time per batch; and
an index of prompts, opened and shuffled.

The encoder is a mean over cells, so that the figures are those of the data alone. Pictures are the demo's size; each
has other pixels, so no two share a key. What a batch takes is set beside a step of a bare SD1.5 UNet.
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
from ..training.loop.precision import DTYPES
from ..training.recipes.latents import CroppedLatents
from .charts import BENCH_FOLDER, save_bars
from .comparisons import COMPARISONS, LORA, Claim
from .peers import bare_inputs, bare_step
from .processes import free_memory
from .random_models import fill, random_parts
from .side_by_side import check
from .study import markdown_table
from .timing import median_seconds

DESCRIPTION = "Data at size: seconds to read pictures, cache latents and check them, ms per batch over a step, memory."
BATCHES = ("batches from disk", "batches from memory", "batches of prompts")
STEP, STEP_PIXELS, STEP_ROUNDS = "SD1.5 step", 256, 2
"""Row of the step that batches are compared with, pixels of its pictures' side, and how often it is timed."""
MOST = 0.01
"""Share of a step that a batch may take."""
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
    step_seconds: float = 0.0
    """Seconds of a step of SD1.5 at 256 pixels that those of a batch are divided by; 0: measured, where it fits."""
    output: Path = BENCH_FOLDER
    """Folder of the chart."""

    def __post_init__(self) -> None:
        check_range(self, images=(1, 10**7), prompts=(1, 10**9), side=(8, 4096), batches=(1, 10**6))
        check_range(self, step_seconds=(0, 10**6))


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


def measure_step(config: DataConfig, batch_size: int, callbacks: Callbacks) -> tuple[float, int]:
    """Seconds of a forward and backward pass of SD1.5's UNet with random weights, and the pictures of its batch.

    Those are half as many, again and again, where `batch_size` does not fit: a batch's share of the step is then at
    most what is found. (0, 0) where one picture does not fit.
    """
    if config.step_seconds:
        return config.step_seconds, batch_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if device == "cuda" else "fp32"
    limit, free = COMPARISONS[LORA].variants[f"limit, {precision}"], free_memory(device)
    while batch_size and limit.bytes_needed("sd15", STEP_PIXELS, batch_size) > free:
        batch_size //= 2
    if not batch_size:
        return 0.0, 0
    callbacks.on_text(f"{STEP} of {batch_size} at {STEP_PIXELS} pixels")
    return bare_step_seconds("sd15", precision, STEP_PIXELS, batch_size, STEP_ROUNDS, device), batch_size


def bare_step_seconds(size: str, precision: str, pixels: int, batch_size: int, rounds: int, device: str) -> float:
    """Median seconds of the limit's step in this process, of a network with random weights."""
    with torch.device("meta"):
        unet = random_parts(size)["unet"]().to(DTYPES[precision])
    unet = fill(unet.to_empty(device=device)).requires_grad_(False)
    inputs = bare_inputs(unet, batch_size, pixels)

    def step() -> None:
        bare_step(unet, inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return median_seconds({"step": step}, rounds)["step"]


def compare(rows: list[dict], seconds: float, pictures: int) -> tuple[list[str], dict[str, str]]:
    """Adds the step to the rows, and to each row of batches its share of the step.

    Args:
        rows: of the stages.
        seconds: of the step; 0 for none.
        pictures: of the step.

    Returns:
        Sentences on whether each kind of batch takes at most a hundredth, and what was left out and why.
    """
    for row in rows:
        row["ratio"] = row["ms each"] / (1000 * seconds) if seconds and row["stage"] in BATCHES else None
    if not seconds:
        return [], {STEP: "one picture does not fit the memory; give --data-step-seconds"}
    step = f"{STEP} of {pictures} at {STEP_PIXELS} pixels"
    whole = {"stage": step, "count": 1, "seconds": round(seconds, 4), "ms each": round(1000 * seconds, 4)}
    rows.append({**whole, "grown MiB": None, "ratio": 1.0})
    figures = [{"variant": row["stage"], "ms each": row["ms each"]} for row in rows]
    return [check(Claim(stage, step, "ms each", most=MOST), figures) for stage in BATCHES], {}


def run_data_bench(config: DataConfig, batch_size: int, callbacks: Callbacks) -> dict:
    """Measures every stage once, in a folder that is removed afterwards.

    Returns:
        "rows" by stage with the count, seconds, milliseconds each, MiB by which the process grew, and "ratio", the
        share of a step of SD1.5 that a batch takes; "claims"; "skipped"; "threads", "chart" and "table".
    """
    stages = Stages(callbacks, [])
    with tempfile.TemporaryDirectory() as folder:
        measure_pictures(stages, config, batch_size, Path(folder))
        measure_prompts(stages, config, batch_size, Path(folder))
    rows, timed = stages.rows, list(stages.rows)
    claims, skipped = compare(rows, *measure_step(config, batch_size, callbacks))
    panels = {"ms each": [row["ms each"] for row in timed], "grown MiB": [max(0, row["grown MiB"]) for row in timed]}
    if claims:
        panels[f"% of an {STEP}"] = [100 * (row["ratio"] or 0) for row in timed]
    return {
        "batch_size": batch_size,
        "threads": worker_count(),
        "rows": rows,
        "claims": claims,
        "skipped": skipped,
        "chart": save_bars("data", [row["stage"] for row in timed], panels, config.output / "data.png"),
        "table": markdown_table([{k: "" if v is None else v for k, v in row.items()} for row in rows]),
    }
