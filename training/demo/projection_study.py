"""How the projection of a new text encoder should start: steps of retraining until the old one is nearly reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..build import ModelConfig, build_model, with_t5
from ..files import read_json, write_json
from ..model import TextToImage
from .study import Study, Trial, in_words

STARTS = ("orthogonal", "truncate", "fitted")
RATE = 2e-3
SHARE = 0.8
"""Of the CLIP's alignment: what counts as nearly reached."""
STEPS = f"steps to {SHARE:.0%} of CLIP"


def figures(trial: Trial) -> dict[str, float | None]:
    """One start, trained or frozen, one seed: cross-attention is retrained and judged every sixth of `steps`.

    The rate is constant, so that a run asked for more steps goes on as if it had been asked for them at once.
    """
    start, frozen = trial.labels["projection"], trial.labels["then"] == "frozen"
    kind = "orthogonal" if start == "fitted" else start
    description = ModelConfig(model="demo", t5="demo", projection=kind, projection_seed=trial.seed)
    captions = trial.dataset.captions if start == "fitted" else ()

    encoder = with_t5(build_model(ModelConfig(model="demo")), description, captions).text_encoder

    def fresh() -> TextToImage:
        return replace(build_model(ModelConfig(model="demo")), text_encoder=encoder)

    wanted, stride = SHARE * clip_alignment(trial), max(1, trial.config.steps // 6)
    first = None
    for steps in range(stride, 3 * trial.config.steps + 1, stride):
        trained = trial.train(
            fresh,
            steps=steps,
            rate=RATE,
            schedule="constant",
            train="cross-attention",
            train_projection=not frozen,
        )
        found = trial.measured(trained)
        first = first or found
        if found["alignment"] >= wanted:
            break
    reached = found["alignment"] >= wanted
    early = {f"{name} after {stride} steps": first[name] for name in ("alignment", "loss")}
    return {STEPS: float(steps) if reached else None, "reached": float(reached), **early}


def clip_alignment(trial: Trial) -> float:
    """Alignment of the model's own CLIP on the same captions, measured once for the study."""
    path = trial.folder / "clip.json"
    if not path.exists():
        write_json(path, trial.measured(build_model(ModelConfig(model="demo"))))
    return read_json(path)["alignment"]


def findings(rows: Sequence[Mapping]) -> list[str]:
    """The starts in order of how soon they reached it, and those that did not always."""
    words = []
    always = [row for row in rows if row["reached"] == 1]
    for row in sorted(always, key=lambda row: row[STEPS]):
        words.append(f"{row['projection']}, then {row['then']}: {in_words(row, STEPS)} steps.")
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
