"""How the projection of a new text encoder should start: steps of retraining until the old one is nearly reached."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..training.commands.open_model import ModelConfig, build_model, with_t5
from ..training.common.files import read_json, write_json
from ..training.models.protocols import TextToImage
from .study import Study, Trial, format_mean

STARTS = ("orthogonal", "truncate", "fitted")
RATE = 1.5e-3
EMA_DECAY = 0.99
STRETCH = 12
"""A run is given up after this many times `steps`."""
SHARE = 0.8
"""Of the CLIP's alignment: what counts as nearly reached."""
STEPS = f"steps to {SHARE:.0%} of CLIP"
ATTRIBUTES = f"steps to {SHARE:.0%} of CLIP's single attributes"


def figures(trial: Trial) -> dict[str, float | None]:
    """One start, trained or frozen, one seed: cross-attention is retrained and judged every `steps`, as an average.

    The rate is constant, so that a run asked for more steps goes on as if it had been asked for them at once; the
    average of the weights stands in for a rate that falls. Between two judgements the alignment is taken as a line.
    """
    start, frozen = trial.labels["projection"], trial.labels["then"] == "frozen"
    kind = "orthogonal" if start == "fitted" else start
    description = ModelConfig(model="demo", t5="demo", projection=kind, projection_seed=trial.seed)
    captions = trial.dataset.captions if start == "fitted" else ()

    encoder = with_t5(build_model(ModelConfig(model="demo")), description, captions).text_encoder

    def fresh() -> TextToImage:
        return replace(build_model(ModelConfig(model="demo")), text_encoder=encoder)

    def after(steps: int) -> TextToImage:
        return trial.train(
            fresh,
            steps=steps,
            rate=RATE,
            schedule="constant",
            ema_decay=EMA_DECAY,
            train="cross-attention",
            train_projection=not frozen,
        )

    clip, stride = clip_figures(trial), trial.config.steps
    wanted = SHARE * clip["alignment"]
    curve = trial.folder / "judged" / trial.results.name
    judged = read_json(curve) if curve.exists() else [(0, trial.measure(fresh()))]
    while judged[-1][1]["alignment"] < wanted and len(judged) <= STRETCH:
        steps = len(judged) * stride
        judged.append((steps, trial.measure(after(steps))))
        write_json(curve, judged)
    reached = crossing([(steps, found["alignment"]) for steps, found in judged], wanted)
    single = crossing([(steps, found["attributes"]) for steps, found in judged], SHARE * clip["attributes"])
    (_, untrained), (_, early) = judged[:2] if len(judged) > 1 else judged * 2
    return {
        STEPS: reached,
        "reached": float(reached is not None),
        ATTRIBUTES: single,
        "alignment untrained": untrained["alignment"],
        **{f"{name} after {stride} steps": early[name] for name in ("alignment", "loss")},
        "alignment at the end": judged[-1][1]["alignment"],
    }


def crossing(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Where the line through (position, height) points first comes to a height, or None where it does not."""
    (position, height), *_ = points
    if height >= wanted:
        return float(position)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= wanted:
            return x0 + (x1 - x0) * (wanted - y0) / (y1 - y0)
    return None


def clip_figures(trial: Trial) -> dict[str, float]:
    """What the model with its own CLIP gives on the same captions, measured once for the study."""
    path = trial.folder / "clip.json"
    if not path.exists():
        write_json(path, trial.measure(build_model(ModelConfig(model="demo"))))
    return read_json(path)


def findings(rows: Sequence[Mapping]) -> list[str]:
    """The starts in order of how soon they reached it, and those that did not always."""
    words = []
    always = [row for row in rows if row["reached"] == 1]
    for row in sorted(always, key=lambda row: row[STEPS]):
        words.append(f"{row['projection']}, then {row['then']}: {format_mean(row, STEPS)} steps.")
    for row in rows:
        if row["reached"] < 1:
            words.append(f"{row['projection']}, then {row['then']}: reached by {row['reached']:.0%} of its trials.")
    return words


STUDY = Study(
    about="Steps until retrained cross-attention reaches 80 % of the CLIP's alignment, by how the projection starts.",
    cells=[{"projection": start, "then": then} for start in STARTS for then in ("trained", "frozen")],
    figures=figures,
    findings=findings,
)
