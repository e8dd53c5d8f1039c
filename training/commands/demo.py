"""The demo: the T5 swap from end to end on the demo model, with a judge that reads every picture.

The model's CLIP is replaced by a T5 that it was not trained with. T5's projection is fitted to the CLIP in closed form
(or the cross-attention is reset), the cross-attention is retrained on image files with captions, and held-out captions
are drawn and judged before and after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.files import read_json, write_json, write_text
from ..common.rng import generator
from ..config.flags import add_flags, read_flags
from ..config.folder import FolderConfig
from ..config.model import ModelConfig
from ..config.run import TrainModelConfig
from ..config.sample_prompts import SamplePrompts
from ..config.training_settings import TrainingSettings
from ..data.folder import load_folder
from ..data.images import save_png
from ..demo.files import weights_path
from ..demo.judge import alignment
from ..demo.scenes import Scene, caption, demo_examples, held_out_scenes
from ..models.protocols import TextToImage
from ..recipes.unet import TrainedModel, read_trained_model, train_model
from ..runs.folder import RunFolder, move_aside
from ..runs.report import write_report
from ..sampling.generate import draw
from .open_model import apply_weights, build_demo_model, with_t5
from .terminal import Terminal
from .verb import Verb

DRAW_OPTIONS = {"width": 128, "height": 128, "steps": 12, "cfg": 2.5, "seed": 7}
"""How pictures to be judged are drawn: arguments of `draw`."""
FITTED = 1200
"""Captions that the projection is fitted on, of those of all pictures: a linear map needs no more."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's size; the defaults run about six minutes on two CPU cores."""

    output: Path = Path("output") / "retune"
    """Folder of all runs."""
    run_name: str = "demo T5 swap"
    """Folder name of the run."""
    images: int = 1200
    """Pictures drawn for training."""
    judged: int = 200
    """Held-out captions drawn and judged, each time."""
    steps: int = 480
    """Optimiser steps."""
    batch_size: int = 32
    """Pictures per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of the pictures and of every random draw."""
    start: Literal["fit", "reset", "distil"] = "fit"
    """fit: the projection is fitted to the old CLIP in closed form, no layer is reset. reset: random projection, reset
    layers. distil: a small network learns the CLIP's outputs from captions first, two to three minutes."""
    restart: bool = False
    """Start again instead of resuming an unfinished run."""

    def training(self) -> TrainModelConfig:
        """The retraining's config, as the train node would make it."""
        prompts = tuple(held_out_captions(8))
        return TrainModelConfig(
            run_name=self.run_name,
            train="cross-attention",
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            settings=TrainingSettings(warmup_steps=20, save_every=50, loss_weighting="none"),
            samples=SamplePrompts(prompts=prompts, every=0, **DRAW_OPTIONS),
            resume="restart" if self.restart else "auto",
        )


def held_out_captions(count: int) -> list[str]:
    """Captions of held-out combinations, which no training picture has."""
    return captions_of(held_out_scenes(count, 1))


def captions_of(scenes: Sequence[Scene]) -> list[str]:
    """A caption of each scene, whose wording depends on its place."""
    return [caption(scene, generator(1, "judged", i)) for i, scene in enumerate(scenes)]


def write_pictures(folder: Path, count: int, seed: int, on_text: Callable[[str], None]) -> None:
    """Draws captioned training pictures as PNG and .txt files, unless the folder has them already."""
    done = folder / ".complete.json"  # hidden, so that it is not named as a file that is no picture
    if done.exists():
        return
    on_text(f"drawing {count} training pictures")
    images, captions = demo_examples(count, seed, "")
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, text) in enumerate(zip(images, captions, strict=True)):
        save_png(image, folder / f"{index:05d}.png")
        write_text(folder / f"{index:05d}.txt", text)
    write_json(done, {"count": count, "seed": seed})


def judge_model(model: TextToImage, count: int, on_text: Callable[[str], None], name: str) -> tuple[dict, list[Tensor]]:
    """Draws held-out captions and judges the pictures.

    Args:
        count: How many captions.
        name: What to call the model in the progress texts.

    Returns:
        `alignment` of the pictures, and the pictures, (3, 128, 128) in 0..1 each.
    """
    captions = held_out_captions(count)

    def progress(done: int, total: int) -> None:
        on_text(f"{name}: drawing {done} of {total}")

    images = draw(model, captions, **DRAW_OPTIONS, batch_size=50, on_batch=progress)
    return alignment(images, captions), images


def run_demo(config: DemoConfig, callbacks: Callbacks) -> dict:
    """Runs the whole demo; returns the figures of `judge_run`."""
    began = time.monotonic()
    set_outdated_run_aside(config.output, config.run_name)
    pictures = config.output / ".demo" / f"pictures {config.images} {config.seed} {assets_fingerprint()}"
    write_pictures(pictures, config.images, config.seed, callbacks.on_text)
    folder = FolderConfig(folder=pictures, resolution=128)
    dataset = load_folder(folder, lambda done, total, text: callbacks.on_text(text))
    model = swap_text_encoder(config, dataset.captions)
    trained = train_model(model, dataset, config.training(), config.output, callbacks)
    return judge_run(trained.path.parent, config, callbacks, began)


def assets_fingerprint() -> str:
    """A hash of the demo's weights and of how its pictures are drawn."""
    drawn = demo_examples(1, 0)[0].numpy().tobytes()
    files = (weights_path(name).read_bytes() for name in ("demo.safetensors", "t5.safetensors"))
    return sha256(b"".join([drawn, *files])).hexdigest()[:8]


def set_outdated_run_aside(runs: Path, name: str) -> None:
    """Moves a run aside that other demo weights, drawings or defaults made: the demo could not resume it."""
    size = {field: getattr(DemoConfig, field) for field in ("images", "steps", "batch_size", "learning_rate")}
    record, current = runs / ".demo" / f"{name}.json", {"edition": assets_fingerprint(), "defaults": size}
    if record.exists() and read_json(record) != current:
        move_aside(runs / name)
    write_json(record, current)


def swap_text_encoder(config: DemoConfig, captions: Sequence[str]) -> TextToImage:
    """The demo model with T5 in place of CLIP, before training; captions: what the projection is fitted on."""
    if config.start == "reset":
        return build_demo_model(t5="demo", reset="cross-attention")
    method = "distillation" if config.start == "distil" else "mean-covariance"
    fit_on = captions if config.start == "distil" else captions[:FITTED]
    return with_t5(build_demo_model(), ModelConfig(model="demo", t5="demo", fit_method=method), fit_on)


def judge_run(run: Path, config: DemoConfig, callbacks: Callbacks, began: float) -> dict:
    """Judges a finished run of the T5 swap, wherever it was trained, against CLIP and against the untrained T5.

    Args:
        run: Folder of the run.
        began: `time.monotonic()` at the start of the demo.

    Returns:
        The alignment of all three, "seconds", and "report", the path of the page to open.
    """
    trained = read_trained_model(run)
    models: dict[str, Callable[[], TextToImage]] = {
        "CLIP": build_demo_model,
        "T5, untrained": lambda: build_demo_model(t5="demo"),
        "T5, trained": lambda: apply_weights(build_demo_model(t5="demo"), trained),
    }
    figures, images = {}, {}
    for name, build in models.items():
        count = -(-config.judged // 4) if name == "T5, untrained" else config.judged  # which draws none of them right
        figures[name], images[name] = judge_model(build(), count, callbacks.on_text, name)
    report = _write_report(trained, figures, images)
    return {
        "alignment_clip": figures["CLIP"]["alignment"],
        "alignment_t5_untrained": figures["T5, untrained"]["alignment"],
        "alignment_t5_trained": figures["T5, trained"]["alignment"],
        "seconds": round(time.monotonic() - began, 1),
        "report": str(report.resolve()),
    }


def _write_report(trained: TrainedModel, figures: dict[str, dict], images: dict[str, list[Tensor]]) -> Path:
    captions = held_out_captions(16)
    table = [{"text encoder": name, "captions": len(images[name]), **row} for name, row in figures.items()]
    pictures = {name: list(zip(captions, drawn, strict=False)) for name, drawn in images.items()}
    title = "Share of held-out captions that the judge read back right"
    return write_report(RunFolder(trained.path.parent), {title: table}, pictures)


def run_demo_verb(arguments: argparse.Namespace) -> dict:
    """The verb: the demo here, or as a workflow in a ComfyUI."""
    config = read_flags(arguments, DemoConfig)
    if arguments.comfyui:
        from .demo_in_comfyui import run_demo_in_comfyui

        return run_demo_in_comfyui(config, arguments.comfyui, Terminal())
    return run_demo(config, Terminal())


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DemoConfig)
    parser.add_argument("--comfyui", type=Path, help="run it as a workflow in this ComfyUI, without a browser")


VERBS = {"demo": Verb("the T5 swap on the demo model, judged before and after", add_demo_flags, run_demo_verb)}
