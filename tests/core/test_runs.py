"""Lists, charts and deletion of runs read nothing but what a fresh listing of their folders has."""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from PIL import Image
from retune.training.config.lora import LoraConfig
from retune.training.plots.run_chart import smoothed
from retune.training.runs.folder import RunFolder
from retune.training.runs.index import (
    NoSuchRun,
    delete_run,
    list_runs,
    report_file,
    run_details,
    sample_file,
    summary,
    thinned,
    workflow_of,
)
from retune.training.runs.report import write_report


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def a_run(root, name="a run", *, steps=5, state="interrupted", **details):
    """A run folder with rows of loss 1, 1/2, 1/3, ... and samples at step 2."""
    with RunFolder.open(root, name, resume="auto") as folder:
        config = asdict(LoraConfig(run_name=name, steps=10))
        folder.claim({"kind": "lora"}, {"config": config, "environment": {"torch": "2", "threads": 1}, **details})
        for step in range(1, steps + 1):
            folder.add_row({"step": step, "loss": 1 / step, "grad_norm": None})
        folder.add_row({"event": "validation", "step": 4, "loss": 0.5, "bands": [0.1, float("nan")]})
        row = {"event": "sample", "step": 2, "epoch": 1.0, "files": ["000002_00.png"], "prompts": ["a <b>"]}
        folder.add_row(row | {"grid": "000002_grid.png"})
        for file in (*row["files"], "000002_grid.png"):
            (folder.samples / file).write_bytes(PNG)
        folder.set_status(state, steps)
    return folder


def test_a_list_has_every_run_and_what_it_shows(tmp_path):
    assert list_runs(tmp_path / "none yet") == []
    a_run(tmp_path, prompt={"1": {}})
    finished = a_run(tmp_path, "b", state="finished")
    (tmp_path / "no run").mkdir()
    os.utime(finished.path / "metrics.jsonl", (2e9, 2e9))
    first, second = list_runs(tmp_path)
    assert (first["id"], first["state"], first["workflow"]) == ("b", "finished", False)
    assert second["version"] == (tmp_path / "a run" / "config.json").stat().st_mtime_ns // 10**6
    assert second | {"changed": 0, "version": 0} == {
        "id": "a run",
        "kind": "lora",
        "state": "interrupted",
        "message": "",
        "step": 5,
        "steps": 10,
        "loss": 0.2,
        "reward": None,
        "changed": 0,
        "version": 0,
        "grid": "000002_grid.png",
        "workflow": True,
    }


@pytest.mark.parametrize("before", ["", "no row\n", f"no row\n{'x' * 2**18}\n"])
def test_no_more_than_the_last_step_is_read_for_a_list(tmp_path, before):
    folder = a_run(tmp_path)
    rows = '{"step": 7, "loss": 0.5}\n{"event": "watch", "step": 7}\n{"step": 8, "lo'
    (folder.path / "metrics.jsonl").write_text(before + rows, encoding="utf-8")
    run = summary(tmp_path, folder)
    assert (run["state"], run["step"], run["loss"]) == ("interrupted", 7, 0.5)


def test_a_state_is_checked_against_who_holds_the_run(tmp_path):
    folder = a_run(tmp_path, state="running")
    assert summary(tmp_path, folder)["state"] == "interrupted"  # its process was killed
    with RunFolder.open(tmp_path, "a run", resume="auto"):
        assert summary(tmp_path, folder)["state"] == "running"
        with pytest.raises(ValueError, match="'a run' is in use; .* Stop it first"):
            delete_run(tmp_path, "a run")
        folder.set_status("failed", 5)
        assert summary(tmp_path, folder)["state"] == "preparing"
        folder.set_status("finished", 5)
        assert summary(tmp_path, folder)["state"] == "preparing"  # it goes on to more steps
    assert folder.path.exists()


def test_lists_that_are_made_at_once_take_each_other_for_no_training(tmp_path):
    folder = a_run(tmp_path, state="running")
    with ThreadPoolExecutor(8) as pool:
        states = set(pool.map(lambda _: summary(tmp_path, folder)["state"], range(200)))
    assert states == {"interrupted"}


def test_details_have_smoothed_rows_and_only_numbers_that_json_knows(tmp_path):
    folder = a_run(tmp_path, steps=3000)
    with open(folder.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3001, "lo')  # being written just now
    run = run_details(tmp_path, "a run")
    json.dumps(run, allow_nan=False)
    curve = smoothed([1 / step for step in range(1, 3001)])
    assert run["count"] == 3000 and run["rows"][-1]["step"] == 3000 and 500 < len(run["rows"]) <= 601
    assert all(row["smoothed"] == curve[row["step"] - 1] for row in run["rows"])
    assert run["validation"][0]["bands"] == [0.1, None] and run["samples"][0]["prompts"] == ["a <b>"]


def test_thinning_keeps_spikes_order_and_the_last_row():
    rows = [{"step": step, "loss": 9.0 if step == 777 else step % 7} for step in range(1, 2001)]
    kept = [row["step"] for row in thinned(rows, 100)]
    assert kept == sorted(set(kept)) and {777, 2000} <= set(kept) and len(kept) <= 101
    assert thinned(rows[:100], 100) == rows[:100]


@pytest.mark.parametrize("name", ["../secret", "..", ".", "", "/", ".locks", "a run/samples", "a run\0", "link"])
def test_names_that_no_listing_has_reach_nothing(tmp_path, name):
    root = tmp_path / "retune"
    secret = a_run(tmp_path, "secret")
    a_run(root)
    (root / "link").symlink_to(secret.path, target_is_directory=True)
    (root / "a run" / "samples" / "link.png").symlink_to(secret.samples / "000002_00.png")
    for function in (run_details, report_file, workflow_of, delete_run):
        with pytest.raises(NoSuchRun):
            function(root, name)
    for file in (name, "link.png", "../config.json", str(secret.samples / "000002_00.png")):
        with pytest.raises(NoSuchRun):
            sample_file(root, "a run", file)
    assert sample_file(root, "a run", "000002_00.png").read_bytes() == PNG
    assert (secret.path / "config.json").exists()


@pytest.mark.parametrize("name", ["config.json", "status.json", "metrics.jsonl", "report.html", "samples"])
def test_links_in_a_run_that_was_copied_in_are_not_followed(tmp_path, name):
    root, secret = tmp_path / "retune", a_run(tmp_path, "secret", prompt={"1": {}})
    report_file(tmp_path, "secret")
    foreign = a_run(root, prompt={"1": {}}).path
    (foreign / name).rename(tmp_path / "moved") if (foreign / name).exists() else None
    (foreign / name).symlink_to(secret.path / name)
    (run,) = list_runs(root)
    assert run["state"] == "damaged" and f"{name} of run 'a run' is a link" in run["message"]
    assert run_details(root, "a run")["rows"] == []
    for read in (report_file, workflow_of, lambda *names: sample_file(*names, "000002_00.png")):
        with pytest.raises(ValueError, match="is a link"):
            read(root, "a run")
    delete_run(root, "a run")
    assert (secret.path / name).exists()


def test_a_report_shows_no_picture_from_elsewhere(tmp_path):
    folder = a_run(tmp_path / "retune")
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder.samples / "link.png").symlink_to(tmp_path / "secret.png")
    row = {"event": "sample", "step": 3, "epoch": 1.0}
    for file in (str(tmp_path / "secret.png"), "../../../secret.png", "link.png"):
        folder.add_row(row | {"files": [file], "prompts": ["foreign"]})
    page = report_file(tmp_path / "retune", "a run").read_text(encoding="utf-8")
    assert "step 3" in page and 'alt="a &lt;b&gt;"' in page and 'alt="foreign"' not in page


def test_deleting_takes_the_folder_and_nothing_else(tmp_path):
    a_run(tmp_path)
    other = a_run(tmp_path, "other")
    delete_run(tmp_path, "a run")
    assert [run["id"] for run in list_runs(tmp_path)] == ["other"] and other.path.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".locks", "other"]


def test_the_graph_that_made_a_run_and_a_report_of_it(tmp_path):
    folder = a_run(tmp_path, prompt={"1": {}}, workflow={"nodes": []})
    assert workflow_of(tmp_path, "a run") == {"prompt": {"1": {}}, "workflow": {"nodes": []}}
    a_run(tmp_path, "command line")
    with pytest.raises(NoSuchRun, match="not made by a workflow"):
        workflow_of(tmp_path, "command line")
    page = report_file(tmp_path, "a run")
    assert "a &lt;b&gt;" in page.read_text(encoding="utf-8")
    page.write_text("as it was", encoding="utf-8")
    assert report_file(tmp_path, "a run").read_text(encoding="utf-8") == "as it was"
    os.utime(page, (0, 0))
    folder.add_row({"step": 6, "loss": 0.1})
    assert report_file(tmp_path, "a run").read_text(encoding="utf-8") != "as it was"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("status.json", "{"),
        ("status.json", '{"state": "failed"}'),
        ("status.json", '{"state": "cooking", "step": 1}'),
        ("status.json", '{"state": ["failed"], "step": 1}'),
        ("status.json", '{"state": "failed", "step": "5"}'),
        ("status.json", '{"state": "failed", "step": -1}'),
        ("status.json", '{"state": "failed", "step": 1e400}'),
        ("status.json", f'{{"state": "failed", "step": 1{"0" * 400}}}'),
        ("status.json", '{"state": "failed", "step": 1, "message": [1]}'),
        ("status.json", b"\xff\xfe\x00"),
        ("config.json", ""),
        ("config.json", '[{"identity": 1}]'),
        ("config.json", '{"identity": null}'),
        ("config.json", '{"identity": {"kind": 7}}'),
        ("config.json", '{"identity": {}, "config": {"steps": "many"}}'),
        ("config.json", '{"identity": {}, "config": 3}'),
        ("config.json", '{"identity": {}, "stretches": [{}]}'),
        ("config.json", '{"identity": {}, "workflow": [1]}'),
        ("config.json", "[" * 100_000 + "]" * 100_000),
        ("config.json", '{"identity": {}, "workflow": {"a": ' + "[" * 500 + "]" * 500 + "}}"),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"step": 1, "lo\n'),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": NaN}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": true}\n'),
        ("metrics.jsonl", f'{{"step": 1, "loss": 1{"0" * 400}}}\n'),
        ("metrics.jsonl", f'{{"step": 1, "loss": 1{"0" * 5000}}}\n'),
        ("metrics.jsonl", '{"step": "1", "loss": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": 1, "reward": []}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": ' + "[" * 100_000 + "\n"),
    ],
)
def test_a_damaged_run_does_not_hide_the_others(tmp_path, file, text):
    a_run(tmp_path)
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    (a_run(tmp_path, "broken").path / file).write_bytes(data)
    assert {run["id"]: run["state"] for run in list_runs(tmp_path)} == {"a run": "interrupted", "broken": "damaged"}
    run = run_details(tmp_path, "broken")
    assert run["state"] == "damaged" and run.keys() == run_details(tmp_path, "a run").keys()
    assert "'broken'" in run["message"] and file in run["message"] and "begin the run again" in run["message"]
    delete_run(tmp_path, "broken")
    assert [run["id"] for run in list_runs(tmp_path)] == ["a run"]


@pytest.mark.parametrize(
    "row",
    [
        {"event": "sample", "step": 2, "files": "x.png", "prompts": ["x"]},
        {"event": "sample", "step": 2, "files": ["x.png"], "prompts": []},
        {"event": "sample", "step": 2, "files": ["x.png"], "prompts": [1]},
        {"event": "sample", "step": 2, "files": [], "prompts": [], "alignment": "good"},
        {"event": "sample", "files": [], "prompts": []},
        {"event": "validation", "step": 2, "loss": "low"},
        {"event": [], "step": 2},
        {"step": 2.5, "loss": 1},
    ],
)
def test_rows_that_a_page_cannot_show_make_a_run_damaged(tmp_path, row):
    with open(a_run(tmp_path).path / "metrics.jsonl", "ab") as file:
        file.write(json.dumps(row).encode() + b'\n{"step": 9, "loss": 1}\n')
    run = run_details(tmp_path, "a run")
    assert run["state"] == "damaged" and run["rows"] == [] and "metrics.jsonl: line 8: " in run["message"]
    with pytest.raises(ValueError, match="run 'a run': metrics.jsonl: line 8: "):
        report_file(tmp_path, "a run")


def test_numbers_that_no_page_has_are_left_out(tmp_path):
    folder = a_run(tmp_path, environment={"memory": 10**400, "odd": [float("inf"), 2**64]})
    folder.add_row({"event": "sample", "step": 3, "files": [], "prompts": [], "alignment": float("nan")})
    folder.add_row({"event": "validation", "step": 3, "loss": float("inf")})
    run = run_details(tmp_path, "a run")
    json.dumps(run, allow_nan=False)
    assert run["environment"] == {"memory": None, "odd": [None, 2**64]} and run["state"] == "interrupted"
    assert run["samples"][-1]["alignment"] is None and run["validation"][-1]["loss"] is None


def test_a_run_without_its_config_is_listed_and_can_be_deleted(tmp_path):
    a_run(tmp_path)
    lost = a_run(tmp_path, "lost").path
    (lost / "config.json").unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").mkdir()
    states = {run["id"]: (run["state"], run["message"]) for run in list_runs(tmp_path)}
    assert states["lost"][0] == "damaged" and "'lost' has no config.json. Put the file back" in states["lost"][1]
    assert states["folder"][0] == "damaged" and "config.json is a folder; expected a file" in states["folder"][1]
    for name in ("lost", "folder"):
        delete_run(tmp_path, name)
    assert [run["id"] for run in list_runs(tmp_path)] == ["a run"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("file", ["config.json", "status.json", "metrics.jsonl"])
def test_a_pipe_in_a_run_is_not_waited_for(tmp_path, file):
    (a_run(tmp_path).path / file).unlink()
    os.mkfifo(tmp_path / "a run" / file)
    (run,) = list_runs(tmp_path)
    assert run["state"] == "damaged" and f"{file} is a pipe or a device" in run["message"]
    assert run_details(tmp_path, "a run")["state"] == "damaged"
    with pytest.raises(ValueError, match="is a pipe or a device"):
        report_file(tmp_path, "a run")


@pytest.mark.skipif(os.name != "posix", reason="names are text here")
def test_a_name_that_is_no_text_has_an_id_that_a_page_can_send(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    a_run(tmp_path, "latin").path.rename(tmp_path / name)
    (run,) = list_runs(tmp_path)
    assert run["id"] == r"caf\udce9" and run_details(tmp_path, run["id"])["count"] == 5
    run["id"].encode("utf-8")
    delete_run(tmp_path, run["id"])
    assert list_runs(tmp_path) == []


def test_deleting_takes_write_protected_files_and_what_is_called_like_the_trash(tmp_path):
    folder = a_run(tmp_path).path
    (tmp_path / ".a run.deleted").write_text("of an earlier version", encoding="utf-8")
    (folder / "samples").chmod(0o500)
    (folder / "status.json").chmod(0o400)
    delete_run(tmp_path, "a run")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a run.deleted", ".locks"]


def test_a_row_that_is_being_written_stops_neither_rows_nor_report(tmp_path):
    folder = a_run(tmp_path, steps=4)
    for half in ('{"step": 5', '{"step": 5, "loss": 0.2, "prompt": "\u2028', "\n"):
        with open(folder.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(half)
            file.flush()
            if half != "\n":
                assert len(folder.rows()) == 6 and "step 2" in write_report(folder).read_text(encoding="utf-8")
                os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - len(half.encode()))


@pytest.mark.parametrize(
    ("file", "text"), [("config.json", "[1]"), ("metrics.jsonl", "[1]\n"), ("metrics.jsonl", "{\n")]
)
def test_a_damaged_run_has_no_report_and_says_why(tmp_path, file, text):
    (a_run(tmp_path, "broken", prompt={"1": {}}).path / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run 'broken': (broken/config|metrics)\.json"):
        report_file(tmp_path, "broken")
    if file == "config.json":
        with pytest.raises(ValueError, match="its content is a list; expected an object"):
            workflow_of(tmp_path, "broken")
