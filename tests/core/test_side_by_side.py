"""Comparisons of variants: a process each, in turns; medians, ratios, claims, random models, the chart."""

import json
import mmap
import time
from dataclasses import replace
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from retune.benchmarks import anonymous_memory, gpu, own_runs, processes, side_by_side
from retune.benchmarks.__main__ import main
from retune.benchmarks.comparisons import COMPARISONS, LORA, Claim, Comparison, Variant
from retune.benchmarks.gpu import GpuConfig, summary
from retune.benchmarks.processes import Case, median_of, run_in_turns
from retune.benchmarks.random_models import default_side, random_weights
from retune.benchmarks.recorder import Marks, Recorder
from retune.benchmarks.side_by_side import StepConfig, check, claims_on, rows_of, shown, why_not
from retune.training.commands.open_model import TEXT_ENCODER, VAE
from retune.training.common.callbacks import Callbacks
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
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


def test_a_variant_that_fails_is_named_with_its_error_and_the_others_go_on():
    def run(which, left):
        if which.variant == "b":
            raise RuntimeError("lora, variant 'b', ended with code 1:\nTraceback\nRuntimeError: no recipe\n")
        if which.variant == "c" and (tries := tried.append(1) or len(tried)) > 1:
            raise RuntimeError(f"failed at {tries}")
        return {"seconds": [1]}

    tried = []
    found = run_in_turns([case("a"), case("b"), case("c")], 3, run=run)
    assert found["a"] == [{"seconds": [1]}] * 3 and found["b"] == [{"skipped": "failed: RuntimeError: no recipe"}]
    assert found["c"] == [{"seconds": [1]}] and len(tried) == 2  # what it had measured stays

    def stop(which, left):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_turns([case("a")], 1, run=stop)


def test_a_comparison_lists_a_variant_that_fails(tmp_path, monkeypatch):
    def run(which, left):
        if which.variant != "limit, fp32":
            raise RuntimeError("a long story\nOSError: no such file")
        return {"seconds": [1.0], "training": 10**9}

    monkeypatch.setattr(side_by_side, "write_model", lambda size, folder: tmp_path)
    monkeypatch.setattr(side_by_side, "run_case", run)
    config = StepConfig(only="limit, fp32;Retune, fp32", output=tmp_path, memory=100)
    found = side_by_side.run_comparison(LORA, config, "demo", 1, 1, None, Callbacks())
    assert [row["variant"] for row in found["rows"]] == ["limit, fp32"] and (tmp_path / "lora demo.png").is_file()
    assert found["skipped"] == {"Retune, fp32": "failed: OSError: no such file"}


@pytest.mark.parametrize("error", [RuntimeError, TimeoutError, ValueError, URLError])
def test_a_stage_of_the_gpu_run_that_fails_loses_no_other(tmp_path, monkeypatch, error):
    def fails(deadline):
        raise error("no such node")

    rows = {"rows": [{"variant": "Retune, bf16", "pictures a second": 2.0, "training": 10**9}], "claims": ["holds."]}
    both = [gpu.Stage("demo", fails), gpu.Stage("lora, sd15", lambda deadline: rows)]
    monkeypatch.setattr(gpu, "stages", lambda *arguments: both)
    found = gpu.run_gpu_bench(GpuConfig(on_cpu=True), StepConfig(output=tmp_path), None, Callbacks())
    assert found["skipped"]["demo"].startswith("failed: ") and "no such node" in found["skipped"]["demo"]
    assert [row["stage"] for row in found["rows"]] == ["lora, sd15"] and found["claims"] == ["lora, sd15: holds."]


def test_every_part_of_the_gpu_run_has_its_share_and_what_earlier_ones_left(tmp_path, monkeypatch):
    now, given = [1000.0], []

    def stage(name, share, takes):
        def run(deadline):
            given.append((name, deadline - now[0]))
            now[0] += takes
            return {"rows": []}

        return gpu.Stage(name, run, share)

    parts = [stage("demo", 2, 40), stage("lora", 1, 30), stage("reward", 1, 60), stage("memory", 1, 1)]
    monkeypatch.setattr(gpu, "stages", lambda *arguments: parts)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    found = gpu.run_gpu_bench(GpuConfig(on_cpu=True, minutes=2), StepConfig(output=tmp_path), None, Callbacks())
    assert given == [("demo", 48.0), ("lora", pytest.approx(80 / 3)), ("reward", 25.0)]
    assert found["skipped"] == {"memory": "no time was left"} and found["seconds"] == 130


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_run_ends_with_a_line_that_says_how_to_try_it(capsys):
    assert main(["gpu"]) == 2
    assert "device is cpu; expected a GPU. --gpu-on-cpu tries the script without one." in capsys.readouterr().err


def test_the_gpu_run_names_variants_that_there_are_and_fits_its_time():
    for name, only in gpu.ONLY.items():
        chosen = StepConfig(only=only).chosen(COMPARISONS[name].variants)
        assert len(chosen) == only.count(";") + 1 and all(variant.endswith("bf16") for variant in chosen)
        over = {claim.over for claim in COMPARISONS[name].claims if {claim.of, claim.over} <= chosen.keys()}
        assert over >= ({"limit, bf16", "diffusers + peft, bf16"} if name == LORA else {"Retune, K = 1, batch 1, bf16"})
    planned = list(gpu.stages(GpuConfig(), StepConfig(), None, Callbacks()))
    assert [stage.name for stage in planned] == [
        *("demo in ComfyUI", "lora, sd15", "lora, sdxl", "reward, sd15", "reward, sdxl"),
        *("memory, sd15", "memory, sdxl"),
    ]
    assert sum(stage.share for stage in planned) == 60 * GpuConfig().minutes


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
    assert check(Claim("a", "a", "loading/training", least=0.9, most=2), rows).endswith(
        "is 1.500; at least 0.9 and at most 2: holds."
    )
    assert check(Claim("b", "a", "seconds", least=0.96, most=1.1), rows).endswith("missed by 0.8 %.")
    assert check(Claim("a", "b", "training", most=1.0), rows).endswith("a is ? x b; at most 1: not measured.")
    assert check(Claim("a", "c", "seconds"), rows) == "seconds: a is ? x c: not measured."


def test_claims_are_of_the_variants_that_are_run_on_pictures_large_enough():
    claims = [Claim("a", "b", "seconds"), Claim("a", "c", "seconds"), Claim("b", "a", "seconds", from_side=512)]
    rows = [{"variant": name, "seconds": 1.0} for name in "ab"]
    assert claims_on(claims, rows, "ab", 256) == ["seconds: a is 1.000 x b."]
    assert len(claims_on(claims, rows, "abc", 512)) == 3


def test_a_run_that_says_what_it_takes_is_compared_with_what_it_took(monkeypatch):
    levels = [100]
    monkeypatch.setattr(anonymous_memory, "anonymous_bytes", lambda: levels[0])
    monkeypatch.setattr(anonymous_memory.torch.cuda, "is_available", lambda: False)
    taken = Recorder(case("a"), anonymous_memory.PeakMemory())
    levels[0] = 300
    Marks(taken).on_memory("memory: at most about 1 kB", 50)
    assert taken.figures()["estimate"] == 250


def test_pictures_are_smaller_on_a_cpu():
    sizes = ("demo", "sd15", "sdxl")
    assert [default_side(size, "cuda") for size in sizes] == [128, 512, 1024]
    assert [default_side(size, "cpu") for size in sizes] == [128, 256, 256]


@pytest.mark.parametrize(
    ("config", "visiting", "text_trains"),
    [
        (TrainModelConfig(run_name="r"), {VAE, TEXT_ENCODER}, False),
        (TrainModelConfig(run_name="r", settings=own_runs.settings_of("fp32", caption_shuffle=True)), {VAE}, False),
        (LoraConfig(run_name="r"), {VAE, TEXT_ENCODER}, False),
        (LoraConfig(run_name="r", text_encoder_learning_rate=1e-4), {VAE}, True),
        (EmbeddingConfig(run_name="r", token="<a>"), {VAE}, True),
        (RewardTuneConfig(run_name="r", train="UNet LoRA"), {TEXT_ENCODER}, False),
        (RewardTuneConfig(run_name="r", train="text encoder"), set(), True),
    ],
)
def test_a_run_here_opens_its_model_as_a_command_does(monkeypatch, config, visiting, text_trains):
    """What waits in RAM, and whether the text encoder is in fp32, goes by what trains."""
    opened, begun = [], []

    def build(model, dtype, trains, visiting, text_trains, replaced):
        opened.append((model.model, visiting, text_trains))
        assert replaced == isinstance(config, TrainModelConfig)

    monkeypatch.setattr(own_runs, "build_model", build)
    recorder = SimpleNamespace(begin=begun.append)
    config = replace(config, settings=replace(config.settings, precision="fp32"))
    own_runs.open_model(case("a", model="folder"), recorder, config)
    assert opened == [("folder", visiting, text_trains)] and begun == ["loading", "preparing"]


def test_every_claim_is_about_variants_that_are_there():
    for comparison in COMPARISONS.values():
        assert all({claim.of, claim.over} <= comparison.variants.keys() for claim in comparison.claims)
        assert all(comparison.baseline_of(name) in comparison.variants for name in comparison.variants)


def test_what_does_not_fit_or_is_missing_is_left_out_by_name():
    config = StepConfig(memory=9)
    full = COMPARISONS["finetune"].variants["Retune, fp32"]
    assert why_not(full, "sd15", 128, 1, config, None, "cpu").startswith("needs about 16.5 GB of 9.0 GB")
    assert why_not(full, "demo", 128, 1, config, None, "cpu") == ""
    assert why_not(Variant("m", "f", needs="comfyui"), "demo", 64, 1, config, None, "cpu") == "no ComfyUI"
    assert why_not(Variant("m", "f", needs="no_such_package"), "demo", 64, 1, config, None, "cpu").endswith("installed")
    assert list(StepConfig(only="limit, bf16").chosen(COMPARISONS[LORA].variants)) == ["limit, bf16"]
    in_order = StepConfig(only="Retune, fp32; limit").chosen(COMPARISONS[LORA].variants)
    assert list(in_order) == ["Retune, fp32", "limit, fp32", "limit, bf16"]
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
    """Pages from the system itself: an allocator may give those again that the process holds already."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    size, before = 1 << 27, anonymous_memory.anonymous_bytes()
    with mmap.mmap(-1, size, **private) as kept:
        for start in range(0, size, mmap.PAGESIZE):
            kept[start] = 1
        gained = anonymous_memory.anonymous_bytes() - before
    assert gained == pytest.approx(size, rel=0.05)


def test_the_longest_bar_is_the_largest_value():
    assert bar_lengths([1, 4, 2], 100) == [25, 100, 50] and bar_lengths([0, 0], 100) == [0, 0]
    picture = bar_chart("title", ["a", "b", "c"], {"seconds": [1, 4, 2], "GB": [1, 1, 1]})
    assert picture.shape == (TOP + 3 * LINE + 16, WIDTH, 3)


def test_the_gpu_table_has_rates_and_peaks_of_every_kind_of_stage():
    steps = summary({"rows": [{"variant": "Retune, bf16", "pictures a second": 2.0, "training": 3 * 10**9}]})
    memory = summary({"rows": [{"training": "LoRA", "setting": "bf16", "peak": 9, "measured": 10**9, "ratio": 1.01}]})
    assert steps == [{"variant": "Retune, bf16", "pictures a second": 2.0, "peak GB": 3.0, "estimate / measured": ""}]
    told = summary({"rows": [{"variant": "Retune, bf16", "training": 3 * 10**9, "estimate": 27 * 10**8}]})
    assert told[0]["estimate / measured"] == 0.9
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
