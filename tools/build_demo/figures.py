"""Measures the finished demo model, for the README of its weights."""

from __future__ import annotations

from pathlib import Path

from ...benchmarks.demo_model import DemoModelConfig, run_demo_model_bench
from ...training.common.callbacks import Callbacks


def measure_demo(work: Path) -> dict:
    """The rows and sentences of `python run.py bench demo-model`."""
    return run_demo_model_bench(DemoModelConfig(), Callbacks())
