"""The demo: the T5 swap from end to end on the demo model, with a judge reading every picture.

The model's CLIP is replaced by a T5 it has never heard, the attention that reads text is reset and retrained on image
files with captions, and held-out captions are drawn and judged before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..build import ModelConfig, apply_weights, build_model
from ..config import SamplePrompts, TrainingSettings, TrainModelConfig
from ..data.folder import FolderConfig, load_folder
from ..data.images import save_png
from ..generate import draw
from ..loop import Callbacks
from ..model import TextToImage
from ..report import write_report
from ..run_folder import RunFolder, write_json, write_text
from ..train_model import TrainedModel, read_trained, train_model
from .judge import alignment
from .scenes import caption, demo_examples, held_out_scenes

LOOK = {"width": 128, "height": 128, "steps": 20, "cfg": 4.0, "seed": 7}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's size; the defaults take about six minutes on two CPU cores."""

    output: Path = Path("output") / "retune"
    """Folder of all runs."""
    run_name: str = "demo T5 swap"
    """Folder name of the run."""
    images: int = 1000
    """Pictures drawn for training."""
    judged: int = 200
    """Held-out captions drawn and judged, each time."""
    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 32
    """Pictures per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Names the pictures and every random draw."""
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
            settings=TrainingSettings(warmup_steps=20, save_every=50),
            samples=SamplePrompts(prompts=prompts, every=max(self.steps // 4, 1), **LOOK),
            resume="restart" if self.restart else "auto",
        )


def held_out_captions(count: int) -> list[str]:
    """Captions of combinations that no training picture shows."""
    from ..generators import generator

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
    say = callbacks.on_text
    pictures = config.output / ".demo" / f"pictures {config.images} {config.seed}"
    write_pictures(pictures, config.images, config.seed, say)
    original = build_model(ModelConfig(model="demo"))
    with_clip, shown_clip = judge(original, config.judged, say, "with CLIP")
    swapped = build_model(ModelConfig(model="demo", t5="demo", reset="cross-attention"))
    with_t5, shown_t5 = judge(
        replace(original, text_encoder=swapped.text_encoder), config.judged, say, "with T5, untrained"
    )
    dataset = load_folder(FolderConfig(folder=pictures, resolution=128), lambda done, total, text: say(text))
    trained = train_model(swapped, dataset, config.training(), config.output, callbacks)
    result, shown = judge(
        apply_weights(swapped, trained.unet, trained.projection), config.judged, say, "with T5, trained"
    )
    rows = {"CLIP": with_clip, "T5, untrained": with_t5, "T5, trained": result}
    shown_by = {"CLIP": shown_clip, "T5, untrained": shown_t5, "T5, trained": shown}
    return _report(config, trained, rows, shown_by, time.monotonic() - began)


def run_judged(run: Path, count: int, callbacks: Callbacks) -> dict:
    """Judges a finished run of the demo's T5 swap, wherever it was trained, with its CLIP and untrained rivals."""
    config = DemoConfig(output=run.parent, run_name=run.name, judged=count)
    say = callbacks.on_text
    original = build_model(ModelConfig(model="demo"))
    with_clip, shown_clip = judge(original, count, say, "with CLIP")
    swapped = build_model(ModelConfig(model="demo", t5="demo", reset="cross-attention"))
    with_t5, shown_t5 = judge(replace(original, text_encoder=swapped.text_encoder), count, say, "with T5, untrained")
    trained = read_trained(run / "model.safetensors")
    result, shown = judge(apply_weights(swapped, trained.unet, trained.projection), count, say, "with T5, trained")
    rows = {"CLIP": with_clip, "T5, untrained": with_t5, "T5, trained": result}
    shown_by = {"CLIP": shown_clip, "T5, untrained": shown_t5, "T5, trained": shown}
    return _report(config, trained, rows, shown_by, 0.0)


def _report(
    config: DemoConfig, trained: TrainedModel, rows: dict[str, dict], shown: dict[str, list[Tensor]], seconds: float
) -> dict:
    captions = held_out_captions(16)
    table = [{"text encoder": name, **figures} for name, figures in rows.items()]
    pictures = {name: list(zip(captions, images, strict=False)) for name, images in shown.items()}
    folder = RunFolder(trained.path.parent)
    title = f"Held-out captions read back right by the judge (of {config.judged})"
    report = write_report(folder, {title: table}, pictures)
    return {
        "alignment_clip": rows["CLIP"]["alignment"],
        "alignment_t5_untrained": rows["T5, untrained"]["alignment"],
        "alignment_t5_trained": rows["T5, trained"]["alignment"],
        "seconds": round(seconds, 1),
        "report": str(report.resolve()),
    }
