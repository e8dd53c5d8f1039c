"""Scores of image files by rewards: the command line's `score`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import write_text
from ..common.text import filled_lines
from ..data.captions import caption_from_text_file, read_text
from ..data.folder import find_images
from ..data.images import load_image
from ..rewards.diversity import diversity
from ..rewards.parse import read_rewards
from ..rewards.score import score_images

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score images by rewards."""

    images: Path
    """Folder of images, or one image."""
    rewards: tuple[str, ...] = ("demo CLIP",)
    """Rewards as kind,name=value,... such as "PickScore,file=PickScore_v1.safetensors,weight=2". Names: file,
    image_tower, tokenizer, comfyui, activation, weight, target, form. Several are summed, each divided by its scale."""
    prompts: Path | None = None
    """Text file: one line for all images, or a line for each in the order of names. Without it, each image's .txt
    or .caption."""
    tokenizer: Path | None = None
    """CLIP tokenizer folder of all rewards that name none; the demo's have their own."""
    comfyui: Path | None = None
    """An installed ComfyUI, to take the tokenizer from."""
    diversity: bool = False
    """Also how different the images are, on the first reward's image tower; they must have one size."""
    output: Path | None = None
    """JSON file to write; the result is printed too."""
    device: str = "cpu"
    """Where the rewards compute, such as cpu or cuda."""


def score_files(config: ScoreConfig) -> dict[str, Any]:
    """Scores the files by every reward.

    Returns:
        {"images": names}, the scores of each file with mean and std (`ScoreTable.as_dict`), and "diversity" if asked.

    Raises:
        ValueError, OSError: For missing or unreadable files.
    """
    reward = read_rewards(config.rewards, config.tokenizer, config.comfyui)
    folder = config.images if config.images.is_dir() else config.images.parent
    names = find_images(folder) if config.images.is_dir() else [config.images.name]
    prompts = prompts_for(config.prompts, [folder / name for name in names], reward.reads_prompts)
    reward.network.to(config.device)
    images = (load_image(folder / name) for name in names)
    table = score_images(reward, images, prompts, lambda done, total: log.info("%d of %d images", done, total))
    result = {"images": names} | table.as_dict()
    if config.diversity:
        spread = diversity(load_equal_sized([folder / name for name in names]), reward)
        result["diversity"] = {"vendi": spread.vendi, "distance": spread.distance, "lpips": spread.lpips}
    if config.output is not None:
        write_text(config.output, json.dumps(result, indent=1) + "\n")
    return result


def prompts_for(file: Path | None, images: Sequence[Path], needed: bool) -> list[str]:
    """One prompt for each image.

    Args:
        file: Text file with a prompt a line, one for all images or one for each. None: each image has its .txt file.
        needed: Whether a missing .txt is an error; otherwise its prompt is empty.

    Raises:
        ValueError: For another number of prompts than images, or a missing .txt.
    """
    if file is not None:
        return _read_prompts(file, len(images))
    captions = [caption_from_text_file(image) for image in images]
    missing = [image.with_suffix(".txt").name for image, text in zip(images, captions, strict=True) if text is None]
    if missing and needed:
        raise ValueError(f"{missing[0]} does not exist; expected a prompt for each image. Use --prompts with a file.")
    return [text or "" for text in captions]


def _read_prompts(file: Path, count: int) -> list[str]:
    """The file's prompts, or its only one `count` times."""
    lines = filled_lines(read_text(file))
    if len(lines) not in (1, count):
        raise ValueError(f"{file.name} has {len(lines)} prompts; expected 1 or {count}, one for each image.")
    return lines * count if len(lines) == 1 else lines


def load_equal_sized(files: Sequence[Path]) -> Tensor:
    """Images of one size as (N, 3, H, W); ValueError where sizes differ."""
    images = [load_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            height, width = images[0].shape[1:]
            raise ValueError(f"{file.name} has another size than {width} x {height}; expected images of one size.")
    return torch.stack(images)


VERBS = {"score": (ScoreConfig, score_files)}
"""Verb -> its config and its function."""
