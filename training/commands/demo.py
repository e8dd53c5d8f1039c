"""The demo: the T5 swap from end to end on the demo model, with a judge reading every picture.

The model's CLIP is replaced by a T5 it has never heard: its projection is fitted to the CLIP in closed form (or the
attention that reads text is reset), the cross-attention is retrained on image files with captions, and held-out
captions are drawn and judged before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.files import read_json, write_json, write_text
from ..config.run import TrainModelConfig
from ..config.sample_prompts import SamplePrompts
from ..config.training_settings import TrainingSettings
from ..data.folder import FolderConfig, load_folder
from ..data.images import save_png
from ..demo.files import weights_path
from ..demo.judge import alignment
from ..demo.scenes import caption, demo_examples, held_out_scenes
from ..models.protocols import TextToImage
from ..recipes.unet import TrainedModel, read_trained_model, train_model
from ..runs.folder import RunFolder, move_aside
from ..runs.report import write_report
from ..sampling.generate import draw
from .open_model import ModelConfig, apply_weights, build_model, with_t5

LOOK = {"width": 128, "height": 128, "steps": 12, "cfg": 2.5, "seed": 7}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's size; the defaults take about five minutes on two CPU cores."""

    output: Path = Path("output") / "retune"
    """Folder of all runs."""
    run_name: str = "demo T5 swap"
    """Folder name of the run."""
    images: int = 2000
    """Pictures drawn for training."""
    judged: int = 200
    """Held-out captions drawn and judged, each time."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 32
    """Pictures per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Names the pictures and every random draw."""
    start: Literal["fit", "reset"] = "fit"
    """fit: the projection comes near to the old CLIP, layers are kept. reset: random projection, reset layers."""
    restart: bool = False
    """Begin again instead of going on with an unfinished run."""

    def training(self) -> TrainModelConfig:
        """The retraining as the train node would be set."""
        prompts = tuple(held_out_captions(8))
        return TrainModelConfig(
            run_name=self.run_name,
            train="cross-attention",
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            settings=TrainingSettings(warmup_steps=20, save_every=50, loss_weighting="none"),
            samples=SamplePrompts(prompts=prompts, every=0, **LOOK),
            resume="restart" if self.restart else "auto",
        )


def held_out_captions(count: int) -> list[str]:
    """Captions of combinations that no training picture shows."""
    from ..common.rng import generator

    return [caption(scene, generator(1, "judged", i)) for i, scene in enumerate(held_out_scenes(count, 1))]


def write_pictures(folder: Path, count: int, seed: int, on_text: Callable[[str], None]) -> None:
    """Draws captioned training pictures as PNG and .txt files, unless the folder has them already."""
    done = folder / "complete.json"
    if done.exists():
        return
    on_text(f"drawing {count} training pictures")
    images, captions = demo_examples(count, seed, "")
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, text) in enumerate(zip(images, captions, strict=True)):
        save_png(image, folder / f"{index:05d}.png")
        write_text(folder / f"{index:05d}.txt", text)
    write_json(done, {"count": count, "seed": seed})


def judge(model: TextToImage, count: int, on_text: Callable[[str], None], what: str) -> tuple[dict, list[Tensor]]:
    """Shares of held-out captions that the judge reads back, and the pictures."""
    captions = held_out_captions(count)

    def said(done, total):
        on_text(f"{what}: drawing {done} of {total}")

    images = draw(model, captions, **LOOK, batch_size=50, on_batch=said)
    return alignment(images, captions), images


def run_demo(config: DemoConfig, callbacks: Callbacks) -> dict:
    """Runs the whole demo and returns its figures; `report` is the path of the page to open."""
    began = time.monotonic()
    make_way(config.output, config.run_name)
    pictures = config.output / ".demo" / f"pictures {config.images} {config.seed} {edition()}"
    write_pictures(pictures, config.images, config.seed, callbacks.on_text)
    folder = FolderConfig(folder=pictures, resolution=128)
    dataset = load_folder(folder, lambda done, total, text: callbacks.on_text(text))
    model = swapped_model(config, dataset.captions)
    trained = train_model(model, dataset, config.training(), config.output, callbacks)
    return run_judged(trained.path.parent, config, callbacks, began)


def edition() -> str:
    """Changes with the demo's weights and with how its pictures are drawn."""
    drawn = demo_examples(1, 0)[0].numpy().tobytes()
    files = (weights_path(name).read_bytes() for name in ("demo.safetensors", "t5.safetensors"))
    return sha256(b"".join([drawn, *files])).hexdigest()[:8]


def make_way(runs: Path, name: str) -> None:
    """Moves a run in the folder of all runs aside when it was made with another edition of the demo."""
    note, now = runs / ".demo" / f"{name}.json", {"edition": edition()}
    if note.exists() and read_json(note) != now:
        move_aside(runs / name)
    write_json(note, now)


def swapped_model(config: DemoConfig, captions: Sequence[str]) -> TextToImage:
    """The demo model with T5 in place of CLIP, as training starts on it."""
    if config.start == "reset":
        return build_model(ModelConfig(model="demo", t5="demo", reset="cross-attention"))
    model = build_model(ModelConfig(model="demo"))
    return with_t5(model, ModelConfig(model="demo", t5="demo"), captions)


def run_judged(run: Path, config: DemoConfig, callbacks: Callbacks, began: float) -> dict:
    """Judges a finished run of the T5 swap, wherever it was trained, beside CLIP and the untrained T5.

    began: `time.monotonic()` at the start. Returns the figures, then `seconds`, and `report` last.
    """
    original = build_model(ModelConfig(model="demo"))
    trained = read_trained_model(run)
    rows, shown = {}, {}
    for name in ("CLIP", "T5, untrained", "T5, trained"):
        model = original if name == "CLIP" else build_model(ModelConfig(model="demo", t5="demo"))
        if name == "T5, trained":
            model = apply_weights(model, trained)
        rows[name], shown[name] = judge(model, config.judged, callbacks.on_text, name)
    report = _report(config, trained, rows, shown)
    return {
        "alignment_clip": rows["CLIP"]["alignment"],
        "alignment_t5_untrained": rows["T5, untrained"]["alignment"],
        "alignment_t5_trained": rows["T5, trained"]["alignment"],
        "seconds": round(time.monotonic() - began, 1),
        "report": str(report.resolve()),
    }


def _report(config: DemoConfig, trained: TrainedModel, rows: dict[str, dict], shown: dict[str, list[Tensor]]) -> Path:
    captions = held_out_captions(16)
    table = [{"text encoder": name, **figures} for name, figures in rows.items()]
    pictures = {name: list(zip(captions, images, strict=False)) for name, images in shown.items()}
    folder = RunFolder(trained.path.parent)
    title = f"Held-out captions read back right by the judge (of {config.judged})"
    return write_report(folder, {title: table}, pictures)
