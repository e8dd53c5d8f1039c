"""Sample pictures of a run: how they are drawn, their files and their row of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.images import contact_sheet, save_png
from .folder import RunFolder


@dataclass(frozen=True)
class Sampler:
    """Draws sample pictures.

    Attributes:
        draw: latents of all prompts; runs with the trained weights attached.
        decode: latents -> pictures (3, H, W) in 0..1; runs without them.
        judge: (pictures, prompts) -> figures for the samples' row.
    """

    draw: Callable[[], list[Tensor]]
    decode: Callable[[list[Tensor]], list[Tensor]]
    judge: Callable[[list[Tensor], list[str]], dict[str, float]] | None = None


def write_samples(
    folder: RunFolder, sampler: Sampler, images: list[Tensor], prompts: Sequence[str], step: int, epoch: float
) -> dict[str, Any]:
    """Writes sample pictures and a contact sheet of them, and returns their row of metrics.jsonl.

    Args:
        folder: the run's.
        sampler: its judge adds figures to the row.
        images: (3, H, W) in 0..1, one of each prompt.
        prompts: in the pictures' order.
        step: at which they were drawn.
        epoch: likewise.
    """
    files = []
    for index, image in enumerate(images):
        files.append(f"{step:06d}_{index:02d}.png")
        save_png(image, folder.samples / files[-1])
    grid = f"{step:06d}_grid.png"
    save_png(contact_sheet(images), folder.samples / grid)
    figures = sampler.judge(images, list(prompts)) if sampler.judge else {}
    about = {"event": "sample", "step": step, "epoch": round(epoch, 2)}
    return {**about, **figures, "files": files, "grid": grid, "prompts": list(prompts)}
