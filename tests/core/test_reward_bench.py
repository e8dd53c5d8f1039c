"""The reward benchmark: bytes that autograd keeps, ways that give the same gradient, and memory that is flat in K."""

import json

import pytest
import torch
from retune.benchmarks.__main__ import main
from retune.benchmarks.memory import peak_saved_bytes
from retune.benchmarks.reward import (
    CHECKPOINTED,
    JOINT,
    METHODS,
    OFFICIAL,
    STEPWISE,
    Bench,
    RewardBenchConfig,
    build_result,
    make_steps,
    measure_memory,
)
from retune.training.recipes.reward import build_trainable
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward


def test_kept_bytes_are_those_of_live_storages_each_once():
    x = torch.ones(1000, requires_grad=True)
    one = 4000

    def chain(count):
        y = x
        for _ in range(count):
            y = y.exp()  # keeps its result
        y.sum().backward()

    assert peak_saved_bytes(lambda: chain(3)) == 3 * one
    assert peak_saved_bytes(lambda: [chain(3) for _ in range(5)]) == 3 * one  # freed by each backward pass
    assert peak_saved_bytes(lambda: (x.view(10, 100) * x.view(10, 100).T.T).sum().backward()) == one
    assert peak_saved_bytes(lambda: x.pow(2).sum().backward(), [x]) == 0
    again = torch.utils.checkpoint.checkpoint
    kept = peak_saved_bytes(lambda: again(lambda x: x.exp().exp().exp(), x, use_reentrant=True).sum().backward(), [x])
    assert kept == 3 * one


@pytest.fixture
def bench_of(tiny_model):
    """`bench(pixels, T)` of the tiny model and the demo's rewards, two pictures a step."""
    reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind=k))) for k in ("demo aesthetic", "demo CLIP")])

    def bench(pixels, sampling_steps):
        sizes = {"pixels": pixels, "sampling_steps": sampling_steps, "gradient_steps": (1,), "batch_size": 2}
        config = RewardBenchConfig(**sizes)
        return Bench(tiny_model, reward, config, build_trainable(tiny_model, config.tuning(1)))

    return bench


def gradients(bench, way, steps):
    for parameter in bench.parameters():
        parameter.grad = None
    METHODS[way](bench, steps)()
    return {name: p.grad.clone() for name, p in bench.trainable.parameters.items() if p.grad is not None}


def test_the_ways_give_one_gradient_and_the_published_schedule_wastes_others(bench_of):
    bench = bench_of(16, 4)
    network, wanted = bench.model.denoiser.network, gradients(bench, JOINT, 3)
    largest = max(float(value.abs().max()) for value in wanted.values())
    frozen = [*network.parameters(), *bench.reward.network.parameters()]
    decoder = list(bench.model.autoencoder.network.parameters())
    for way in (STEPWISE, CHECKPOINTED):
        found = gradients(bench, way, 3)
        assert wanted.keys() <= found.keys() and largest > 0
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * largest, msg=name)
        assert all(p.grad is None for p in [*frozen, *decoder])
    wants = [p.requires_grad for p in frozen]
    found = gradients(bench, OFFICIAL, 3)
    assert not torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4 * largest)
    assert all(p.grad is not None for p in network.parameters())
    assert [p.requires_grad for p in frozen] == wants


def test_memory_is_flat_in_k_step_by_step_and_grows_jointly(bench_of):
    bench = bench_of(16, 25)
    sizes = {k: measure_memory(bench, METHODS[STEPWISE](bench, k)) for k in (1, 5, 10, 25)}
    memory = [size["memory"] for size in sizes.values()]
    assert max(memory) <= 1.05 * min(memory)
    joint = [measure_memory(bench, METHODS[JOINT](bench, k))["memory"] for k in (1, 25)]
    assert joint[1] > 4 * joint[0] > 0.9 * memory[0]
    text = sum(p.nbytes for p in bench.trainable.parameters.values()) / 2**20
    assert sizes[1]["gradients"] == pytest.approx(text)
    found = measure_memory(bench, METHODS[OFFICIAL](bench, 5))
    unet = sum(p.nbytes for p in bench.model.denoiser.network.parameters()) / 2**20
    assert found["gradients"] > text + unet
    assert all(p.grad is None for p in bench.parameters())


def test_figures_hold_ratios_at_equal_k_and_flatness():
    config = RewardBenchConfig(gradient_steps=(1, 5))
    memory = {(way, k): {"memory": 100.0 + k, "gradients": 2.0} for k in (1, 5) for way in METHODS}
    seconds = {(way, k): k * (1.0 if way == STEPWISE else 1.5) for k in (1, 5) for way in METHODS}
    found = build_result(config, memory, seconds)
    assert found["flatness"] == {way: pytest.approx(105 / 101 - 1) for way in METHODS if way != OFFICIAL}
    assert [(row["way"], row["K"], row["ratio"]) for row in found["rows"][:3]] == [
        (STEPWISE, 1, 1.0),
        (STEPWISE, 5, 1.0),
        (JOINT, 1, 1.5),
    ]
    with pytest.raises(ValueError, match="gradient_steps is 26; expected at most sampling_steps, 25"):
        RewardBenchConfig(gradient_steps=(26,))


def test_the_command_line_measures_the_demo_model(capsys):
    sizes = "--rounds 1 --batch-size 1 --sampling-steps 2 --gradient-steps 1 2"
    assert main(["reward-methods", *sizes.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["rows"]) == 3 * 2 + 1 and all(row["seconds"] > 0 for row in found["rows"])
    assert found["flatness"][STEPWISE] < 0.05 and found["table"].count("\n") == 8
    if not torch.cuda.is_available():
        assert found["device"] == "cpu" and found["note"].startswith("No CUDA device")


def test_a_checkpoint_of_ones_own_is_measured_with_the_tokenizer_of_a_comfyui(single_file, tmp_path):
    (tmp_path / "comfyui" / "comfy").mkdir(parents=True)
    (tmp_path / "clip_tokenizer").rename(tmp_path / "comfyui" / "comfy" / "sd1_tokenizer")
    config = RewardBenchConfig(model=str(single_file), pixels=16, sampling_steps=2, gradient_steps=(2,), batch_size=1)
    bench = Bench.open(config, tmp_path / "comfyui")
    assert list(make_steps(bench)) == [(STEPWISE, 2), (JOINT, 2), (CHECKPOINTED, 2), (OFFICIAL, 2)]
    found = measure_memory(bench, make_steps(bench)[STEPWISE, 2])
    assert found["memory"] > 0 and found["gradients"] > 0
