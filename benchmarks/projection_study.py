"""How the projection of a new text encoder should start: steps of retraining to 80 % of the old alignment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..training.commands.open_model import ModelConfig, build_demo_model, with_t5
from ..training.common.files import read_json, write_json
from ..training.models.protocols import TextToImage
from .study import Study, Trial, format_mean

STARTS = ("orthogonal", "truncate", "fitted")
RATE = 1.5e-3
EMA_DECAY = 0.99
STRETCH = 12
"""A run is given up after this many times `steps`."""
SHARE = 0.8
"""Share of the CLIP's alignment that is to be reached."""
STEPS = f"steps to {SHARE:.0%} of CLIP"
ATTRIBUTES = f"steps to {SHARE:.0%} of CLIP's single attributes"


def run_trial(trial: Trial) -> dict[str, float | None]:
    """Retrains cross-attention for one start of the projection, trained or frozen, from one seed.

    The model, with the average of its weights, is judged every `steps`; between two judgements the alignment counts as
    a straight line. The rate is constant, so that a run extended by more steps equals one that asked for them at once;
    the average of the weights stands in for a falling rate.
    """
    start, frozen = trial.labels["projection"], trial.labels["then"] == "frozen"
    encoder = _start(trial, start).text_encoder

    def make_model() -> TextToImage:
        return replace(build_demo_model(), text_encoder=encoder)

    def train(steps: int) -> TextToImage:
        return trial.train(
            make_model,
            steps=steps,
            rate=RATE,
            schedule="constant",
            ema_decay=EMA_DECAY,
            train="cross-attention",
            train_projection=not frozen,
        )

    clip, stride = clip_figures(trial), trial.config.steps
    target = SHARE * clip["alignment"]
    curve = trial.folder / "judged" / trial.results.name
    judged = read_json(curve) if curve.exists() else [(0, trial.measure(make_model()))]
    while judged[-1][1]["alignment"] < target and len(judged) <= STRETCH:
        steps = len(judged) * stride
        judged.append((steps, trial.measure(train(steps))))
        write_json(curve, judged)
    return _summary(judged, clip, stride)


def _start(trial: Trial, start: str) -> TextToImage:
    """The demo model with T5 in place of CLIP, before training."""
    kind = "orthogonal" if start == "fitted" else start
    config = ModelConfig(model="demo", t5="demo", projection=kind, projection_seed=trial.seed)
    return with_t5(build_demo_model(), config, trial.dataset.captions if start == "fitted" else ())


def _summary(judged: Sequence[tuple[int, Mapping]], clip: Mapping[str, float], stride: int) -> dict[str, float | None]:
    reached = crossing([(steps, found["alignment"]) for steps, found in judged], SHARE * clip["alignment"])
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


def crossing(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The x at which the line through (x, y) points first reaches y = target, or None where it does not."""
    (x, y), *_ = points
    if y >= target:
        return float(x)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def clip_figures(trial: Trial) -> dict[str, float]:
    """The same measurements of the model with its original CLIP, done once for the study."""
    path = trial.folder / "clip.json"
    if not path.exists():
        write_json(path, trial.measure(build_demo_model()))
    return read_json(path)


def findings(rows: Sequence[Mapping]) -> list[str]:
    """The starts in order of the steps they took, then those of which some trials never reached the target."""
    sentences = []
    always = [row for row in rows if row["reached"] == 1]
    for row in sorted(always, key=lambda row: row[STEPS]):
        sentences.append(f"{row['projection']}, then {row['then']}: {format_mean(row, STEPS)} steps.")
    for row in rows:
        if row["reached"] < 1:
            sentences.append(f"{row['projection']}, then {row['then']}: reached by {row['reached']:.0%} of its trials.")
    return sentences


STUDY = Study(
    description="Steps until retrained cross-attention reaches 80 % of the CLIP's alignment, by projection start.",
    cells=[{"projection": start, "then": then} for start in STARTS for then in ("trained", "frozen")],
    run_trial=run_trial,
    findings=findings,
)
