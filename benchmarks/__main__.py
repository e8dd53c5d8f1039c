"""Benchmarks and studies: `python run.py bench [name]`, or `python -m retune.benchmarks [name]` in a checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..training.commands.terminal import Terminal, run_verb
from ..training.config.flags import add_flags, read_flags
from .catalog import DATA, DEMO_MODEL, GPU, LORA_LOSS, MEMORY, REWARD_METHODS, STUDIES, BenchConfig, descriptions
from .comparisons import COMPARISONS
from .data import DataConfig, run_data_bench
from .demo_model import DemoModelConfig, run_demo_model_bench
from .gpu import GpuConfig, run_gpu_bench
from .lora import run_lora_bench
from .lora_runs import LoraBenchConfig
from .memory_use import MemoryConfig, run_memory_bench
from .reward import RewardBenchConfig, run_reward_bench
from .side_by_side import StepConfig, run_comparison
from .speed import run_timing
from .study import StudyConfig, run_study

BATCH_SIZE = 16
"""Of timings and of `reward-methods`, where no flag sets it."""


def bench(arguments: argparse.Namespace) -> dict:
    """Measures what `arguments.name` names; without a name, lists what there is."""
    config = read_flags(arguments, BenchConfig)
    if not config.name:
        return descriptions()
    if config.name == LORA_LOSS:
        return run_lora(arguments)
    if config.name in COMPARISONS or config.name == GPU:
        return run_sized(config, arguments)
    batch_size = config.batch_size or BATCH_SIZE
    if config.name == DEMO_MODEL:
        result = run_demo_model_bench(read_flags(arguments, DemoModelConfig), Terminal())
    elif config.name == REWARD_METHODS:
        sized = read_flags(arguments, RewardBenchConfig, batch_size=batch_size)
        result = run_reward_bench(sized, arguments.comfyui, Terminal())
    elif config.name == MEMORY:
        result = run_memory(config, read_flags(arguments, MemoryConfig, "memory_"))
    elif config.name == DATA:
        result = run_data_bench(read_flags(arguments, DataConfig, "data_"), config.batch_size or 1, Terminal())
    elif config.name in STUDIES:
        result = run_study(config.name, STUDIES[config.name], read_flags(arguments, StudyConfig), Terminal())
    else:
        return run_timing(config.name, config.rounds, batch_size)
    return result if arguments.json else readable(result)


def run_memory(config: BenchConfig, options: MemoryConfig) -> dict:
    """The memory of a step, or of the presets' runs."""
    if options.presets:
        from .preset_memory import run_preset_bench

        return run_preset_bench(options, Terminal())
    return run_memory_bench(options, config.size, config.batch_size or 1, Terminal())


def readable(result: dict) -> dict:
    """A result with what is read, a line each: its table, its sentences, and what was left out."""
    lists = {key: "\n".join(result[key]) for key in ("claims",) if key in result}
    if "skipped" in result:
        lists["skipped"] = "\n".join(f"{name}: {reason}" for name, reason in result["skipped"].items())
    lines = {key: f"\n{text}" for key, text in lists.items() if text}
    return {**result, "rows": len(result["rows"]), **lists, **lines, "table": f"\n{result['table']}"}


def run_sized(config: BenchConfig, arguments: argparse.Namespace) -> dict:
    """A comparison of processes, or several on a GPU; without --json only what is read, a line each."""
    steps = read_flags(arguments, StepConfig, "step_")
    if config.name == GPU:
        result = run_gpu_bench(read_flags(arguments, GpuConfig, "gpu_"), steps, arguments.comfyui, Terminal())
    else:
        sizes = {"size": config.size, "rounds": config.rounds, "batch_size": config.batch_size or 1}
        result = run_comparison(config.name, steps, comfyui=arguments.comfyui, callbacks=Terminal(), **sizes)
    if arguments.json:
        return result
    skipped = [f"{variant}: {reason}" for variant, reason in result["skipped"].items()]
    lines = {"claims": "\n" + "\n".join(result["claims"]), "left out": "\n" + "\n".join(skipped)}
    return {"table": f"\n{result['table']}", **lines, "chart": result["chart"]}


def run_lora(arguments: argparse.Namespace) -> dict:
    """The comparison of LoRA trainers; without --json only its table and its sentences, a line each."""
    result = run_lora_bench(read_flags(arguments, LoraBenchConfig, "lora_"), arguments.comfyui, Terminal())
    sentences = {key: "\n" + "\n".join(result[key]) for key in ("findings", "differences")}
    return result if arguments.json else {"table": f"\n{result['table']}", **sentences}


def parser() -> argparse.ArgumentParser:
    """The command line: a name, and the flags of every benchmark and study."""
    top = argparse.ArgumentParser(prog="run.py bench", description="Measure variants side by side on the demo model.")
    top.add_argument("--verbose", action="store_true")
    top.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    top.add_argument("name", nargs="?", default="", help="which one; without a name they are listed")
    add_flags(top, BenchConfig, skip=("name",))
    add_flags(top, StudyConfig, skip=("batch_size",))
    add_flags(top, DemoModelConfig)
    add_flags(top, LoraBenchConfig, "lora_")
    add_flags(top, MemoryConfig, "memory_")
    add_flags(top, DataConfig, "data_")
    add_flags(top, StepConfig, "step_")
    add_flags(top, GpuConfig, "gpu_")
    add_flags(top, RewardBenchConfig, skip=("rounds", "batch_size"))
    top.add_argument("--comfyui", type=Path, help="ComfyUI whose Train LoRA is measured; a tokenizer of rewards")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    return run_verb(bench, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
