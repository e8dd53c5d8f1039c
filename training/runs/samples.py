"""Sample pictures of a run: how they are drawn, and the files and the row of metrics.jsonl that show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.images import contact_sheet, save_png
from .folder import RunFolder


@dataclass(frozen=True)
class Sampler:
    """Sample pictures in two moves: `draw` runs with the trained weights attached, `decode` without them.

    `judge` gives figures of the pictures and their prompts for the samples' row.
    """

    draw: Callable[[], list[Tensor]]
    decode: Callable[[list[Tensor]], list[Tensor]]
    judge: Callable[[list[Tensor], list[str]], dict[str, float]] | None = None


def write_samples(
    folder: RunFolder, sampler: Sampler, images: list[Tensor], prompts: Sequence[str], step: int, epoch: float
) -> dict[str, Any]:
    """Writes pictures (3, H, W) in 0..1, one of each prompt, and a sheet of them; returns their row."""
    files = []
    for index, image in enumerate(images):
        files.append(f"{step:06d}_{index:02d}.png")
        save_png(image, folder.samples / files[-1])
    grid = f"{step:06d}_grid.png"
    save_png(contact_sheet(images), folder.samples / grid)
    figures = sampler.judge(images, list(prompts)) if sampler.judge else {}
    about = {"event": "sample", "step": step, "epoch": round(epoch, 2)}
    return {**about, **figures, "files": files, "grid": grid, "prompts": list(prompts)}
