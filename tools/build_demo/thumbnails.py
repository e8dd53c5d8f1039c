"""Draws the thumbnails of the example workflows: what each example does to the demo model's pictures.

`python -m retune.tools.build_demo.thumbnails` draws those that the shipped files suffice for. "Swap the text encoder
for T5" and "Reward-tune the text encoder" also need a run of the example each: `--t5 <run> --reward <run>`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...benchmarks.word_study import with_word
from ...training.commands.demo import DRAW_OPTIONS
from ...training.commands.open_model import apply_weights, build_demo_model
from ...training.common.files import write_tensors
from ...training.data.images import contact_sheet, to_pil
from ...training.demo.editions import BASE
from ...training.demo.files import weights_path
from ...training.formats.embedding import read_embedding
from ...training.formats.embedding_fit import assign_to_encoders
from ...training.models.concepts import Concept
from ...training.models.protocols import TextToImage
from ...training.recipes.apply_results import with_tuned
from ...training.recipes.unet import read_trained_model
from ...training.sampling.generate import draw
from ...training.text_encoder.stock_file import read_stock_file

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
SIDE, LABEL_HEIGHT, GAP = 480, 40, 8
"""Pixels of one panel, of the label below it, and between two panels."""
IMAGES, COLUMNS = 4, 2
CIRCLES = "two large blue circles on the left, grey background"
FIGURES = "two large red figures on the left, white background"
Panel = tuple[str, Callable[[], TextToImage], str]
"""A label, the model, and the prompt that it draws; all panels of a thumbnail start from the same noise."""


def panels_of(t5: str = "", reward: str = "") -> dict[str, Sequence[Panel]]:
    """The panels of each example's thumbnail, from left to right. t5, reward: the folders of the examples' runs."""
    style, crescents = (str(weights_path(f"loras/{name}.safetensors")) for name in ("warm edges", "crescents"))
    word = "two small red {} at the top, white background".format
    hearts = [("figures", build_demo_model, word("figures")), ("<heart>", with_heart, word("<heart>"))]
    panels: dict[str, Sequence[Panel]] = {
        "Apply several LoRAs": _compared("two LoRAs", lambda: tuned(style, crescents), FIGURES),
        "Train a style LoRA": _compared("style LoRA", lambda: tuned(style), CIRCLES),
        "Use embeddings in prompts": hearts,
        "Train a textual inversion from five images": hearts,
        "Blend tuned encoders": [(f"{x:.0%} tuned", lambda x=x: with_glossy(x), CIRCLES) for x in (0.0, 0.5, 1.0)],
    }
    if t5:
        panels["Swap the text encoder for T5"] = [
            ("T5, untrained", lambda: build_demo_model(t5="demo"), CIRCLES),
            ("T5, trained", lambda: apply_weights(build_demo_model(t5="demo"), read_trained_model(Path(t5))), CIRCLES),
        ]
    if reward:
        panels["Reward-tune the text encoder"] = _compared("tuned", lambda: tuned(reward), CIRCLES)
    return panels


def _compared(label: str, model: Callable[[], TextToImage], prompt: str) -> list[Panel]:
    return [("original", build_demo_model, prompt), (label, model, prompt)]


def tuned(*results: str) -> TextToImage:
    """The demo model with results of runs."""
    return with_tuned(build_demo_model(), list(results))


def with_heart() -> TextToImage:
    """The demo model that knows the shipped word."""
    model = build_demo_model()
    file = read_embedding(weights_path("embeddings/heart.safetensors"))
    return with_word(model, Concept("<heart>", assign_to_encoders(file, model.text_encoder.vocabularies)))


def with_glossy(share: float) -> TextToImage:
    """The demo model whose text encoder is by a share of 0 to 1 the shipped tuned one."""
    tensors, _ = read_stock_file(weights_path("text_encoders/glossy.safetensors"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.safetensors"
        named = {f"text_encoders.clip_l.transformer.{name}": value for name, value in tensors.items()}
        write_tensors(path, named, {BASE: build_demo_model().denoiser.fingerprint})
        return tuned(f"{path}:{share}")


def thumbnail(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side, their labels below."""
    picture = Image.new("RGB", (len(panels) * (SIDE + GAP) - GAP, SIDE + LABEL_HEIGHT), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=26)
    for column, (label, model, prompt) in enumerate(panels):
        left = column * (SIDE + GAP)
        picture.paste(to_pil(_sheet(model(), prompt)).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, 0))
        pen.text((left + SIDE / 2, SIDE + LABEL_HEIGHT / 2), label, "black", font, anchor="mm")
    return picture


def _sheet(model: TextToImage, prompt: str) -> Tensor:
    return contact_sheet(draw(model, [prompt] * IMAGES, **DRAW_OPTIONS), COLUMNS)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="thumbnails", description="Draws the examples' thumbnails.")
    parser.add_argument("--t5", default="", help="folder of a run of the example with T5, or of run.py demo")
    parser.add_argument("--reward", default="", help="folder of a run of the example of reward tuning")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the thumbnails are written")
    arguments = parser.parse_args()
    with torch.no_grad():
        for title, panels in panels_of(arguments.t5, arguments.reward).items():
            thumbnail(panels).save(arguments.folder / f"{title}.jpg", quality=90)


if __name__ == "__main__":
    main()
