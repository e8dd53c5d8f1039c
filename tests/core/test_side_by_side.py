"""Comparisons of variants: a process each, in turns; medians, ratios, claims, random models, the chart."""

import json
import time

import pytest
import torch
from retune.benchmarks import anonymous_memory, processes
from retune.benchmarks.__main__ import main
from retune.benchmarks.comparisons import COMPARISONS, LORA, Claim, Comparison, Variant
from retune.benchmarks.gpu import GpuConfig, summary
from retune.benchmarks.processes import Case, median_of, run_in_turns
from retune.benchmarks.random_models import random_weights
from retune.benchmarks.side_by_side import StepConfig, check, rows_of, shown, why_not
from retune.training.plots.bar_chart import LINE, TOP, WIDTH, bar_chart, bar_lengths


def case(variant, **changes):
    values = {"bench": LORA, "variant": variant, "size": "demo", "model": "", "work": "", "pixels": 64}
    return Case(**(values | {"batch_size": 1, "rank": 4, "rounds": 2, "device": "cpu"} | changes))


def test_variants_take_turns_and_one_that_is_skipped_is_not_run_again():
    order = []

    def run(which, left):
        order.append((which.variant, left))
        return {"skipped": "memory ran out"} if which.variant == "b" else {"seconds": [len(order)]}

    found = run_in_turns([case("a"), case("b"), case("c")], 2, run=run)
    assert order == [("a", None), ("b", None), ("c", None), ("a", None), ("c", None)]
    assert found["a"] == [{"seconds": [1]}, {"seconds": [4]}] and found["b"] == [{"skipped": "memory ran out"}]
    late = run_in_turns([case("a")], 2, deadline=time.monotonic() - 1, run=run)
    assert late == {"a": [{"skipped": "no time was left"}]} and len(order) == 5


def test_a_turn_that_does_not_end_leaves_the_earlier_figures():
    answers = iter([{"seconds": [1]}, {"skipped": "not done in 1 s"}, {"seconds": [3]}])
    assert run_in_turns([case("a")], 3, run=lambda which, left: next(answers)) == {
        "a": [{"seconds": [1]}, {"seconds": [3]}]
    }


def test_medians_are_over_all_steps_of_all_processes():
    runs = [{"seconds": [1.0, 9.0], "training": 10}, {"seconds": [2.0], "training": 30, "loading": None}]
    assert (median_of(runs, "seconds"), median_of(runs, "training"), median_of(runs, "loading")) == (2.0, 20, None)


def test_a_process_that_fails_says_why_and_one_without_memory_is_skipped(monkeypatch):
    class Done:
        stdout, stderr, returncode = 'noise\n{"seconds": [1]}\n', "", 0

    monkeypatch.setattr(processes.subprocess, "run", lambda *a, **k: Done)
    assert processes.run_case(case("a")) == {"seconds": [1]}
    Done.returncode = processes.KILLED
    assert processes.run_case(case("a")) == {"skipped": "memory ran out"}
    Done.returncode, Done.stderr = 1, "ValueError: no such thing"
    with pytest.raises(RuntimeError, match="lora, variant 'a', ended with code 1:\nValueError: no such thing"):
        processes.run_case(case("a"))


VARIANTS = {name: Variant("own_runs", "x") for name in ("limit, fp32", "Own, fp32", "limit, bf16", "Own, bf16")}


def test_ratios_are_of_the_baseline_of_the_same_precision():
    comparison = Comparison("", VARIANTS, baseline="limit")
    seconds = {"limit, fp32": 2.0, "Own, fp32": 2.1, "limit, bf16": 1.0, "Own, bf16": 1.5}
    rows = rows_of(comparison, {name: [{"seconds": [value]}] for name, value in seconds.items()}, 4)
    ratios = [row["ratio"] for row in rows]
    assert ratios == pytest.approx([1, 1.05, 1, 1.5]) and rows[0]["pictures a second"] == 2.0
    only = rows_of(comparison, {"Own, fp32": [{"seconds": [2.1], "training": 5 * 10**9}]}, 1)
    assert only[0]["ratio"] is None and shown(only[0])["training, peak GB"] == 5.0


def test_a_claim_tells_by_how_much_it_is_missed():
    rows = [{"variant": "a", "seconds": 2.1, "loading": 3, "training": 2}, {"variant": "b", "seconds": 2.0}]
    assert check(Claim("a", "b", "seconds", most=1.05), rows) == "seconds: a is 1.050 x b; at most 1.05: holds."
    assert check(Claim("a", "b", "seconds", most=1.0), rows).endswith("at most 1: missed by 5.0 %.")
    assert check(Claim("b", "a", "seconds", least=1.0), rows).endswith("at least 1: missed by 5.0 %.")
    assert check(Claim("a", "a", "loading/training", most=1.0), rows).endswith("is 1.500; at most 1: missed by 50.0 %.")
    assert check(Claim("a", "b", "training", most=1.0), rows) == check(Claim("a", "c", "seconds"), rows) == ""


def test_every_claim_is_about_variants_that_are_there():
    for comparison in COMPARISONS.values():
        assert all({claim.of, claim.over} <= comparison.variants.keys() for claim in comparison.claims)
        assert all(comparison.baseline_of(name) in comparison.variants for name in comparison.variants)


def test_what_does_not_fit_or_is_missing_is_left_out_by_name():
    config = StepConfig(memory=9)
    full = COMPARISONS["finetune"].variants["Retune, fp32"]
    assert why_not(full, "sd15", 128, 1, config, None, "cpu").startswith("needs about 18.2 GB of 9.0 GB")
    assert why_not(full, "demo", 128, 1, config, None, "cpu") == ""
    assert why_not(Variant("m", "f", needs="comfyui"), "demo", 64, 1, config, None, "cpu") == "no ComfyUI"
    assert why_not(Variant("m", "f", needs="no_such_package"), "demo", 64, 1, config, None, "cpu").endswith("installed")
    assert list(StepConfig(only="limit, bf16").chosen(COMPARISONS[LORA].variants)) == ["limit, bf16"]
    with pytest.raises(ValueError, match="only is 'nothing'; expected a part of one of limit, fp32"):
        StepConfig(only="nothing").chosen(COMPARISONS[LORA].variants)


def test_random_weights_have_the_variance_of_their_inputs():
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.LayerNorm(256))
    weights = dict(random_weights(network))
    assert all(value.dtype == torch.float16 for value in weights.values())
    assert weights["0.weight"].float().std().item() == pytest.approx(1 / 8, rel=0.02)
    assert weights["1.weight"].eq(1).all() and weights["0.bias"].eq(0).all() and weights["1.bias"].eq(0).all()


def test_peaks_are_by_phase_and_above_the_start(monkeypatch):
    levels = [100]
    monkeypatch.setattr(anonymous_memory, "anonymous_bytes", lambda: levels[0])
    monkeypatch.setattr(anonymous_memory, "EVERY", 60)
    with anonymous_memory.PeakMemory() as memory:
        for phase, level in (("loading", 300), ("training", 250)):
            memory.begin(phase)
            levels[0] = level
    assert memory.peaks["loading"] == 200 and memory.peaks["training"] == 200  # what is there when a phase begins
    assert memory.peaks[""] == 150


def test_anonymous_bytes_count_what_is_allocated():
    before = anonymous_memory.anonymous_bytes()
    kept = torch.ones(1 << 25)
    assert anonymous_memory.anonymous_bytes() - before == pytest.approx(kept.nbytes, rel=0.05)


def test_the_longest_bar_is_the_largest_value():
    assert bar_lengths([1, 4, 2], 100) == [25, 100, 50] and bar_lengths([0, 0], 100) == [0, 0]
    picture = bar_chart("title", ["a", "b", "c"], {"seconds": [1, 4, 2], "GB": [1, 1, 1]})
    assert picture.shape == (TOP + 3 * LINE + 16, WIDTH, 3)


def test_the_gpu_table_has_rates_and_peaks_of_every_kind_of_stage():
    steps = summary({"rows": [{"variant": "Retune, bf16", "pictures a second": 2.0, "training": 3 * 10**9}]})
    memory = summary({"rows": [{"training": "LoRA", "setting": "bf16", "peak": 9, "measured": 10**9, "ratio": 1.01}]})
    assert steps == [{"variant": "Retune, bf16", "pictures a second": 2.0, "peak GB": 3.0, "estimate / measured": ""}]
    assert memory[0]["variant"] == "LoRA, bf16" and memory[0]["peak GB"] == 1.0
    with pytest.raises(ValueError, match="sizes are flux; expected demo, sd15 or sdxl"):
        GpuConfig(sizes=("flux",))


@pytest.mark.slow
def test_lora_steps_are_compared_on_the_demo_model(tmp_path, capsys):
    sizes = ["--step-output", str(tmp_path), "--step-pixels", "64", "--step-turns", "1", "--rounds", "2"]
    assert main(["lora", *sizes, "--step-only", "limit, fp32;Retune, fp32;peft, fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["variant"] for row in found["rows"]] == ["limit, fp32", "Retune, fp32", "diffusers + peft, fp32"]
    assert all(row["seconds"] > 0 and row["training"] > 0 and row["loading"] > 0 for row in found["rows"])
    assert found["rows"][1]["trained"] == found["rows"][2]["trained"] > 0  # both adapt the same layers
    assert (tmp_path / "lora demo.png").is_file() and found["claims"]
