"""Benchmarks: turns are interleaved, the first turn does not count, every one runs on the demo model."""

import json
import math

import pytest
import torch
from retune.benchmarks import data, word_study
from retune.benchmarks.__main__ import main
from retune.benchmarks.catalog import DATA, DEMO_MODEL, GPU, LORA_LOSS, MEMORY, REWARD_METHODS, STUDIES
from retune.benchmarks.comparisons import COMPARISONS
from retune.benchmarks.demo_model import Drawn, paired_gain
from retune.benchmarks.speed import TIMINGS, run_timing
from retune.benchmarks.timing import median_seconds
from retune.training.common.callbacks import Callbacks
from retune.training.demo.judge import ALIGNMENT
from retune.training.demo.scenes import ATTRIBUTES, QUALITY_WORDS


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
    others = COMPARISONS.keys() | {DATA, DEMO_MODEL, GPU, LORA_LOSS, MEMORY, REWARD_METHODS}
    assert json.loads(capsys.readouterr().out).keys() == TIMINGS.keys() | STUDIES.keys() | others
    assert main(["speed"]) == 2
    names = (
        "lora, finetune, embedding, reward, encode, startup, memory, data, gpu, training-step, drawing, text, "
        "demo-model, lora-loss, reward-methods, reset-study, projection-start, reward-study, word-study, "
        "precision-study"
    )
    assert f"benchmark is 'speed'; expected one of {names}" in capsys.readouterr().err


def test_the_demo_model_is_measured_word_by_word(capsys):
    assert main(["demo-model", "--captions", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["said"] for row in figures["rows"]] == [
        *(ALIGNMENT, *ATTRIBUTES, *QUALITY_WORDS),
        "glossy, sunlit, rich",
    ]
    assert all(0 <= row["read right"] <= 1 and row["error"] > 0 for row in figures["rows"])
    assert all(f"| {row['said']} | {row['read right']:.3f} " in figures["table"] for row in figures["rows"])
    assert main(["demo-model", "--captions", "1"]) == 2


def test_data_is_measured_stage_by_stage(tmp_path, capsys):
    sizes = "--data-images 20 --data-prompts 100 --data-side 32 --data-batches 3 --batch-size 4"
    more = ["--data-step-seconds", "0.5", "--data-output", str(tmp_path)]
    assert main(["data", *sizes.split(), *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = found["rows"]
    assert [(row["stage"], row["count"]) for row in rows] == [
        *(("read the folder", 20), ("fingerprint", 20), ("fill the cache", 20), ("check a full cache", 20)),
        *(("shuffle an epoch", 20), ("batches from disk", 3), ("batches from memory", 3)),
        *(("open the prompts", 100), ("shuffle the prompts", 100), ("batches of prompts", 3)),
        ("SD1.5 step of 4 at 256 pixels", 1),
    ]
    ratios = {row["stage"]: row["ratio"] for row in rows if row["ratio"] is not None}
    assert ratios.keys() == {*data.BATCHES, rows[-1]["stage"]} and ratios[rows[-1]["stage"]] == 1
    assert ratios["batches from disk"] == pytest.approx(rows[5]["ms each"] / 500)
    assert len(found["claims"]) == 3 and all("at most 0.01: " in claim for claim in found["claims"])
    assert (tmp_path / "data.png").is_file() and found["chart"] == str((tmp_path / "data.png").resolve())


def test_batches_are_compared_with_the_largest_step_that_fits(monkeypatch):
    sizes, config = [], data.DataConfig()
    need = COMPARISONS["lora"].variants["limit, fp32"].bytes_needed
    monkeypatch.setattr(data.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "bare_step_seconds", lambda *arguments: sizes.append(arguments) or 2.0)
    monkeypatch.setattr(data, "free_memory", lambda device: need("sd15", 256, 5))
    assert data.measure_step(config, 16, Callbacks()) == (2.0, 4) and sizes == [("sd15", "fp32", 256, 4, 2, "cpu")]
    monkeypatch.setattr(data, "free_memory", lambda device: 10**9)
    assert data.measure_step(config, 16, Callbacks()) == (0.0, 0)
    rows = [{"stage": "batches from disk", "ms each": 20.0}]
    assert data.compare(rows, 0.0, 0)[1].keys() == {"SD1.5 step"} and rows[0]["ratio"] is None
    assert data.compare(rows, 2.0, 4)[0][0].endswith("is 0.010 x SD1.5 step of 4 at 256 pixels; at most 0.01: holds.")


@pytest.mark.slow
def test_a_bare_step_of_true_size_takes_time():
    """SD1.5's UNet with random weights, at 64 pixels."""
    assert data.bare_step_seconds("sd15", "bf16", 64, 1, 1, "cpu") > 0


@pytest.mark.slow
def test_the_memory_of_the_demo_model_is_computed_as_it_is(tmp_path, capsys):
    assert main(["memory", "--memory-pixels", "64", "--memory-output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["rows"]) == 9 and found["size"] == "demo" and (tmp_path / "memory demo.png").is_file()
    weights = {(row["training"], row["setting"]): row["weights"] for row in found["rows"]}
    assert weights["LoRA", "bf16"] < 0.6 * weights["LoRA", "fp32"]
    assert all(0.9 < row["ratio"] < 1.1 for row in found["rows"])


def test_the_gain_is_of_pairs_in_deviations_of_what_was_before():
    before, after = (Drawn(torch.tensor(scores), {}) for scores in ([1.0, 2.0, 3.0], [2.0, 4.0, 3.0]))
    assert paired_gain(before, after) == pytest.approx((1.0, 1 / math.sqrt(3)))


def test_findings_name_the_mean_the_worst_and_the_best_choice_of_pictures():
    shares = {0: 0.5, 1: 0.9, 2: 0.7}
    rows = [
        {"figure": "heart", "pictures": choice, "drawn": share, "drawn_se": 0.01} for choice, share in shares.items()
    ]
    (sentence,) = word_study.findings(rows)
    assert sentence.startswith("heart: 0.70 over 3 choices of pictures, from 0.50")
    assert "(pictures 0) to 0.90" in sentence and sentence.endswith("(pictures 1).")
