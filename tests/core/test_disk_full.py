"""A disk that fills up at any write of a run: the message, what status.json says, and the same bytes afterwards."""

import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from retune.training.common import files
from retune.training.common.callbacks import Callbacks
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.recipes.unet import train_model

PLACES = 20


class Disk:
    """Counts writes, and takes no more than `most` of them; of a row it takes the first half."""

    def __init__(self, monkeypatch, most=10**6):
        self.used, self.most = 0, most
        self.write_bytes, self.write_content, self.open = Path.write_bytes, files.write_content, open
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: self.take() or self.write_bytes(path, data))
        monkeypatch.setattr(files, "write_content", self.written)
        monkeypatch.setattr(files, "open", self.opened, raising=False)

    def take(self):
        self.used += 1
        if self.used > self.most:
            raise OSError(errno.ENOSPC, "No space left on device")

    def written(self, file, *given):
        """A file of tensors on such a disk: the first half of what did not fit is there."""
        try:
            self.take()
        except OSError:
            file.write(bytes(100))
            raise
        self.write_content(file, *given)

    def opened(self, path, mode="r", **more):
        file = self.open(path, mode, **more)
        return Rows(self, file) if mode == "ab" else file


class Rows:
    """metrics.jsonl on such a disk."""

    def __init__(self, disk, file):
        self.disk, self.file = disk, file
        self.seek, self.truncate = file.seek, file.truncate

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        try:
            self.disk.take()
        except OSError:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)


def config():
    settings = TrainingSettings(
        save_every=3, warmup_steps=2, ema_decay=0.9, gradient_accumulation=2, validation_fraction=0.3, validate_every=2
    )
    samples = SamplePrompts(prompts=("a red circle",), every=4, steps=2, cfg=2.0, width=32, height=32)
    values = {"run_name": "r", "steps": 7, "batch_size": 2, "learning_rate": 1e-3, "settings": settings}
    return TrainModelConfig(**values, samples=samples, train="cross-attention")


def train(model, pictures, root, callbacks=None):
    """The folder of the run."""
    train_model(model, pictures, config(), root, callbacks)
    return root / "r"


def digest(run):
    """Hashes of everything a run leaves that must be reproducible, its state among it."""
    found = [run / "metrics.jsonl", *run.glob("*.safetensors"), *(run / "state").iterdir(), *run.glob("samples/*.png")]
    return {f.relative_to(run).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def status(run):
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.own_peaks  # a run whose peaks another one left would write less often than the one that is counted
def test_a_disk_that_is_full_at_any_write(tiny_model, pictures, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    whole = digest(train(tiny_model, pictures, tmp_path / "whole"))
    assert {"metrics.jsonl", "model.safetensors", "state/latest.safetensors", "state/best.safetensors"} <= whole.keys()
    writes = disk.used
    assert writes > 2 * PLACES
    for place in range(PLACES):
        disk.used, disk.most = 0, round(place * (writes - 2) / (PLACES - 1))
        check_a_full_disk(disk, tiny_model, pictures, tmp_path / str(disk.most), whole)


def check_a_full_disk(disk, model, pictures, root, whole):
    with pytest.raises(OSError) as found:
        train(model, pictures, root)
    said, run, disk.most = str(found.value), root / "r", 10**6
    assert isinstance(found.value, OSError) and found.value.errno == errno.ENOSPC
    if "cache" not in said:  # that names its folder and what it needs itself
        assert "free disk space under" in said and "too small for" in said and " MB). Make room" in said
        assert "Run 'r' " in said or "config.json" in said
    if (run / "status.json").exists():
        assert status(run)["state"] == "failed" and status(run)["message"] == said
        assert "has no saved state yet" in said or "keeps its state after step" in said or "cache" in said
    else:
        assert disk.used <= 3, "status.json was not written although there was room"
    assert digest(train(model, pictures, root)) == whole
    assert status(run)["state"] == "finished" and (run / "report.html").is_file()


class FillsTheDisk(Callbacks):
    """Takes all free space of a disk after a step."""

    def __init__(self, step, filler):
        self.step, self.filler = step, filler

    def on_step(self, info):
        if info.step != self.step:
            return
        with open(self.filler, "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 80 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.name != "posix" or os.geteuid():
        pytest.skip("only root may make a disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_real_disk_that_fills_up(tiny_model, pictures, tmp_path, small_disk):
    whole = digest(train(tiny_model, pictures, tmp_path))
    filler = small_disk / "filler"
    with pytest.raises(
        files.WriteFailed, match=r"is 0 MB, too small for .*Run 'r' keeps its state after step 3: queue"
    ):
        train(tiny_model, pictures, small_disk, FillsTheDisk(4, filler))
    assert status(small_disk / "r")["state"] == "failed" and "Make room" in status(small_disk / "r")["message"]
    filler.unlink()
    assert digest(train(tiny_model, pictures, small_disk)) == whole


def test_a_finished_run_without_a_report_gets_one(tiny_model, pictures, tmp_path):
    run = train(tiny_model, pictures, tmp_path)
    (run / "report.html").unlink()
    before = digest(run)
    train(tiny_model, pictures, tmp_path)
    assert (run / "report.html").is_file() and digest(run) == before


def test_a_run_whose_report_cannot_be_written_is_not_finished(tiny_model, pictures, tmp_path):
    blocked = tmp_path / "r" / "report.html"
    blocked.mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"report.html cannot be written \(Is a directory\).*keeps its state after step 7"
    ):
        train(tiny_model, pictures, tmp_path)
    assert status(tmp_path / "r")["state"] == "failed" and status(tmp_path / "r")["step"] == 7
    blocked.rmdir()
    train(tiny_model, pictures, tmp_path)
    assert status(tmp_path / "r")["state"] == "finished" and blocked.is_file()
