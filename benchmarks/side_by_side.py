"""Runs a comparison: every variant in a process of its own, in turns; medians, ratios, what they must show, a chart."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..training.common.callbacks import Callbacks
from ..training.config.checks import check_range
from .charts import BENCH_FOLDER, save_bars
from .comparisons import COMPARISONS, STARTUP, Claim, Comparison, Variant
from .processes import Case, free_memory, median_of, run_case, run_in_turns
from .random_models import default_side, write_model
from .study import markdown_table

FIGURES = ("seconds", "first step", "loading", "preparing", "training", "estimate", "trained")
BYTES = ("loading", "preparing", "training")
"""Peaks of a phase; "estimate" is what a run says of its peak before its first step."""
MODELS = Path("models")
"""Folder of the random weights, within that of the results."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Size of the comparisons `lora`, `finetune`, `embedding`, `reward`, `encode` and `startup`."""

    pixels: int = 0
    """Side of the pictures, a multiple of 8; 0: 128, 512 or 1024 by size, and at most 256 on a CPU."""
    rank: int = 4
    """Of the LoRA."""
    turns: int = 2
    """Processes of each variant."""
    only: str = ""
    """Part of the names of the variants to run, such as bf16; several with semicolons, in this order. Empty: all."""
    memory: float = 0.0
    """GB that a variant may take; one that needs more is left out. 0: what is free."""
    output: Path = BENCH_FOLDER
    """Folder of the chart and of the random weights: 2 GB for SD1.5, 7 GB for SDXL."""

    def __post_init__(self) -> None:
        check_range(self, pixels=(0, 8192), rank=(1, 4096), turns=(1, 1000), memory=(0, 10**4))

    def chosen(self, variants: Mapping[str, Variant]) -> dict[str, Variant]:
        """The variants to run; ValueError where the names fit none."""
        parts = [part.strip() for part in self.only.split(";") if part.strip()] or [""]
        chosen = {name: variants[name] for part in parts for name in variants if part in name}
        if not chosen:
            raise ValueError(f"only is {self.only!r}; expected a part of one of {'; '.join(variants)}.")
        return chosen


def run_comparison(
    name: str,
    config: StepConfig,
    size: str,
    rounds: int,
    batch_size: int,
    comfyui: Path | None,
    callbacks: Callbacks,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Measures a comparison of `COMPARISONS`.

    Args:
        rounds: Steps that are timed in each process.
        comfyui: ComfyUI's folder, or None to leave its variants out.
        deadline: `time.monotonic()` after which no process goes on.

    Returns:
        "rows" by variant with medians; "skipped", variant -> reason; "claims", "chart", "table" and what was measured.
    """
    comparison, device = COMPARISONS[name], "cuda" if torch.cuda.is_available() else "cpu"
    pixels = config.pixels or default_side(size, device)
    variants, skipped = config.chosen(comparison.variants), {}
    for variant, about in variants.items():
        if reason := why_not(about, size, pixels, batch_size, config, comfyui, device):
            skipped[variant] = reason
    callbacks.on_text(f"weights of {size}")
    model = write_model(size, config.output / MODELS / size).resolve()
    with tempfile.TemporaryDirectory(prefix="retune-bench-", ignore_cleanup_errors=True) as work:
        about = {"bench": name, "size": size, "model": str(model), "work": work, "pixels": pixels, "rank": config.rank}
        about |= {"batch_size": batch_size, "rounds": 0 if name == STARTUP else rounds, "device": device}
        cases = [Case(variant=v, comfyui=str(comfyui or ""), **about) for v in variants if v not in skipped]
        found = run_in_turns(cases, config.turns, callbacks.on_text, deadline, run_case)
    skipped |= {variant: runs[0]["skipped"] for variant, runs in found.items() if runs and "skipped" in runs[0]}
    rows = rows_of(comparison, {variant: runs for variant, runs in found.items() if variant not in skipped}, batch_size)
    title = f"{name}, {size}, {pixels} pixels, {device}"
    chart = save_chart(comparison, rows, title, config.output / f"{name} {size}.png")
    sizes = {"size": size, "pixels": pixels, "batch_size": batch_size, "device": device_name(device)}
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        **sizes,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "skipped": skipped,
        "claims": claims_on(comparison.claims, rows, variants, pixels),
        "chart": chart,
        "table": markdown_table([shown(row) for row in rows]) if rows else "",
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def why_not(
    variant: Variant, size: str, pixels: int, batch_size: int, config: StepConfig, comfyui: Path | None, device: str
) -> str:
    """Why a variant is left out; empty where it can run."""
    if variant.needs == "comfyui" and comfyui is None:
        return "no ComfyUI"
    if variant.needs != "comfyui" and importlib.util.find_spec(variant.needs) is None:
        return f"{variant.needs} is not installed"
    needed = variant.bytes_needed(size, pixels, batch_size)
    free = config.memory * 1e9 or free_memory(device)
    return f"needs about {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB" if needed > free else ""


def rows_of(comparison: Comparison, found: Mapping[str, Sequence[Mapping]], batch_size: int) -> list[dict[str, Any]]:
    """A row of medians for each variant, with the ratio to its baseline's."""
    rows = {}
    for variant, runs in found.items():
        if runs:
            row = {"variant": variant, **{name: median_of(runs, name) for name in FIGURES}}
            seconds, batch = row["seconds"], comparison.variants[variant].options.get("batch_size", batch_size)
            rows[variant] = row | {"pictures a second": batch / seconds if seconds else None}
    for variant, row in rows.items():
        base = rows.get(comparison.baseline_of(variant), {}).get(comparison.figure)
        value = row[comparison.figure]
        row["ratio"] = value / base if base and value is not None else None
    return list(rows.values())


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the table: bytes in GB, numbers short."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name in BYTES:
            out[f"{name}, peak GB"] = None if value is None else round(value / 1e9, 3)
        elif name == "estimate":
            out["estimate, GB"] = None if value is None else round(value / 1e9, 3)
        else:
            out[name] = round(value, 3) if isinstance(value, float) else value
    return {name: "" if value is None else value for name, value in out.items()}


def claims_on(
    claims: Sequence[Claim], rows: Sequence[Mapping[str, Any]], chosen: Collection[str], pixels: int
) -> list[str]:
    """A sentence on every claim about chosen variants that is made of pictures of this side."""
    return [check(c, rows) for c in claims if {c.of, c.over} <= set(chosen) and pixels >= c.from_side]


def check(claim: Claim, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on whether a claim holds, with its bounds; or that a variant or a figure is missing."""
    by_name = {row["variant"]: row for row in rows}
    above, _, below = claim.figure.partition("/")
    value = by_name.get(claim.of, {}).get(above)
    base = by_name.get(claim.over, {}).get(below or above)
    what, over = {"training": "peak memory"}.get(claim.figure, claim.figure), "" if below else f" x {claim.over}"
    ratio = value / base if value and base else None
    start = f"{what}: {claim.of} is {'?' if ratio is None else format(ratio, '.3f')}{over}"
    if claim.bounds:
        start += f"; {claim.bounds}"
    return f"{start}: {verdict(claim, ratio)}" if claim.bounds or ratio is None else f"{start}."


def verdict(claim: Claim, ratio: float | None) -> str:
    """Whether a ratio is within the claim's bounds, and by how much not."""
    if ratio is None:
        return "not measured."
    off = max(ratio / claim.most if claim.most is not None else 0, claim.least / ratio if claim.least else 0)
    return "holds." if off <= 1 else f"missed by {100 * (off - 1):.1f} %."


def save_chart(comparison: Comparison, rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> str:
    """A bar for each variant: what the comparison is of, and its peak memory."""
    names = [row["variant"] for row in rows]
    time = "first step" if comparison.figure == "first step" else "seconds"
    panels = {
        "seconds": [row[time] or 0.0 for row in rows],
        "peak memory of training (GB)": [(row["training"] or 0) / 1e9 for row in rows],
    }
    return save_bars(title, names, panels, path)
