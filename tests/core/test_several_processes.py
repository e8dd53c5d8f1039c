"""Two processes (gloo) train one run: gradients, results and figures of one process; resuming; how a run ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from retune.training.common.distributed import World
from retune.training.common.foreign import read_tensors

from .in_processes import uneven, verb

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("in_processes.py")
LAUNCH = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
]


def start(count, *arguments):
    """Python processes of one thread that join into one world: return codes and outputs when all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | world | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, processes = [sys.executable, *map(str, arguments)], []
    for rank in map(str, range(count)):
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env=own, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def run_in_two(*jobs):
    """Jobs of in_processes.py, one after another, which must all end well."""
    codes, outputs = start(2, PROGRAM, json.dumps(jobs))
    assert not any(codes), "\n".join(outputs)


def steps_of(root):
    lines = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def masters(root):
    return read_tensors(root / "state" / "latest.safetensors")[0]


# not the layers of the time: norms of one channel a group take them away
LORA = ["--targets", "regex", "--target-regex", "^(?!.*emb_layers).*(block|text_encoders)", "--algorithm", "LoCon"]
REWARD = ["--rewards", "demo CLIP", "demo aesthetic", "--width", "32", "--height", "32", "--cfg", "2"]
REWARD += ["--sampling-steps", "3", "--gradient-steps", "2", "--lora-rank", "2"]
CONSTRAINTS = ["--eps-constraint", "1000", "--drift-constraint", "1000"]
"""Large ones: after one step a model has not gone far."""
KINDS = {
    "train": ["--train", "cross-attention", "--gradient-checkpointing"],
    "lora": [*LORA, "--rank", "4", "--text-encoder-learning-rate", "1e-3"],
    "embedding": ["--token", "<it>", "--vectors", "2", "--initial-text", "red circle"],
    "reward last K": [*REWARD, "--train", "text encoder", *CONSTRAINTS],
    "reward random K": [*REWARD, "--method", "random K", "--train", "UNet LoRA", "--no-stop-gradient"],
    "reward one step": [*REWARD, "--method", "one step", "--train", "text encoder LoRA", *CONSTRAINTS],
    "reward direct": [*REWARD, "--method", "direct", "--train", "UNet LoRA", *CONSTRAINTS[:2]],
}
SHARED = ["--ema-decay", "0", "--optimizer", "SGD", "--max-grad-norm", "0", "--warmup-steps", "0"]
SHARED += ["--lr-schedule", "constant", "--batch-size", "4"]
"""SGD: AdamW makes whole steps of what rounding left of gradients near zero."""


def gradients_of(tmp_path, name):
    return read_tensors(tmp_path / name)[0]


def expect_near(found, expected, tolerance=1e-5):
    """Equal names; values apart by at most a share of the norm of all of them."""
    assert found.keys() == expected.keys() and expected
    length = torch.cat([value.flatten() for value in expected.values()]).norm()
    assert length > 0
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * length, name


def test_every_trainer_under_accelerate_launch(train_arguments, tmp_path):
    """Two steps each: of one process; and of two and one, a step each, in this or the other order. Gradients, figures
    and results are those of one process. Before that, batches that do not divide are refused, with neither
    model nor pictures there; after it come gradients that one process lacks, and a run that is asked to finish.
    """
    prompts, words = tmp_path / "prompts.txt", "a green star, white background, on the left of "
    prompts.write_text(f"a red circle\ntwo small blue squares\n{3 * words} a square\na star\n", encoding="utf-8")

    def job(kind, output, steps):
        _, *flags = train_arguments(tmp_path / output, *SHARED, *KINDS[kind], "--steps", str(steps))
        prompt = [] if kind in ("train", "lora", "embedding", "reward direct") else ["--prompts", str(prompts)]
        flags[flags.index("--run-name") + 1] = kind
        return ["verb", [[kind.split()[0], *flags, *prompt], 0, str(tmp_path / f"{kind} {output} {steps}")]]

    def run(kind, output, steps):
        verb(*job(kind, output, steps)[1])

    def refused(kind):
        name, (arguments, _, file) = job(kind, "refused", 1)
        flags = [*arguments, "--model", "nowhere", "--folder", "nowhere", "--batch-size", "3"]
        return [name, [flags, 2, file]]

    one_first = list(KINDS)[1::2]
    for kind in KINDS:
        run(kind, "one", 2)
        if kind in one_first:
            run(kind, "two", 1)
    jobs = [refused(kind) for kind in list(KINDS)[:4]]
    jobs += [job(kind, "two", 2 if kind in one_first else 1) for kind in KINDS]
    dropout = [*job("lora", "dropout", 1)[1][0], "--module-dropout", "0.9"]
    jobs.append(["verb", [dropout, 0, str(tmp_path / "dropout")]])
    asked = tmp_path / "asked"
    asked.mkdir()
    (asked / "finish").touch()
    jobs += [["uneven", [str(tmp_path / "uneven"), 4]], ["uneven", [str(asked), 50]]]
    codes, (output,) = start(1, "-m", *LAUNCH, PROGRAM, json.dumps(jobs))
    assert codes == [0], output
    assert output.count("batch_size is 3 on 2 processes; expected a multiple of 2") == 8
    assert "choose 4, or another number of processes" in output and not (tmp_path / "refused").exists()
    assert output.count("batch_size 4 is that of all 2 processes together, 2 each; a step has 8 images") == 8
    for kind in KINDS:
        if kind not in one_first:
            run(kind, "two", 2)
        check_turns(tmp_path, kind)
    zero, one = (gradients_of(tmp_path, f"dropout {rank}") for rank in (0, 1))
    assert zero.keys() == one.keys() and all(torch.equal(zero[name], one[name]) for name in zero)
    check_uneven(tmp_path)
    assert steps_of(asked)[-1]["step"] == 1 and not (asked / "finish").exists()


def check_turns(tmp_path, kind):
    """What two processes and one did in turns is what one did alone."""
    expected = gradients_of(tmp_path, f"{kind} one 2 0")
    found = gradients_of(tmp_path, f"{kind} two 1 0") | gradients_of(tmp_path, f"{kind} two 2 0")
    for step in (1, 2):
        expect_near(*({k: v for k, v in x.items() if k.startswith(f"{step} ")} for x in (found, expected)))
    rows = ([row for row in steps_of(tmp_path / name / kind) if "event" not in row] for name in ("one", "two"))
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys() and one["step"] == two["step"]
        for name in {"loss", "grad_norm", "reward", "drift", "eps_mse"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    one, two = (results_of(tmp_path / name / kind) for name in ("one", "two"))
    expect_near(two, one)


def results_of(folder):
    """The tensors of all of a run's files; that of a tuned LoRA's other weights has none."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in read_tensors(path)[0].items()}


def check_uneven(tmp_path):
    """Two processes took four steps and one goes on; AdamW leaves a layer alone that no process has a gradient of."""
    uneven(tmp_path / "whole", 6)
    uneven(tmp_path / "uneven", 6)
    for one, two in zip(steps_of(tmp_path / "whole"), steps_of(tmp_path / "uneven"), strict=True):
        assert one == {name: pytest.approx(value, rel=1e-6) for name, value in two.items()}
    assert steps_of(tmp_path / "uneven")[0]["mean"] == 7.5  # of two batches of four, of which a process sees two each
    one, two = masters(tmp_path / "whole"), masters(tmp_path / "uneven")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(two["master.w.nobody.weight"], torch.full((3, 2), 0.3))
    assert not torch.equal(two["master.w.first.weight"], torch.full((3, 2), 0.4))


@pytest.mark.parametrize(("rank", "kind", "name"), [(1, "error", "ValueError"), (0, "cancel", "KeyboardInterrupt")])
def test_what_ends_one_process_ends_all_and_the_run_goes_on(tmp_path, rank, kind, name):
    """The state is that of the last whole step."""
    codes, outputs = start(2, PROGRAM, json.dumps([["stopped", [str(tmp_path / "r"), rank, kind]]]))
    assert all(codes), "\n".join(outputs)
    ends = [(tmp_path / "r" / f"ended {number}").read_text(encoding="utf-8") for number in (0, 1)]
    assert ends[rank] == name and ends[1 - rank] == "ProcessLost"
    status = json.loads((tmp_path / "r" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["step"]) == ("interrupted" if kind == "cancel" else "failed", 2)
    assert kind == "cancel" or "another process of this run has ended" in status["message"]
    uneven(tmp_path / "r", 6)
    uneven(tmp_path / "whole", 6)
    for found, expected in zip(steps_of(tmp_path / "r"), steps_of(tmp_path / "whole"), strict=True):
        assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}


def test_tensors_are_summed_in_parts_of_one_kind(monkeypatch):
    from retune.training.common import distributed

    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sent.append(len(flat)) or flat.mul_(2))
    monkeypatch.setattr(distributed, "FLAT_SIZE", 8)
    tensors = [torch.arange(float(n)) for n in (3, 5, 1, 20, 2)] + [torch.ones(2, dtype=torch.float64), torch.ones(())]
    expected = [2 * tensor for tensor in tensors]
    World(0, 2).all_reduce_(tensors)
    assert sent == [8, 1, 20, 2, 2, 1]
    assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))
