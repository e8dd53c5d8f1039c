"""One run for a machine with a GPU, of eight minutes at most: the demo through ComfyUI with dynamic VRAM on, then LoRA
and reward steps beside diffusers + peft and the memory of a step, in bf16 at the size of SD1.5 and SDXL.

Every part has a share of the time, so that none takes another's; what it leaves goes to the parts after it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..training.commands.comfyui_server import Server, server
from ..training.commands.demo import DemoConfig
from ..training.commands.demo_in_comfyui import demo_prompt
from ..training.common.callbacks import Callbacks
from ..training.config.checks import check_range
from .comparisons import LORA, REWARD
from .lora_runs import median_step_seconds
from .memory_use import MemoryConfig, run_memory_bench
from .processes import last_line
from .side_by_side import StepConfig, device_name, run_comparison
from .study import markdown_table

log = logging.getLogger(__name__)

DESCRIPTION = "For a machine with a GPU, eight minutes: the demo in ComfyUI, then LoRA, reward and memory in bf16."
DEMO_RUN, MEMORY_OF = "demo in ComfyUI", "memory"
CPU_STEPS = 3
"""Steps of the demo's training where the script is only tried."""
DYNAMIC = "DynamicVRAM support detected and enabled"
"""What ComfyUI's log says when it uses dynamic VRAM."""
TRAIN_NODE = "8"
"""The training in the demo's workflow."""
ROUNDS = 5
"""Timed steps of each process."""
ONLY = {
    LORA: "limit, bf16;Retune, bf16;diffusers + peft, bf16;Retune, every layer, bf16;bypass on, bf16",
    REWARD: "K = 1, batch 1, bf16;K = 1, batch 4, bf16;K = 5, batch 1, bf16",
}
"""Variants that are run where no flag names others, the most telling first."""
SHARES = {DEMO_RUN: 90, (LORA, "sd15"): 85, (LORA, "sdxl"): 120, (REWARD, "sd15"): 55, (REWARD, "sdxl"): 60}
SHARES |= {(MEMORY_OF, "sd15"): 25, (MEMORY_OF, "sdxl"): 45}
SHARE = 30
"""Of the time, in seconds where all is run in eight minutes; `SHARE` of another part. Writing random weights counts to
the first part of their size."""
LONGEST_ROW = 20
"""Seconds that a row of `memory` takes at most: one that has begun is not stopped."""


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Size of the `gpu` benchmark."""

    minutes: float = 8.0
    """After which nothing more begins; what was not run is named."""
    sizes: tuple[str, ...] = ("sd15", "sdxl")
    """Models that are measured: demo, sd15, sdxl."""
    demo_steps: int = 100
    """Steps of the demo's training in ComfyUI; 0 leaves it out."""
    on_cpu: bool = False
    """Try the script on a machine without a GPU: the demo model alone, few steps. Its figures mean nothing."""

    def __post_init__(self) -> None:
        check_range(self, minutes=(0.1, 10**4), demo_steps=(0, 10**6))
        if unknown := set(self.sizes) - {"demo", "sd15", "sdxl"}:
            raise ValueError(f"sizes are {', '.join(self.sizes)}; expected demo, sd15 or sdxl, not {min(unknown)}.")


@dataclass(frozen=True)
class Stage:
    """A part of the run: what it is called, what returns its rows, claims and what was left out, and its share of the
    time that it has with the parts after it."""

    name: str
    run: Callable[[float], dict[str, Any]]
    share: float = SHARE


def run_gpu_bench(config: GpuConfig, steps: StepConfig, comfyui: Path | None, callbacks: Callbacks) -> dict[str, Any]:
    """Runs the stages, each within its share of the time.

    Raises:
        ValueError: There is no GPU, and `on_cpu` is off.

    Returns:
        "rows": pictures a second and peak bytes by stage and variant; "claims"; "skipped", what was left out and why;
        "chart", the folder of the charts; "seconds" in all; "stages", all that each returned; "table".
    """
    if not torch.cuda.is_available():
        if not config.on_cpu:
            raise ValueError("device is cpu; expected a GPU. --gpu-on-cpu tries the script without one.")
        config = replace(config, sizes=("demo",), demo_steps=min(config.demo_steps, CPU_STEPS))
    began, found, skipped = time.monotonic(), {}, {}
    deadline, left = began + 60 * config.minutes, list(stages(config, steps, comfyui, callbacks))
    while left:
        now, whole = time.monotonic(), sum(stage.share for stage in left)
        stage = left.pop(0)
        if now >= deadline:
            skipped[stage.name] = "no time was left"
            continue
        callbacks.on_text(stage.name)
        try:
            found[stage.name] = stage.run(now + (deadline - now) * stage.share / whole)
        except (RuntimeError, ValueError, OSError) as error:  # keeps what ran before: a GPU may be lent for minutes
            log.exception("%s failed", stage.name)
            skipped[stage.name] = f"failed: {last_line(str(error))}"
    for name, result in found.items():
        skipped |= {f"{name}: {variant}": reason for variant, reason in result.get("skipped", {}).items()}
    rows = [{"stage": name, **row} for name, result in found.items() for row in summary(result)]
    return {
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "rows": rows,
        "claims": [f"{name}: {claim}" for name, result in found.items() for claim in result.get("claims", [])],
        "skipped": skipped,
        "seconds": round(time.monotonic() - began, 1),
        "stages": found,
        "chart": str(steps.output.resolve()),
        "table": markdown_table(rows) if rows else "",
    }


def stages(config: GpuConfig, steps: StepConfig, comfyui: Path | None, callbacks: Callbacks) -> Iterable[Stage]:
    """All stages, the most telling first; without ComfyUI its own says so."""
    if config.demo_steps:
        run = partial(demo_stage, config, comfyui, callbacks)
        yield Stage(DEMO_RUN, run, SHARES[DEMO_RUN])
    for name in (LORA, REWARD):
        chosen = replace(steps, only=steps.only or ONLY[name], turns=1)
        for size in config.sizes:
            run = comparison_stage(name, chosen, size, comfyui, callbacks)
            yield Stage(f"{name}, {size}", run, SHARES.get((name, size), SHARE))
    for size in config.sizes:
        run = memory_stage(steps, size, callbacks)
        yield Stage(f"{MEMORY_OF}, {size}", run, SHARES.get((MEMORY_OF, size), SHARE))


def comparison_stage(
    name: str, steps: StepConfig, size: str, comfyui: Path | None, callbacks: Callbacks
) -> Callable[[float], dict[str, Any]]:
    def run(deadline: float) -> dict[str, Any]:
        return run_comparison(name, steps, size, ROUNDS, 1, comfyui, callbacks, deadline)

    return run


def memory_stage(steps: StepConfig, size: str, callbacks: Callbacks) -> Callable[[float], dict[str, Any]]:
    memory = MemoryConfig(measure=True, rank=steps.rank, pixels=steps.pixels, only="bf16", output=steps.output)

    def run(deadline: float) -> dict[str, Any]:
        return run_memory_bench(memory, size, 1, callbacks, deadline - LONGEST_ROW)

    return run


def demo_stage(config: GpuConfig, comfyui: Path | None, callbacks: Callbacks, deadline: float) -> dict[str, Any]:
    """The demo's workflow in a ComfyUI with its own defaults: on an NVIDIA card, dynamic VRAM.

    Returns:
        One row: seconds a step, pictures a second, and the most memory of the card that was in use.
    """
    if comfyui is None:
        return {"rows": [], "skipped": {"workflow": "no ComfyUI"}}
    demo = DemoConfig(images=200, judged=8, steps=config.demo_steps, batch_size=16, run_name="gpu bench", restart=True)
    flags = () if torch.cuda.is_available() else ("--cpu",)
    with TemporaryDirectory(prefix="retune-bench-", ignore_cleanup_errors=True) as folder:
        with server(comfyui, Path(folder).resolve(), flags) as running:
            watch = Watch(running)
            running.on_event = watch.look
            running.run(demo_prompt(demo), max(1.0, deadline - time.monotonic()))
            dynamic = DYNAMIC in running.log.read_text(encoding="utf-8", errors="replace")
    pace = median_step_seconds(watch.marks, 1)
    row = {"variant": f"Retune in ComfyUI, dynamic VRAM {'on' if dynamic else 'off'}", "seconds": pace}
    row |= {"pictures a second": demo.batch_size / pace, "training": watch.peak}
    return {"rows": [row], "skipped": {}}


class Watch:
    """The steps of the demo's training in a server, and the most bytes of its device that were in use: looked at once a
    second at most, so that a short peak may be missed."""

    def __init__(self, running: Server):
        self.running, self.peak, self.marks, self._last = running, 0, [], 0.0

    def look(self, event: dict) -> None:
        now = time.perf_counter()
        if event["type"] == "progress" and event["data"]["node"] == TRAIN_NODE:
            self.marks.append((now, event["data"]["value"]))
        if now - self._last >= 1:
            self._last = now
            device = json.loads(self.running.request("/system_stats"))["devices"][0]
            self.peak = max(self.peak, device["vram_total"] - device["vram_free"])


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a stage's result that the table has: what each variant draws or trains, and needs."""
    rows = []
    for row in result.get("rows", []):
        if "training" in row and "variant" not in row:  # of `memory`
            rows.append(
                {
                    "variant": f"{row['training']}, {row['setting']}",
                    "pictures a second": "",
                    "peak GB": gigabytes(row.get("measured", row["peak"])),
                    "estimate / measured": row.get("ratio", ""),
                }
            )
            continue
        rate = row.get("pictures a second")
        rate = "" if rate is None else round(rate, 3)
        estimate, peak = row.get("estimate"), row.get("training")
        more = {
            "peak GB": gigabytes(peak),
            "estimate / measured": round(estimate / peak, 3) if estimate and peak else "",
        }
        rows.append({"variant": row["variant"], "pictures a second": rate, **more})
    return rows


def gigabytes(value: int | None) -> float | str:
    return "" if value is None else round(value / 1e9, 3)
