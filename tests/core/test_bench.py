"""Benchmarks: turns are interleaved, the first turn does not count, every one runs on the demo model."""

import json

import pytest
from retune.benchmarks.__main__ import main
from retune.benchmarks.catalog import LORA, REWARD, STUDIES
from retune.benchmarks.speed import TIMINGS, run_timing
from retune.benchmarks.timing import median_seconds


def test_medians_of_interleaved_turns_without_the_first():
    now, order = [0.0], []
    spent = {"a": iter([100, 1, 2, 9]), "b": iter([100, 5, 5, 4])}

    def turn(name):
        order.append(name)
        now[0] += next(spent[name])

    found = median_seconds({name: lambda name=name: turn(name) for name in spent}, 3, lambda: now[0])
    assert found == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize("name", TIMINGS)
def test_every_benchmark_gives_seconds_and_ratios(name):
    figures = run_timing(name, rounds=1, batch_size=2)
    variants = [value for value in figures.values() if isinstance(value, dict)]
    assert len(variants) >= 2 and variants[0]["ratio"] == 1
    assert all(v["seconds"] > 0 and v["ratio"] > 0 for v in variants)


def test_the_command_line_lists_them_and_refuses_others(capsys):
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == TIMINGS.keys() | STUDIES.keys() | {LORA, REWARD}
    assert main(["speed"]) == 2
    names = "training-step, drawing, text, reward, reset-study, projection-start, reward-study, lora"
    assert f"benchmark is 'speed'; expected one of {names}" in capsys.readouterr().err
