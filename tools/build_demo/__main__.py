"""Builds the demo model: `python -m retune.tools.build_demo`.

Trains the parts one after the other and writes `training/demo/weights/`, with their figures in its README. Each part
saves its state in the work folder; after a stop the same command goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from ...training.common.files import read_json, write_json
from .readme import write_readme

PARTS = {
    "vae": ("vae", "train_vae", ""),
    "t5": ("t5", "train_t5", ""),
    "scorer": ("scorer", "train_scorer", ""),
    "clip_unet": ("unet", "train_unet", ""),
    "loras": ("loras", "train_loras", "loras"),
    "embeddings": ("embeddings", "train_embeddings", "embeddings"),
    "text_encoders": ("text_encoders", "tune_text_encoders", "text_encoders"),
    "figures": ("figures", "measure_demo", ""),
}
"""Part -> its module, the function that trains it, and its subfolder of the work folder; in the order to build.

The function resumes from its state in that folder, writes the part's files, and returns its figures.
"""
LOG = logging.getLogger(__name__)


def build(part: str, work: Path) -> None:
    """Trains one of `PARTS`, and records its figures in `parts.json` of the folder `work`."""
    module, function, folder = PARTS[part]
    train = getattr(importlib.import_module(f".{module}", __package__), function)
    began = time.monotonic()
    figures = train(work / folder)
    figures.setdefault("seconds", time.monotonic() - began)
    about = {"date": datetime.now(UTC).date().isoformat(), "threads": torch.get_num_threads()}
    write_json(work / "parts.json", finished_parts(work) | {part: figures | about})
    LOG.info("%s: %s", part, figures)


def finished_parts(work: Path) -> dict[str, dict]:
    """Part -> its figures, seconds, date and threads, of those that are finished."""
    file = work / "parts.json"
    return read_json(file) if file.exists() else {}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="build_demo", description="Trains the demo model and writes its weights.")
    parser.add_argument("--part", choices=PARTS, help="one part only (default: those not finished, in order)")
    parser.add_argument("--work", type=Path, default=Path("output/demo_build"), help="folder for unfinished work")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; figures in weights/README.md are from 2")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for part in [arguments.part] if arguments.part else PARTS:
        if arguments.part or part not in finished_parts(arguments.work):
            LOG.info("building %s", part)
            build(part, arguments.work)
    write_readme(finished_parts(arguments.work))


if __name__ == "__main__":
    main()
