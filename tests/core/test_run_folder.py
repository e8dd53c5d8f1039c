"""A run's folder: locks, claims, whole files, and a state that comes back bit for bit."""

import json
import subprocess
import sys
import textwrap
from threading import Thread

import pytest
import torch
from retune.training.common.files import (
    atomic_path,
    check_free_disk,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from retune.training.common.fingerprint import tensors_sketch
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.checkpoint import load_state, restore_optimizer, save_state
from retune.training.loop.optimizers import build_optimizer
from retune.training.runs.folder import RunFolder, move_aside, next_name

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


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    import errno

    import safetensors.torch

    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(1)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ValueError, match=r"free disk space under .* too small for t.safetensors \(1 MB\)"):
        write_tensors(path, {"a": torch.ones(2**18)})
    assert read_tensors(path)[0]["a"].tolist() == [1.0]


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


def test_a_state_of_before_group_values_were_saved_is_read(tmp_path):
    folder, weights = RunFolder(tmp_path), fresh()
    save_state(folder, 3, {"w": weights[0].data}, {}, trained("AdamW", range(3), weights), {})
    tensors, metadata = read_tensors(folder.latest)
    about = json.loads(metadata["retune.state"])
    assert about.pop("groups")[0]["name"] == "rest"
    write_tensors(folder.latest, tensors, {"retune.state": json.dumps(about)})
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


def test_two_threads_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text("first", encoding="utf-8")
        other = Thread(target=write_text, args=(path, "second"))
        other.start()
        other.join()
        assert path.read_text(encoding="utf-8") == "second"
    assert path.read_text(encoding="utf-8") == "first" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
