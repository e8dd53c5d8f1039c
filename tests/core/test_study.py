"""Studies: a trial is measured once, goes on where it stopped, and rows say what the trials measured."""

import json
import statistics
from dataclasses import replace

import pytest
from retune.benchmarks import precision_study, projection_study, reset_study, reward_study
from retune.benchmarks.__main__ import main
from retune.benchmarks.catalog import STUDIES
from retune.benchmarks.projection_study import crossing
from retune.benchmarks.study import Study, StudyConfig, markdown_table, run_study, summarize, verdict
from retune.training.commands.demo import DRAW_OPTIONS
from retune.training.common.callbacks import Callbacks

SMALL = {"steps": 2, "batch_size": 2, "images": 100, "judged": 2}


def row(**figures):
    return {key: value for name, (mean, se) in figures.items() for key, value in ((name, mean), (f"{name}_se", se))}


def test_rows_are_means_with_standard_errors():
    found = [{"reset": "QK", "seed": seed, "loss": loss, "when": when} for seed, (loss, when) in enumerate(FIGURES)]
    (found_row, alone) = summarize([*found, {"reset": "none", "seed": 0, "loss": 1.0, "when": None}], ["reset"])
    losses = [loss for loss, _ in FIGURES]
    assert found_row["n"] == 3 and found_row["loss"] == pytest.approx(statistics.fmean(losses))
    assert found_row["loss_se"] == pytest.approx(statistics.stdev(losses) / 3**0.5)
    assert found_row["when"] == 150 and found_row["when_se"] == pytest.approx(50)
    assert alone["loss_se"] is None and alone["when"] is None
    lines = markdown_table([found_row, alone]).splitlines()
    assert lines[0] == "| reset | n | loss | when |"
    assert lines[2:] == ["| QK | 3 | 0.400 ± 0.058 | 150 ± 50 |", "| none | 1 | 1.000 | never |"]


FIGURES = ((0.3, 100.0), (0.4, None), (0.5, 200.0))


def test_a_difference_counts_from_two_standard_errors_on():
    low, high, near = row(loss=(0.1, 0.03)), row(loss=(0.3, 0.04)), row(loss=(0.19, 0.04))
    assert verdict(low, high, "loss", lowest=True).startswith("holds by loss (0.100 ± 0.030 against 0.300")
    assert verdict(low, high, "loss").startswith("does not hold by loss")
    assert verdict(low, near, "loss", lowest=True).startswith("cannot be told by loss")
    assert verdict(low, row(loss=(0.3, None)), "loss").startswith("one trial each cannot tell")


def test_a_study_goes_on_where_its_budget_ended(tmp_path):
    begun = []

    def figures(trial):
        begun.append(trial.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return {"loss": trial.seed + trial.labels["rate"]}

    study = Study("", [{"layers": "a/b", "rate": 0.5}, {"layers": "c", "rate": 1.0}], figures, lambda rows: ["so"])
    config = StudyConfig(output=tmp_path, seeds=2, images=100)
    with pytest.raises(KeyboardInterrupt):
        run_study("x", study, config)
    assert run_study("x", study, StudyConfig(output=tmp_path, seeds=2, images=100, budget=1e-9))["done"] == 1
    result = run_study("x", study, config)
    assert begun == ["a-b 0.5 seed 0", "c 1.0 seed 0", "c 1.0 seed 0", "a-b 0.5 seed 1", "c 1.0 seed 1"]
    assert result["done"] == result["trials"] == 4
    assert [r["loss"] for r in result["rows"]] == [1.0, 1.5] and result["findings"] == ["so"]
    assert run_study("x", study, config)["rows"] == result["rows"] and len(begun) == 5


@pytest.mark.slow
def test_a_trial_killed_while_training_ends_with_the_same_figures(tmp_path):
    class Stop(Callbacks):
        def on_step(self, info):
            if info.step == 1:
                raise KeyboardInterrupt

    study = Study("", reset_study.STUDY.cells[1:2], reset_study.run_trial, reset_study.findings)
    with pytest.raises(KeyboardInterrupt):
        run_study("r", study, StudyConfig(output=tmp_path / "a", seeds=1, **SMALL), Stop())
    rows = run_study("r", study, StudyConfig(output=tmp_path / "a", seeds=1, **SMALL))["rows"]
    assert rows == run_study("r", study, StudyConfig(output=tmp_path / "b", seeds=1, **SMALL))["rows"]
    (only,) = rows
    assert only["reset"] == "cross-attention" and only["loss"] > 0 and 0 <= only["alignment"] <= only["attributes"]
    assert not list((tmp_path / "a").rglob("*.safetensors.tmp")) and not list((tmp_path / "a").rglob("state"))


def test_findings_of_the_resets_follow_the_figures():
    rates = reset_study.RATES
    good, bad = (
        row(alignment=(0.5, 0.01), attributes=(0.9, 0.01), loss=(0.1, 0.001)),
        row(alignment=(0.1, 0.01), attributes=(0.5, 0.01), loss=(0.2, 0.001)),
    )
    rows = [
        {"reset": "cross-attention", "learning rate": rates[0], "n": 3, **good},
        {"reset": "all attention", "learning rate": rates[0], "n": 3, **bad},
        {"reset": "QK", "learning rate": rates[0], "n": 3, **good},
    ]
    useful, poor, best = reset_study.findings(rows)
    assert useful.count("holds by") == 3 and "does not" not in useful
    assert poor.count("cannot be told") == 3
    assert best.startswith("Best alignment: reset of cross-attention at 0.0002, 0.500 ± 0.010")
    assert reset_study.findings([]) == []


def test_the_crossing_lies_on_the_line_between_two_judgements():
    points = [(0, 0.0), (300, 0.2), (600, 0.6), (900, 0.5)]
    assert crossing(points, 0.5) == pytest.approx(525)
    assert crossing(points, 0.6) == 600 and crossing(points, 0.61) is None
    assert crossing(points[2:], 0.5) == 600


def test_bf16_is_too_low_only_beyond_its_bound_and_two_standard_errors():
    def found(low, error):
        return {"trained": "LoRA", **row(fp32=(0.9, 0.01), bf16=(0.9 + low, 0.01), difference=(low, error))}

    near, far, alone = (
        precision_study.findings([found(*pair)])[0] for pair in ((-0.03, 0.01), (-0.05, 0.01), (0, None))
    )
    assert near.startswith("LoRA: bf16 0.870 ± 0.010 against fp32 0.900 ± 0.010, -0.030 ± 0.010; lower by at most 0.02")
    assert near.endswith(": holds.") and far.endswith(": missed.") and alone.endswith("one trial cannot tell.")


@pytest.mark.slow
def test_a_projection_trial_killed_after_a_judgement_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(projection_study, "STRETCH", 4)

    class Stop(Callbacks):
        def on_step(self, info):
            if info.step == 6:
                raise KeyboardInterrupt

    study = replace(projection_study.STUDY, cells=projection_study.STUDY.cells[:1])
    config = StudyConfig(output=tmp_path / "a", seeds=1, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        run_study("p", study, config, Stop())
    (curve,) = (tmp_path / "a").rglob("judged/*.json")
    assert [steps for steps, _ in json.loads(curve.read_text())] == [0, 2, 4]
    rows = run_study("p", study, config)["rows"]
    assert rows == run_study("p", study, replace(config, output=tmp_path / "b"))["rows"]
    assert rows[0]["reached"] == 0 and [s for s, _ in json.loads(curve.read_text())] == [*range(0, 9, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_the_command_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(projection_study, "STRETCH", 1)
    monkeypatch.setattr(reward_study, "IMAGES", 2)
    monkeypatch.setitem(DRAW_OPTIONS, "steps", 2)
    small = SMALL | {"steps": 1, "batch_size": 1, "images": 12}
    sizes = [word for key, value in small.items() for word in ("--" + key.replace("_", "-"), str(value))]
    command = [name, "--json", "--seeds", "1", "--output", str(tmp_path), *sizes]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["done"] == result["trials"] == len(STUDIES[name].cells) == len(result["rows"])
    assert all(
        value is None or value >= -1 for r in result["rows"] for value in r.values() if not isinstance(value, str)
    )
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
