"""Pictures of prompts by several models from one noise, through ComfyUI's own sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .lora_patches import Row, apply_loras


@dataclass(frozen=True)
class Column:
    """A model whose pictures stand in one column: its MODEL and CLIP, and the title."""

    title: str
    model: Any
    clip: Any


@dataclass(frozen=True)
class Sampling:
    """How every picture is drawn: the inputs of ComfyUI's KSampler and Empty Latent Image."""

    negative: str
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    width: int
    height: int


def lora_columns(model, clip, loras: Sequence[Row], strengths: Sequence[float]) -> tuple[list[Column], list[str]]:
    """A column for each strength of some LoRAs, which add up; and warnings, such as layers that were not used."""
    columns, warnings = [], {}
    for strength in strengths:
        rows = [replace(row, strength_model=strength, strength_clip=strength) for row in loras]
        patched, patched_clip, uses = apply_loras(model, clip, rows)
        columns.append(Column(f"strength {strength:g}", patched, patched_clip))
        if strength:
            warnings |= dict.fromkeys(line for use in uses for line in use.warnings())
    return columns, list(warnings)


def model_columns(model, clip, models: Mapping[str, Any], clips: Mapping[str, Any]) -> list[Column]:
    """A column for each number among the names of some MODELs (`model0`) and CLIPs (`clip0`).

    What a number lacks is `model` or `clip`.
    """
    given = {name: part for name, part in {**models, **clips}.items() if part is not None}
    numbers = sorted({int(name.removeprefix("model").removeprefix("clip")) for name in given})
    columns = []
    for number in numbers:
        names = [name for name in (f"model{number}", f"clip{number}") if name in given]
        parts = given.get(f"model{number}", model), given.get(f"clip{number}", clip)
        columns.append(Column(" + ".join(names), *parts))
    return columns


def titled(columns: Sequence[Column], titles: Sequence[str]) -> list[Column]:
    """The columns with other titles, where some are given. Raises ValueError unless there is one for each."""
    if not titles:
        return list(columns)
    if len(titles) != len(columns):
        own = ", ".join(column.title for column in columns)
        raise ValueError(f"titles has {len(titles)} lines; expected {len(columns)}, one for each of: {own}.")
    return [Column(title, column.model, column.clip) for title, column in zip(titles, columns, strict=True)]


def draw_column(column: Column, vae, prompts: Sequence[str], sampling: Sampling) -> Tensor:
    """(prompts, height, width, 3) in 0..1, bit for bit what KSampler and VAE Decode give for each prompt alone."""
    from nodes import CLIPTextEncode, EmptyLatentImage, VAEDecode, common_ksampler

    about = sampling
    negative, *texts = [CLIPTextEncode().encode(column.clip, text)[0] for text in (about.negative, *prompts)]
    start = EmptyLatentImage().generate(about.width, about.height)[0]
    options = about.seed, about.steps, about.cfg, about.sampler_name, about.scheduler
    latents = [common_ksampler(column.model, *options, text, negative, start)[0] for text in texts]
    return torch.cat([VAEDecode().decode(vae, latent)[0] for latent in latents])
