"""Builds the demo model: `python -m retune.tools.build_demo`.

Trains the parts one after the other and writes `training/demo/weights/`. Each part saves its state in the work folder;
the same command resumes from there.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

import torch

PARTS = {
    "vae": ("vae", "train_vae", ""),
    "decoder": ("decoder", "train_decoder", ""),
    "t5": ("t5", "train_t5", ""),
    "scorer": ("scorer", "train_scorer", ""),
    "clip_unet": ("unet", "train_unet", ""),
    "loras": ("loras", "train_loras", "loras"),
    "embeddings": ("embeddings", "train_embeddings", "embeddings"),
    "text_encoders": ("text_encoders", "tune_text_encoders", "text_encoders"),
}
"""Part -> its module, the function that trains it, and its subfolder of the work folder; in the order to build."""
LOG = logging.getLogger(__name__)


def build(part: str, work: Path) -> None:
    """Trains one of `PARTS` and writes its files; resumes from its state in the folder `work`."""
    module, function, folder = PARTS[part]
    train = getattr(importlib.import_module(f".{module}", __package__), function)
    train(work / folder)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="build_demo", description="Trains the demo model and writes its weights.")
    parser.add_argument("--part", choices=PARTS, help="one part only (default: all, in order)")
    parser.add_argument("--work", type=Path, default=Path("output/demo_build"), help="folder for unfinished work")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; figures in weights/README.md are from 2")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for part in [arguments.part] if arguments.part else PARTS:
        LOG.info("building %s", part)
        build(part, arguments.work)


if __name__ == "__main__":
    main()
