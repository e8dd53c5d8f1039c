"""What the demo model draws of what it is told: attributes, words of quality, and what an ideal prompt gains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.commands.demo import DRAW_OPTIONS, captions_of
from ..training.commands.open_model import build_demo_model
from ..training.common.callbacks import Callbacks
from ..training.config.checks import check_range
from ..training.demo.judge import ALIGNMENT, alignment
from ..training.demo.quality import quality_shares
from ..training.demo.scenes import ATTRIBUTES, QUALITIES, QUALITY_WORDS, Scene, held_out_scenes, with_words
from ..training.models.protocols import TextToImage
from ..training.rewards.load import RewardConfig, load_reward
from ..training.sampling.generate import draw

DESCRIPTION = "attributes and quality words that the demo model draws right, and the aesthetic of each (500 captions)"
IDEAL = tuple(high for _, high in QUALITIES.values())
"""The words of a prompt that praises every quality."""
BATCH = 50


@dataclass(frozen=True, kw_only=True)
class DemoModelConfig:
    """How much is drawn."""

    captions: int = 500
    """Held-out captions, drawn without words of quality and with each of them."""

    def __post_init__(self) -> None:
        check_range(self, captions=(2, 10**5))


@dataclass(frozen=True)
class Drawn:
    """Pictures of scenes, and how they are scored.

    Attributes:
        scores: (N,) the demo's aesthetic of each picture.
        figures: Of `alignment`, and of `quality_shares` where the scenes have quality words.
    """

    scores: Tensor
    figures: dict[str, float]


def draw_and_judge(model: TextToImage, scenes: Sequence[Scene], callbacks: Callbacks, name: str) -> Drawn:
    """Draws a caption of each scene from the noise that its place has, and reads the pictures."""
    captions = captions_of(scenes)

    def report(done: int, total: int) -> None:
        callbacks.on_text(f"{name}: drawing {done} of {total}")

    images = draw(model, captions, **DRAW_OPTIONS, batch_size=BATCH, on_batch=report)
    return Drawn(aesthetic_of(images), alignment(images, captions) | quality_shares(images, scenes))


@torch.no_grad()
def aesthetic_of(images: Sequence[Tensor]) -> Tensor:
    """(N,) scores of the demo's aesthetic head."""
    reward = load_reward(RewardConfig(kind="demo aesthetic"))
    batches = torch.stack(list(images)).split(BATCH)
    return torch.cat([reward.scores(batch, [""] * len(batch)) for batch in batches])


def run_demo_model_bench(config: DemoModelConfig, callbacks: Callbacks) -> dict:
    """Measures the demo model with its CLIP.

    Returns:
        "rows", one for each attribute, quality word, and the ideal prompt; and "table", the same as text.
    """
    model, count = build_demo_model(), config.captions
    scenes = held_out_scenes(count, 1)
    plain = draw_and_judge(model, scenes, callbacks, "no quality word")
    rows = [_row(name, plain.figures[name], count, plain.scores) for name in (ALIGNMENT, *ATTRIBUTES)]
    for word in QUALITY_WORDS:
        drawn = draw_and_judge(model, [with_words(scene, [word]) for scene in scenes], callbacks, word)
        rows.append(_row(word, drawn.figures[word], count, drawn.scores, drawn.figures[ALIGNMENT]))
    praised = draw_and_judge(model, [with_words(scene, IDEAL) for scene in scenes], callbacks, "ideal")
    share = min(praised.figures[word] for word in IDEAL)
    rows.append(_row(", ".join(IDEAL), share, count, praised.scores, praised.figures[ALIGNMENT]))
    gain, error = paired_gain(plain, praised)
    sentence = f"The ideal prompt raises the aesthetic by {gain:.2f} ± {error:.2f} standard deviations."
    return {"rows": rows, "gain": gain, "gain error": error, "table": f"{_table(rows)}\n\n{sentence}"}


def paired_gain(before: Drawn, after: Drawn) -> tuple[float, float]:
    """The mean rise of the aesthetic from equal noise, and its standard error, in standard deviations of `before`."""
    rise = (after.scores - before.scores) / before.scores.std()
    return rise.mean().item(), rise.std().item() / math.sqrt(len(rise))


def _row(name: str, share: float, count: int, scores: Tensor, aligned: float | None = None) -> dict:
    return {
        "said": name,
        "read right": share,
        "error": math.sqrt(max(share * (1 - share), 0.25 / count) / count),
        "alignment": aligned,
        "aesthetic": float(scores.mean()),
        "aesthetic error": float(scores.std()) / math.sqrt(len(scores)),
    }


def _table(rows: Sequence[dict]) -> str:
    lines = ["| said | read right | alignment | aesthetic |", "|---|---|---|---|"]
    for row in rows:
        aligned = "" if row["alignment"] is None else f"{row['alignment']:.2f}"
        aesthetic = f"{row['aesthetic']:.2f} ± {row['aesthetic error']:.2f}"
        lines.append(f"| {row['said']} | {row['read right']:.3f} ± {row['error']:.3f} | {aligned} | {aesthetic} |")
    return "\n".join(lines)
