"""The demo from end to end at a size of seconds, and what the shipped model can do."""

import json

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands import demo as demo_run
from retune.training.commands.demo import assets_fingerprint, set_outdated_run_aside
from retune.training.runs.folder import RunFolder

SMALL = ["--images", "40", "--judged", "6", "--steps", "3", "--batch-size", "4"]
KEYS = ["alignment_clip", "alignment_t5_untrained", "alignment_t5_trained", "seconds", "report"]


@pytest.mark.slow
def test_the_demo_ends_with_figures_and_a_report(tmp_path, capsys):
    command = ["demo", "--json", "--output", str(tmp_path), *SMALL]
    assert main(command) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert list(result) == KEYS and "WARNING" not in said.err
    assert all(0 <= result[key] <= 1 for key in KEYS[:3]) and result["seconds"] > 0
    folder = RunFolder(tmp_path / "demo T5 swap")
    assert result["report"] == str((folder.path / "report.html").resolve())
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("T5, untrained", "T5, trained", "alignment", "epoch", "curves of the run"))
    assert [row["step"] for row in folder.rows() if "event" not in row] == [1, 2, 3]
    before = (folder.path / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0  # answers from disk
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: again[key] for key in KEYS[:3]} == {key: result[key] for key in KEYS[:3]}
    assert (folder.path / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_of_another_edition_is_moved_aside(tmp_path, monkeypatch):
    run = tmp_path / "a run"
    set_outdated_run_aside(tmp_path, run.name)
    run.mkdir()
    set_outdated_run_aside(tmp_path, run.name)
    assert run.is_dir()
    monkeypatch.setattr(demo_run, "assets_fingerprint", lambda: "other")
    set_outdated_run_aside(tmp_path, run.name)
    assert not run.exists() and (tmp_path / "a run (old 1)").is_dir()
    run.mkdir()
    set_outdated_run_aside(tmp_path, run.name)
    assert run.is_dir()


def test_the_edition_is_that_of_weights_and_drawings(monkeypatch):
    before = assets_fingerprint()
    assert len(before) == 8 and assets_fingerprint() == before
    monkeypatch.setattr(demo_run, "demo_examples", lambda count, seed: (torch.zeros(count, 3, 2, 2), [""]))
    assert assets_fingerprint() != before
