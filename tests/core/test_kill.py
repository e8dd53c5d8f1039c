"""Real processes, killed without warning and started again."""

import json
import os
import random
import subprocess
import sys

import pytest
from retune.training.__main__ import main

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


def start(*arguments, **environment):
    """A Python process of one thread; its output goes to a pipe."""
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
