"""Builds the demo model: `python -m retune.tools.build_demo`.

Trains the parts one after the other and writes `training/demo/weights/`. Each part keeps its state in the work folder
and goes on where it stopped when the command is run again.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

PARTS = ("vae", "decoder", "t5", "scorer", "clip_unet", "loras", "embeddings", "text_encoders")
LOG = logging.getLogger(__name__)


def build(part: str, work: Path) -> None:
    """Trains one part and writes its files."""
    if part == "vae":
        from .vae import train_vae

        train_vae(work)
    if part == "decoder":
        from .decoder import train_decoder

        train_decoder(work)
    if part == "t5":
        from .t5 import train_t5

        train_t5(work)
    if part == "scorer":
        from .scorer import train_scorer

        train_scorer(work)
    if part == "clip_unet":
        from .unet import train_unet

        train_unet(work)
    if part == "loras":
        from .loras import train_loras

        train_loras(work / "loras")
    if part == "embeddings":
        from .embeddings import train_embeddings

        train_embeddings(work / "embeddings")
    if part == "text_encoders":
        from .text_encoders import tune_text_encoders

        tune_text_encoders(work / "text_encoders")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains the demo model's parts and writes its weights.")
    parser.add_argument("--part", choices=PARTS, help="one part only (default: all, in order)")
    parser.add_argument("--work", type=Path, default=Path("output/demo_build"), help="folder for unfinished work")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; figures in the README are from 2")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for part in [arguments.part] if arguments.part else PARTS:
        LOG.info("building %s", part)
        build(part, arguments.work)


if __name__ == "__main__":
    main()
