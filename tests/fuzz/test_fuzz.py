"""A thousand wrong files, and ten kills: what `python run.py fuzz` and `python run.py kill` do, in little."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

HERE = Path(__file__).resolve().parent
needs_fork = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="forks with handles, which only Linux has")


def run(program, *flags):
    """The figures of a program here, and its exit status."""
    command = [sys.executable, str(HERE / program), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.returncode


@needs_fork
@pytest.mark.slow
def test_a_thousand_wrong_files_are_read_or_refused_by_name():
    figures, status = run("fuzz.py", "--cases", "1000", "--seed", "16")
    assert figures["wrong"] == [] and status == 0
    assert figures["cases"] == 1000 and figures["loaders"] > 40 and figures["outcomes"]["refused"] > 500


@needs_fork
@pytest.mark.slow
def test_ten_killed_runs_end_with_the_same_bytes():
    figures, status = run("kill.py", "--count", "10", "--seed", "16")
    assert figures["wrong"] == [] and status == 0 and figures["kills"] == 10


@needs_fork
def test_a_wrong_reader_is_found_out(tmp_path, monkeypatch):
    """What the fuzzer is for: each kind of wrong is seen, and one that refuses by name is not blamed."""
    monkeypatch.syspath_prepend(str(HERE))
    import fuzz
    from loaders import Loader

    (tmp_path / "seeds").mkdir()
    seed = tmp_path / "seeds" / "data.txt"
    seed.write_text("words\n", encoding="utf-8")

    def refuse(path):
        raise ValueError(f"{path.name}: no words; expected some")

    def hang(path):
        while True:
            pass

    def outcome(load):
        case = fuzz.run_case(3, 0, [Loader("test", seed, "", load)], tmp_path)
        return case.outcome

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "mutate", lambda path, random, others: path.write_bytes(b"\xff") and "bytes")
    assert outcome(lambda path: None) == "read" and outcome(refuse) == "refused"
    assert outcome(lambda path: {}["words"]) == "raw" and outcome(lambda path: path.read_text("utf-8")) == "raw"
    assert outcome(lambda path: int("words")) == "unnamed" and outcome(hang) == "hang"
    assert outcome(lambda path: os.abort()) == "crash" and outcome(lambda path: os.system("true")) == "write"
    assert outcome(lambda path: bytearray(3 << 30)) == "memory"
    assert outcome(lambda path: (tmp_path / "stray").write_text("x")) == "write"
    assert outcome(lambda path: (path.parent / "CANARY").touch()) == "code"


def test_mutations_are_a_function_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import odd

    content = {"a": [1, {"b": "text"}], "layers": 2}
    made = [json.dumps(odd.changed(json.loads(json.dumps(content)), Random(seed))) for seed in range(50)]
    again = [json.dumps(odd.changed(json.loads(json.dumps(content)), Random(seed))) for seed in range(50)]
    assert made == again and len(set(made)) > 25
