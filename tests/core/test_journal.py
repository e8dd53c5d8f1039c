"""TensorBoard's events: on request, the figures of metrics.jsonl, forgotten with the rows that a stop takes back."""

import dataclasses
import json
import sys

import pytest
from retune.training.common.callbacks import Callbacks
from retune.training.config.run import TrainModelConfig, identity
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.recipes.unet import train_model
from retune.training.runs.metrics_log import figures


def config(**changes):
    settings = TrainingSettings(tensorboard=True, save_every=2, validation_fraction=0.3, validate_every=2)
    samples = SamplePrompts(prompts=("a red circle",), every=2, steps=1, cfg=1.0, width=32, height=32)
    values = {"run_name": "r", "steps": 5, "batch_size": 2, "learning_rate": 1e-3}
    return TrainModelConfig(**(values | {"settings": settings, "samples": samples} | changes))


class Killed(Exception):
    """As a kill looks from outside: nothing is saved any more."""


class Dies(Callbacks):
    def on_step(self, info):
        if info.step == 3:
            raise Killed


def test_events_are_the_rows_also_after_a_run_was_killed(tiny_model, pictures, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from retune.training.loop import checkpoint
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save = checkpoint.save_state
    monkeypatch.setattr(
        checkpoint, "save_state", lambda folder, step, *more: save(folder, step, *more) if step != 3 else None
    )
    with pytest.raises(Killed):
        train_model(tiny_model, pictures, config(), tmp_path, Dies())
    train_model(tiny_model, pictures, config(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    seen = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert {"train/loss", "train/learning_rate", "validation/loss", "validation/bands/0"} <= set(seen.Tags()["scalars"])
    for tag, kind, name in (("train/loss", None, "loss"), ("validation/loss", "validation", "loss")):
        expected = [(row["step"], row[name]) for row in rows if row.get("event") == kind]
        found = [(one.step, one.value) for one in seen.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    drawn = [row["step"] for row in rows if row.get("event") == "sample"]
    assert [one.step for one in seen.Images("samples")] == drawn == [0, 2, 4, 5]


def test_a_missing_package_is_told_before_the_run(tiny_model, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard is on, but the package is not installed.*pip install"):
        train_model(tiny_model, pictures, config(), tmp_path)
    assert not (tmp_path / "r").exists()


def test_events_are_no_part_of_what_a_run_is():
    without = dataclasses.replace(config().settings, tensorboard=False)
    assert identity(config()) == identity(config(settings=without))


def test_all_numbers_of_a_row_are_found_and_nothing_else():
    row = {"step": 3, "loss": 0.5, "files": ["a"], "bands": [1.0, 2.0], "on": True, "tokens": {"<x>": {"norm": [0.25]}}}
    assert dict(figures(row)) == {"loss": 0.5, "bands/0": 1.0, "bands/1": 2.0, "tokens/<x>/norm/0": 0.25}
