"""Real processes: killed without warning and started again, and two that share one run."""

import json
import os
import random
import socket
import subprocess
import sys

import pytest
import torch
from retune.training.__main__ import main
from retune.training.common.foreign import read_tensors

pytestmark = pytest.mark.slow


KILLED = """
import os, random, signal, sys, threading, time
from pathlib import Path

from retune.training.__main__ import main

metrics, step = Path(sys.argv[1]), int(sys.argv[2])


def kill():
    while not metrics.exists() or metrics.read_text().count("grad_norm") < step:
        time.sleep(0.001)
    time.sleep(0.03 * random.random())
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # SIGTERM is TerminateProcess on Windows


threading.Thread(target=kill, daemon=True).start()
main(sys.argv[3:])
"""


LOGGED = """
import sys
from pathlib import Path

import torch
from retune.training.config.run import SamplePrompts, TrainingSettings
from retune.training.loop.loop import Loop, LoopConfig
from retune.training.models.parameters import parameter_refs
from retune.training.objectives.objective import Loss
from retune.training.runs.folder import RunFolder
from retune.training.trainables.weights import SelectedWeights

layer = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(layer.weight, 0.5)


class Batches:
    def batch(self, number):
        return [3.0 * number, 3.0 * number + 1, 3.0 * number + 5, 3.0 * number + 6]


class Objective:
    def load(self, slots):
        return slots

    def __call__(self, batch, step):
        numbers = torch.tensor([number for _, number in batch])
        return Loss(layer.weight.flatten() * numbers, {"mean": numbers.mean(), "one": torch.ones(())})

    def state(self):
        return {}


settings = TrainingSettings(gradient_accumulation=2, optimizer="SGD", weight_decay=0.0)
config = LoopConfig(steps=1, batch_size=4, learning_rate=0.1, settings=settings, samples=SamplePrompts())
weights = SelectedWeights(parameter_refs(layer, "w."), [layer])
Loop(RunFolder(Path(sys.argv[1])), weights, Objective(), Batches(), config).run()
"""


def start(*arguments, **environment):
    """A Python process of one thread; its output goes to a pipe."""
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(*arguments):
    """Two processes that join into one world; returns when both have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [start(*arguments, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)


def test_killed_runs_end_with_the_same_bits(train_arguments, tmp_path):
    flags = ["--steps", "12"]
    assert main(train_arguments(tmp_path / "whole", *flags)) == 0
    metrics = tmp_path / "killed" / "r" / "metrics.jsonl"
    kills = sorted(random.sample(range(1, 11), 2))
    for step in kills:  # by the process itself, somewhere in the step after this one
        process = start("-c", KILLED, metrics, step, *train_arguments(tmp_path / "killed", *flags))
        output, _ = process.communicate(timeout=600)
        assert process.returncode != 0 and "Traceback" not in output, output
        assert not (tmp_path / "killed" / "r" / "model.safetensors").exists()
        status = json.loads((tmp_path / "killed" / "r" / "status.json").read_text(encoding="utf-8"))
        assert status["state"] == "running"
    process = start("-m", "retune.training", *train_arguments(tmp_path / "killed", *flags))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    whole, killed = (tmp_path / name / "r" for name in ("whole", "killed"))
    names = ["metrics.jsonl", "model.safetensors", *(f"samples/{p.name}" for p in (whole / "samples").iterdir())]
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs, killed at {kills}"


# not the layers of the time: norms of one channel a group take them away, and AdamW makes steps of what rounding left
LORA = ["--targets", "regex", "--target-regex", "^(?!.*emb_layers).*(block|text_encoders)", "--algorithm", "LoCon"]
REWARD = ["--rewards", "demo CLIP", "--sampling-steps", "2", "--gradient-steps", "1", "--width", "32", "--height", "32"]
KINDS = {
    "train": ("model.safetensors", []),
    "lora": ("lora.safetensors", [*LORA, "--rank", "4", "--text-encoder-learning-rate", "1e-3", "--steps", "4"]),
    "embedding": ("tokens.safetensors", ["--token", "<it>", "--vectors", "2", "--steps", "2"]),
    "reward": ("lora.safetensors", [*REWARD, "--train", "text encoder LoRA", "--optimizer", "SGD", "--steps", "2"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(train_arguments, tmp_path, kind):
    """A LoRA's text encoder trains too."""
    file, more = KINDS[kind]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo small blue squares\na green star\n", encoding="utf-8")

    def arguments(output):
        _, *flags = train_arguments(output, "--ema-decay", "0", *more)
        return [kind, *flags, *(["--prompts", str(prompts)] if kind == "reward" else [])]

    assert main(arguments(tmp_path / "one")) == 0
    start_two("-m", "retune.training", *arguments(tmp_path / "two"))
    rows = [
        [
            json.loads(line)
            for line in (tmp_path / name / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("one", "two")
    ]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a.get("event") == b.get("event")
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        if "grad_norm" in a:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    one, two = (read_tensors(tmp_path / name / "r" / file)[0] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-3)
    moved = [(one[name] - two[name]).norm() / one[name].norm() for name in one]
    assert max(moved) < 1e-3


def test_two_processes_log_the_figures_of_the_whole_step(tmp_path):
    start_two("-c", LOGGED, tmp_path)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    mean = (3 + 4 + 8 + 9 + 6 + 7 + 11 + 12) / 8  # two batches of four, of which a process sees two each
    assert row["mean"] == pytest.approx(mean) and row["one"] == pytest.approx(1)
    assert row["loss"] == pytest.approx(0.5 * mean) and row["grad_norm"] == pytest.approx(mean)


def test_two_processes_end_together_when_a_run_is_asked_to_finish(tmp_path):
    (tmp_path / "finish").touch()
    start_two("-c", LOGGED.replace("steps=1", "steps=50"), tmp_path)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["step"] == 1 and not (tmp_path / "finish").exists()
