"""Which layers to reset for a new text encoder, at which learning rate: the source notes' observations, measured.

As in those notes, T5 and its random projection are frozen and the whole UNet trains; only the reset layers differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..training.commands.open_model import build_demo_model
from .study import Claim, Study, Trial, check_claims, format_mean

NOTHING = "nothing"
CROSS, ALL = "cross-attention", "all attention"
RESETS = (NOTHING, CROSS, "cross-attention K/V", "QK", "self-attention", ALL)
RATES = (2e-4, 6e-4, 2e-3)
"""A decade. The notes' 1e-5 to 4e-5 are for a UNet 200 times as large; this one was trained at 2e-3."""
LOW, HIGH = RATES[0], RATES[-1]
FIGURES = ("alignment", "attributes", "loss")
CLAIMS = (
    Claim("Cross-attention is useful at the low rate, more than all attention", (CROSS, LOW), (ALL, LOW), FIGURES),
    Claim("QK is poorer than cross-attention at the low rate", (CROSS, LOW), ("QK", LOW), FIGURES),
    Claim("QK is poorer than cross-attention at the high rate", (CROSS, HIGH), ("QK", HIGH), FIGURES),
    Claim("All attention needs the high rate", (ALL, HIGH), (ALL, LOW), FIGURES),
    Claim("Resetting cross-attention helps at the low rate", (CROSS, LOW), (NOTHING, LOW), FIGURES),
    Claim("Resetting cross-attention helps at the high rate", (CROSS, HIGH), (NOTHING, HIGH), FIGURES),
)
"""The first four are observations of the notes."""


def run_trial(trial: Trial) -> dict[str, float]:
    """Trains one reset at one rate from one seed, and measures the result."""
    reset = None if trial.labels["reset"] == NOTHING else trial.labels["reset"]
    trained = trial.train(
        lambda: build_demo_model(t5="demo", reset=reset, projection_seed=trial.seed, reset_seed=trial.seed),
        steps=trial.config.steps,
        rate=trial.labels["learning rate"],
        schedule="cosine",
        train="whole UNet",
        train_projection=False,
    )
    return trial.measure(trained)


def findings(rows: Sequence[Mapping]) -> list[str]:
    """A verdict on every claim whose cells are measured, and the best cell by alignment."""
    sentences = check_claims(CLAIMS, {(row["reset"], row["learning rate"]): row for row in rows})
    if rows:
        best = max(rows, key=lambda row: row["alignment"])
        where = f"{best['reset']} at {best['learning rate']:g}"
        sentences.append(f"Best alignment: reset of {where}, {format_mean(best, 'alignment')}.")
    return sentences


STUDY = Study(
    description="Alignment and loss by layers reset and learning rate; the whole UNet trains for a frozen T5.",
    cells=[{"reset": reset, "learning rate": rate} for rate in RATES for reset in RESETS],
    run_trial=run_trial,
    findings=findings,
)
