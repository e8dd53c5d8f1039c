"""Which layers to reset for a new text encoder, at which learning rate: the source notes' observations, measured.

As there, T5 and its random projection are frozen and the whole UNet trains; only what is reset differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..training.commands.open_model import ModelConfig, build_model
from .study import Study, Trial, format_mean, verdict

NOTHING = "nothing"
RESETS = (NOTHING, "cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention")
RATES = (2e-4, 6e-4, 2e-3)
"""A decade. The notes' 1e-5 to 4e-5 are for a UNet 200 times as large; this one was trained at 2e-3."""


def figures(trial: Trial) -> dict[str, float]:
    """One reset, one rate, one seed."""
    reset = None if trial.labels["reset"] == NOTHING else trial.labels["reset"]
    seeds = {"projection_seed": trial.seed, "reset_seed": trial.seed}
    description = ModelConfig(model="demo", t5="demo", reset=reset, **seeds)
    trained = trial.train(
        lambda: build_model(description),
        steps=trial.config.steps,
        rate=trial.labels["learning rate"],
        schedule="cosine",
        train="whole UNet",
        train_projection=False,
    )
    return trial.measure(trained)


def findings(rows: Sequence[Mapping]) -> list[str]:
    """What the rows say of the notes' three observations, and which row is best; only what is measured already."""
    found = {(row["reset"], row["learning rate"]): row for row in rows}
    low, high = RATES[0], RATES[-1]
    claims = (
        (
            "Cross-attention is useful at the low rate, more than all attention",
            ("cross-attention", low),
            ("all attention", low),
        ),
        ("QK is poor at the low rate, beside cross-attention", ("cross-attention", low), ("QK", low)),
        ("QK is poor at the high rate, beside cross-attention", ("cross-attention", high), ("QK", high)),
        ("All attention needs the high rate", ("all attention", high), ("all attention", low)),
        ("Resetting cross-attention helps at the low rate", ("cross-attention", low), (NOTHING, low)),
        ("Resetting cross-attention helps at the high rate", ("cross-attention", high), (NOTHING, high)),
    )
    words = []
    for claim, better, worse in claims:
        if better in found and worse in found:
            pair = found[better], found[worse]
            by = [verdict(*pair, "alignment"), verdict(*pair, "attributes"), verdict(*pair, "loss", lowest=True)]
            words.append(f"{claim}: {'; '.join(by)}.")
    if rows:
        best = max(rows, key=lambda row: row["alignment"])
        where = f"{best['reset']} at {best['learning rate']:g}"
        words.append(f"Best alignment: reset of {where}, {format_mean(best, 'alignment')}.")
    return words


STUDY = Study(
    about="Alignment and loss by layers reset and learning rate; the whole UNet trains for a frozen T5.",
    cells=[{"reset": reset, "learning rate": rate} for rate in RATES for reset in RESETS],
    figures=figures,
    findings=findings,
)
