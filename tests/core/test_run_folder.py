"""A run's folder: locks, claims, whole files, and a state that comes back bit for bit."""

import json
import subprocess
import sys
import textwrap
from threading import Thread

import pytest
import torch
from retune.training.common.files import atomic_path, check_free_disk, write_json, write_tensors, write_text
from retune.training.common.fingerprint import tensors_sketch
from retune.training.common.foreign import read_tensors
from retune.training.config.training_settings import TrainingSettings
from retune.training.demo.editions import EDITIONS
from retune.training.loop.checkpoint import load_state, restore_optimizer, save_state
from retune.training.loop.optimizers import build_optimizer
from retune.training.runs.folder import RunFolder, move_aside, next_name
from retune.training.runs.outcome import saved_result
from retune.training.runs.state_file import write_state_file

HOLD = """
import sys
from pathlib import Path
from retune.training.runs.folder import RunFolder
with RunFolder.open(Path(sys.argv[1]), "r", resume="auto"):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="run 'r' is in use by another process"):
            with RunFolder.open(tmp_path, "r", resume="restart"):
                pass
        assert not (tmp_path / "r (old 1)").exists()
        with RunFolder.open(tmp_path, "other", resume="auto"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with RunFolder.open(tmp_path, "r", resume="auto") as folder:
        assert folder.name == "r"


def test_the_same_process_is_refused_too_and_may_come_back(tmp_path):
    with RunFolder.open(tmp_path, "r", resume="auto"):
        with pytest.raises(ValueError, match="in use"), RunFolder.open(tmp_path, "r", resume="auto"):
            pass
    with pytest.raises(KeyError), RunFolder.open(tmp_path, "r", resume="auto"):
        raise KeyError
    with RunFolder.open(tmp_path, "r", resume="auto"):
        pass


def test_restart_moves_the_old_folder_aside_every_time(tmp_path):
    for number in range(3):
        with RunFolder.open(tmp_path, "r", resume="restart") as folder:
            (folder.path / "mark").write_text(str(number), encoding="utf-8")
    marks = {path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*/mark")}
    assert marks == {"r": "2", "r (old 1)": "0", "r (old 2)": "1"}
    move_aside(tmp_path / "absent")
    assert next_name(tmp_path / "r") == "r 2"


def test_claim_records_and_names_the_first_difference(tmp_path):
    folder = RunFolder(tmp_path / "r")
    folder.path.mkdir()
    (tmp_path / "r 2").mkdir()
    identity = {"model": "abc", "settings": {"loss": "mse", "sizes": (1, 2)}, "learning_rate": 1e-4}
    folder.claim(identity, {"environment": {"threads": 1}})
    folder.claim(identity, {"environment": {"threads": 2}})
    assert folder.config()["environment"] == {"threads": 2} and folder.config()["version"] == 1
    with pytest.raises(ValueError, match=r"settings.loss is 'l1'; run 'r' was made with 'mse'.*'r 3'"):
        folder.claim(identity | {"settings": {"loss": "l1", "sizes": (1, 2)}}, {})
    with pytest.raises(ValueError, match=r"the model \(its weights, a reset, a LoRA\) differs from the one"):
        folder.claim({k: v for k, v in identity.items() if k != "model"}, {})
    with pytest.raises(ValueError, match="seed is 3; run 'r' was made with None"):
        folder.claim(identity | {"seed": 3}, {})
    assert folder.config()["identity"]["settings"]["loss"] == "mse"


def test_settings_that_an_older_run_did_not_know_are_at_their_defaults(tmp_path):
    folder = RunFolder(tmp_path / "r")
    folder.path.mkdir()
    folder.claim({"seed": 0, "settings": {"loss": "mse"}}, {})
    former = {"rank": 4, "settings": {"lr_cycles": 1, "loss": "l1"}}
    now = {"seed": 0, "rank": 4, "settings": {"loss": "mse", "lr_cycles": 1}}
    with pytest.raises(ValueError, match="settings.lr_cycles is 2; run 'r' was made with 1"):
        folder.claim(now | {"settings": {"loss": "mse", "lr_cycles": 2}}, {}, former)
    folder.claim(now, {}, former)
    assert folder.config()["identity"] == now


def test_each_stretch_of_steps_keeps_its_settings(tmp_path):
    folder, weights = RunFolder(tmp_path / "r"), fresh()
    optimizer = trained("AdamW", range(1), weights)

    def claim(steps, threads=1):
        folder.claim({"seed": 0}, {"config": {"steps": steps}, "environment": {"threads": threads}, "prompt": {}})
        return [
            (s["after_step"], s["config"]["steps"], s["environment"]["threads"]) for s in folder.config()["stretches"]
        ]

    def save(step):
        save_state(folder, step, {"w": weights[0].data}, {}, optimizer, {})

    assert claim(10) == claim(10) == [(0, 10, 1)]
    assert claim(12) == [(0, 12, 1)]  # nothing was trained with the others
    save(5)
    assert claim(12) == [(0, 12, 1)]
    assert claim(20) == [(0, 12, 1), (5, 20, 1)]
    assert claim(30) == [(0, 12, 1), (5, 30, 1)]
    save(8)
    assert claim(30, threads=2) == [(0, 12, 1), (5, 30, 1), (8, 30, 2)]
    save(6)  # an older state was put back
    assert claim(30, threads=2) == [(0, 12, 1), (5, 30, 1), (6, 30, 2)]
    record = folder.config()
    for later in ("stretches", "record"):  # as version 0.2 wrote it
        del record[later]
    write_json(folder.path / "config.json", record)
    assert claim(40, threads=2) == [(0, 30, 2), (6, 40, 2)]


@pytest.mark.parametrize("kept", ["state/latest.safetensors", "state/best.safetensors", "status.json", "metrics.jsonl"])
def test_a_run_that_lost_its_settings_does_not_go_on_with_others(tmp_path, kept):
    with RunFolder.open(tmp_path, "r", resume="auto") as folder:
        (folder.path / kept).parent.mkdir(exist_ok=True)
        (folder.path / kept).touch()
        with pytest.raises(
            ValueError, match=f"run 'r' has {kept} but no config.json; .*'r 2', or choose resume = rest"
        ):
            folder.claim({"learning_rate": 1e-3}, {})
        assert folder.config() is None
    with RunFolder.open(tmp_path, "r", resume="restart") as folder:
        folder.claim({"learning_rate": 1e-3}, {})


def test_a_state_of_another_runs_settings_is_refused(tmp_path):
    weights = fresh()
    for name, rate in (("one", 1e-3), ("two", 1e-4)):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        folder.claim({"learning_rate": rate}, {})
        save_state(folder, 1, {"w": weights[0].data}, {}, trained("AdamW", range(1), weights), {})
        assert load_state(folder).step == 1
    folder.latest.write_bytes((tmp_path / "one" / "state" / "latest.safetensors").read_bytes())
    with pytest.raises(ValueError, match="belongs to a run of other settings; .*Choose resume = restart"):
        load_state(folder)


def test_a_projection_computed_again_may_differ_in_its_last_bits(tmp_path):
    folder = RunFolder(tmp_path / "r")
    folder.path.mkdir()
    weight, scale = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.2)
    folder.claim({"projection": tensors_sketch({"weight": weight, "scale": scale}.items())}, {})
    again = {"weight": weight * (1 + 1e-6) - 1e-7, "scale": scale * (1 - 1e-6)}
    folder.claim({"projection": tensors_sketch(again.items())}, {})
    others = (again | {"scale": scale * 1.01}, again | {"weight": weight.T}, {"weight": weight}, {})
    for other in others:
        with pytest.raises(ValueError, match="projection or scale differs from the one that run 'r'"):
            folder.claim({"projection": tensors_sketch(other.items())}, {})
    with pytest.raises(ValueError, match="projection or scale differs"):
        folder.claim({"projection": None}, {})


def test_a_run_of_an_earlier_demo_model_is_refused_by_name(tmp_path):
    folder = RunFolder(tmp_path / "r")
    folder.path.mkdir()
    folder.claim({"model": EDITIONS[0].unet}, {})
    with pytest.raises(ValueError, match="made with the demo model of versions 0.1 to 0.3; this is another"):
        folder.claim({"model": "f" * 32}, {})


def test_rows_are_appended_and_cut_to_the_byte(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.rows() == [] and folder.metrics_size() == 0
    folder.truncate_metrics(0)
    folder.add_row({"step": 1, "loss": 0.1})
    size = folder.metrics_size()
    folder.add_row({"step": 2, "loss": 1 / 3})
    assert folder.rows() == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1 / 3}]
    folder.truncate_metrics(size)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 0.1}\n'
    with pytest.raises(ValueError, match=r"metrics.jsonl is 25 bytes; expected at least .*26"):
        folder.truncate_metrics(size + 1)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 25


def test_line_ends_of_windows_are_undone_before_rows_are_cut(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.add_row({"step": step, "loss": 0.5})
    size = folder.metrics_size()
    folder.add_row({"step": 3, "loss": 0.5})
    data = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(data.replace(b"\n", b"\r\n"))
    (tmp_path / "status.json").write_bytes(b'{\r\n "state": "running",\r\n "step": 2\r\n}\r\n')
    assert [row["step"] for row in folder.rows()] == [1, 2, 3] and folder.status()["step"] == 2
    folder.truncate_metrics(size)
    assert (tmp_path / "metrics.jsonl").read_bytes() == data[:size]
    with pytest.raises(ValueError, match=r"metrics.jsonl has no end of a row at byte 10, .*resume = restart"):
        folder.truncate_metrics(10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == data[:size]


def test_status_of_a_new_folder_and_after(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.status() == {"state": "new", "step": 0} and folder.config() is None
    folder.set_status("failed", 3, message="ä → b")
    assert folder.status() == {"state": "failed", "step": 3, "message": "ä → b"}
    assert "ä → b" in (tmp_path / "status.json").read_text(encoding="utf-8")


def test_tensors_are_readable_by_whom_other_files_are(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    (tmp_path / "b.txt").write_text("b", encoding="utf-8")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_a_torn_file_of_a_killed_writer_changes_nothing(tmp_path):
    path = tmp_path / "r" / "value.json"
    write_json(path, {"a": 1})
    (path.parent / ".value.json.123.tmp").write_text('{"a"', encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    write_json(path, {"a": 2})
    write_tensors(path.parent / "state" / "t.safetensors", {"x": torch.ones(2)})
    (path.parent / "state" / ".t.safetensors.123.tmp").write_bytes(b"torn")
    with RunFolder.open(tmp_path, "r", resume="auto") as folder:
        assert json.loads(path.read_text(encoding="utf-8")) == {"a": 2}
        assert sorted(p.name for p in folder.path.rglob("*.*")) == ["t.safetensors", "value.json"]


@pytest.mark.parametrize("name", ["config.json", "status.json"])
def test_a_damaged_json_file_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"identity"', encoding="utf-8")
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*begin the run again"):
        folder.config() if name == "config.json" else folder.status()


def test_tensors_come_back_with_metadata_and_unmapped(tmp_path):
    path = tmp_path / "new" / "t.safetensors"
    tensors = {"a": torch.randn(5, 3).t(), "b": torch.tensor(7), "c": torch.zeros(0)}
    write_tensors(path, tensors, {"about": "ä"})
    found, metadata = read_tensors(path)
    assert metadata == {"about": "ä"}
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)
    write_tensors(path, {"a": torch.zeros(5000)})  # on Windows this fails while the old file is mapped
    assert torch.equal(found["a"], tensors["a"])
    if sys.platform == "linux":
        held, _ = read_tensors(path)
        with open("/proc/self/maps", encoding="utf-8") as maps:
            assert str(path) not in maps.read()
        assert held["a"].numel() == 5000


def test_disk_check_looks_at_the_nearest_folder_there_is(tmp_path):
    check_free_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(ValueError, match="expected at least 953674316406 MB"):
        check_free_disk(tmp_path / "not" / "there", 10**18)


def trained(optimizer_name, steps, weights, optimizer=None):
    """Weights after steps whose gradients depend on the step alone."""
    settings = TrainingSettings(optimizer=optimizer_name, weight_decay=0.1)
    optimizer = optimizer or build_optimizer(dict(enumerate_names(weights)), 0.01, settings)
    for step in steps:
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()
    return optimizer


def enumerate_names(weights):
    return ((f"w.{i}", weight) for i, weight in enumerate(weights))


def fresh():
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((4, 3), (5,))]


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD"])
def test_optimiser_goes_on_bit_for_bit_from_its_file(tmp_path, name):
    whole = fresh()
    trained(name, range(6), whole)
    first = fresh()
    folder = RunFolder(tmp_path)
    masters = {f"w.{i}": w.data for i, w in enumerate(first)}
    optimizer = trained(name, range(3), first)
    save_state(folder, 3, masters, {"w.0": torch.ones(2)}, optimizer, {"best": 0.1})
    state = load_state(folder)
    assert (state.step, state.extra, state.ema["w.0"].tolist()) == (3, {"best": 0.1}, [1.0, 1.0])
    second = [torch.nn.Parameter(state.masters[f"w.{i}"]) for i in range(2)]
    optimizer = build_optimizer(dict(enumerate_names(second)), 0.01, TrainingSettings(optimizer=name, weight_decay=0.1))
    restore_optimizer(optimizer, state.optimizer)
    trained(name, range(3, 6), second, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_a_state_of_before_group_values_and_digests_were_saved_is_read(tmp_path, caplog):
    folder, weights = RunFolder(tmp_path), fresh()
    save_state(folder, 3, {"w": weights[0].data}, {}, trained("AdamW", range(3), weights), {})
    tensors, metadata = read_tensors(folder.latest)
    about = json.loads(metadata["retune.state"])
    assert about.pop("groups")[0]["name"] == "rest"
    write_tensors(folder.latest, tensors, {"retune.state": json.dumps(about)})
    caplog.clear()
    load_state(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"the state of run {folder.name!r} is of an earlier version and could not be verified"
    ]
    optimizer = build_optimizer(dict(enumerate_names(weights)), 0.01, TrainingSettings(weight_decay=0.1))
    restore_optimizer(optimizer, load_state(folder).optimizer)
    assert [optimizer.state[w]["step"].item() for w in weights] == [3, 3]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("damage", [b"", b"torn", None])
def test_a_damaged_state_is_named(tmp_path, damage):
    folder = RunFolder(tmp_path)
    assert load_state(folder) is None
    weights = fresh()
    save_state(folder, 1, {"w": weights[0].data}, {}, trained("AdamW", range(1), weights), {})
    data = folder.latest.read_bytes()
    folder.latest.write_bytes(data[: len(data) // 2] if damage is None else damage)
    with pytest.raises(ValueError, match=r"latest.safetensors cannot be read .* resume = restart"):
        load_state(folder)


@pytest.mark.parametrize("place", ["weights", "optimizer", "metadata", "step"])
def test_a_changed_byte_in_a_state_is_found(tmp_path, place, caplog):
    folder, weights = RunFolder(tmp_path), fresh()
    optimizer = trained("AdamW", range(2), weights)
    save_state(folder, 2, {"w": weights[0].data}, {"w": weights[0].data}, optimizer, {"best": 0.25})
    assert load_state(folder).step == 2 and not caplog.records
    data = bytearray(folder.latest.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    json.loads(data[8:header])
    if place == "metadata":
        position = data.index(b"0.25")
        data[position : position + 4] = b"0.75"
    elif place == "step":
        position = data.index(rb"step\": 2")
        data[position : position + 9] = rb"step\": 3"
    else:
        position = header + 5 if place == "weights" else len(data) - 3
        data[position] ^= 1
    folder.latest.write_bytes(data)
    with pytest.raises(ValueError, match=r"latest.safetensors cannot be read \(.*changed since .* resume = restart"):
        load_state(folder)


@pytest.mark.parametrize("kind", ["best", "guarded"])
def test_a_changed_byte_in_weights_that_become_the_result_is_found(tmp_path, kind):
    folder, path = RunFolder(tmp_path), getattr(RunFolder(tmp_path), kind)
    values = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.tensor(2.0),
        "c": torch.zeros(0),
        "d": torch.ones(2) > 0,
    }
    write_state_file(path, values, {"step": "4", "validation_loss": "0.5"})
    found, step = saved_result(folder, kind.removesuffix("ed"), 4)
    assert step == 4 and found.keys() == values.keys() and all(torch.equal(found[k], values[k]) for k in values)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{kind}.safetensors cannot be read .*changed since"):
        saved_result(folder, kind.removesuffix("ed"), 4)


def test_two_threads_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text("first", encoding="utf-8")
        other = Thread(target=write_text, args=(path, "second"))
        other.start()
        other.join()
        assert path.read_text(encoding="utf-8") == "second"
    assert path.read_text(encoding="utf-8") == "first" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
