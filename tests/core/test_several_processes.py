"""Two processes (gloo) train one run: gradients that one of them lacks, the result of one process, and resuming."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from retune.training.common.distributed import World
from retune.training.common.foreign import read_tensors

from .conftest import UNET

pytestmark = pytest.mark.slow

UNEVEN = """
import sys
from pathlib import Path

import torch
from retune.training.config.run import SamplePrompts, TrainingSettings
from retune.training.loop.loop import Loop, LoopConfig
from retune.training.models.parameters import parameter_refs
from retune.training.objectives.objective import Loss
from retune.training.runs.folder import RunFolder
from retune.training.trainables.weights import SelectedWeights

LAYERS = ["even", "odd", "nobody", "first"]


def network():
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3, bias=False) for name in LAYERS})
    for number, layer in enumerate(layers.values()):
        torch.nn.init.constant_(layer.weight, 0.1 * (number + 1))
    return layers


class Batches:
    def batch(self, number):
        return [4 * number + i for i in range(4)]


class Objective:
    '''Even samples need one layer, odd ones another, the first of a step a third: one process lacks each of them.'''

    def __init__(self, layers):
        self.layers = layers

    def load(self, slots):
        return slots

    def __call__(self, batch, step):
        return Loss(torch.stack([self.loss(index, float(slot)) for index, slot in batch]))

    def loss(self, index, number):
        loss = self.layers["odd" if index % 2 else "even"].weight.square().sum() * number
        return loss + self.layers["first"].weight.sum() if index == 0 and number < 9 else loss

    def state(self):
        return {}

    def load_state(self, state):
        pass


def train(root, steps):
    layers = network()
    settings = TrainingSettings(gradient_accumulation=2, ema_decay=0.9, warmup_steps=0, lr_schedule="constant")
    options = {"batch_size": 4, "learning_rate": 0.01, "settings": settings, "samples": SamplePrompts()}
    weights = SelectedWeights(parameter_refs(layers, "w."), [layers])
    Loop(RunFolder(root), weights, Objective(layers), Batches(), LoopConfig(steps=steps, **options)).run()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
"""

GRADIENTS = (
    f"SHAPE = {UNET}\n"
    + """
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from retune.training.common.callbacks import Callbacks
from retune.training.config.lora import LoraConfig
from retune.training.config.run import SamplePrompts, TrainingSettings
from retune.training.loop.gradient_step import GradientStep
from retune.training.config.loop import LoopConfig
from retune.training.data.dataset import from_images
from retune.training.data.order import BatchOrder
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.recipes.lora import unet_layers
from retune.training.trainables.lora import Adapters, select_layers
from retune.training.trainables.weights import SelectedWeights
from safetensors.torch import save_file


def gradients(kind):
    torch.manual_seed(0)
    denoiser = DiffusersDenoiser(UNet2DConditionModel(**SHAPE))
    words = {text: torch.randn(1, 8, 32) for text in ("", "a", "b")}
    pictures = from_images([torch.rand(3, 16, 16) for _ in range(4)], ["a", "b"] * 2, resolution=None)
    latents = {id(example): torch.randn(4, 8, 8) for example in pictures.examples}
    settings = TrainingSettings(gradient_accumulation=2, max_grad_norm=0.0)
    objective = DenoisingObjective(
        denoiser,
        settings,
        0,
        latent_of=lambda slot: latents[id(slot.example)],
        text_of=lambda text: Conditioning(words[text]),
        project=lambda states, time: states,
    )
    config = LoopConfig(steps=9, batch_size=4, learning_rate=1.0, settings=settings, samples=SamplePrompts())
    if kind == "whole":
        trainable = SelectedWeights(parameter_refs(denoiser.network), [denoiser.network])
    else:
        lora = LoraConfig(run_name="r", rank=2, **({"module_dropout": 0.9} if kind == "dropout" else {}))
        layers = select_layers(unet_layers(denoiser), lora)
        trainable = Adapters(layers, [denoiser.network], lora, 0)
    step = GradientStep(trainable, objective, BatchOrder(pictures, 4, 0), config, torch.device("cpu"))
    step.gradient(1, Callbacks())
    return {name: p.grad for name, p in trainable.parameters.items() if p.grad is not None}


if __name__ == "__main__":
    for kind in ("whole", "lora", "dropout"):
        save_file(gradients(kind), Path(sys.argv[1]) / f"{kind}{sys.argv[2]}.safetensors")
"""
)


def start(count, *arguments):
    """Python processes of one thread that join into one world: return codes and outputs when all have ended. "{rank}"
    in an argument is the process's number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | world | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in map(str, range(count)):
        command = [sys.executable, *(str(argument).replace("{rank}", rank) for argument in arguments)]
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env=own, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def run(count, *arguments):
    """`start`, where every process must end well."""
    codes, outputs = start(count, *arguments)
    assert not any(codes), "\n".join(outputs)


def steps_of(root):
    lines = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def masters(root):
    return read_tensors(root / "state" / "latest.safetensors")[0]


def test_what_one_process_has_no_gradient_of_is_summed_and_a_run_goes_on_with_another_number(tmp_path):
    """Two processes take four steps and one goes on; AdamW leaves a layer alone that no process has a gradient of."""
    run(1, "-c", UNEVEN, tmp_path / "one", 6)
    run(2, "-c", UNEVEN, tmp_path / "two", 4)
    run(1, "-c", UNEVEN, tmp_path / "two", 6)
    for one, two in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        assert one == {name: pytest.approx(value, rel=1e-6) for name, value in two.items()}
    one, two = masters(tmp_path / "one"), masters(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(two["master.w.nobody.weight"], torch.full((3, 2), 0.3))
    assert not torch.equal(two["master.w.first.weight"], torch.full((3, 2), 0.4))


def test_the_gradient_is_that_of_one_process(tmp_path):
    """Of a UNet and of a LoRA, to 1e-5; with module dropout both processes end with the same gradient."""
    run(2, "-c", GRADIENTS, tmp_path, "{rank}")
    run(1, "-c", GRADIENTS, tmp_path, "alone")

    def read(name):
        return read_tensors(tmp_path / f"{name}.safetensors")[0]

    for kind in ("whole", "lora"):
        expected, found = read(f"{kind}alone"), read(f"{kind}0")
        assert found.keys() == expected.keys()
        length = torch.cat([value.flatten() for value in expected.values()]).norm()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * length, name
    zero, one = read("dropout0"), read("dropout1")
    assert zero.keys() == one.keys()
    assert all(torch.equal(zero[name], one[name]) for name in zero)


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


@pytest.mark.parametrize("verb", ["train", "lora", "embedding", "reward"])
def test_accelerate_launches_every_trainer_and_a_batch_that_does_not_divide_is_refused(tmp_path, verb):
    """Before anything is loaded: neither model nor pictures are there."""
    more = {"embedding": ["--token", "<it>"], "reward": ["--rewards", "demo CLIP"]}.get(verb, [])
    flags = [verb, "--model", "nowhere", "--folder", "nowhere", "--run-name", "r", "--batch-size", "3", *more]
    codes, (output,) = start(1, "-m", *LAUNCH, "-m", "retune.training", *flags, "--output", tmp_path)
    assert codes != [0]
    assert output.count("batch_size is 3 on 2 processes; expected a multiple of 2") == 2
    assert "choose 4, or another number of processes" in output
    assert not list(tmp_path.iterdir())


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
