"""What the tests of several processes compute, in each of them and in the test's own: jobs are functions of this file.

As a program: `in_processes.py JOBS`, with JSON of [function, arguments] rows; "file.function" is of a file beside it.
"""

import importlib
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from retune.training.common.distributed import world
from retune.training.config.run import SamplePrompts, TrainingSettings
from retune.training.loop.gradient_step import GradientStep
from retune.training.loop.loop import Loop, LoopConfig
from retune.training.models.parameters import parameter_refs
from retune.training.objectives.objective import Loss
from retune.training.runs.folder import RunFolder
from retune.training.trainables.weights import SelectedWeights
from safetensors.torch import save_file

torch.set_num_threads(1)
LAYERS = ["even", "odd", "nobody", "first"]


def network():
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3, bias=False) for name in LAYERS})
    for number, layer in enumerate(layers.values()):
        torch.nn.init.constant_(layer.weight, 0.1 * (number + 1))
    return layers


class Batches:
    def batch(self, number):
        return [4 * number + i for i in range(4)]


class Uneven:
    """Even samples need one layer, odd ones another, the first of a step a third: one process lacks each of them."""

    def __init__(self, layers, stop=lambda number: None):
        self.layers, self.stop = layers, stop

    def load(self, slots):
        return slots

    def __call__(self, batch, step):
        self.stop(step)
        numbers = torch.tensor([float(slot) for _, slot in batch])
        losses = torch.stack([self.loss(index, float(slot)) for index, slot in batch])
        return Loss(losses, {"mean": numbers.mean(), "one": torch.ones(())})

    def loss(self, index, number):
        loss = self.layers["odd" if index % 2 else "even"].weight.square().sum() * number
        return loss + self.layers["first"].weight.sum() if index == 0 and number < 9 else loss

    def state(self):
        return {}

    def load_state(self, state):
        pass


def uneven(root, steps, stop=lambda number: None):
    layers = network()
    settings = TrainingSettings(gradient_accumulation=2, ema_decay=0.9, warmup_steps=0, lr_schedule="constant")
    options = {"batch_size": 4, "learning_rate": 0.01, "settings": settings, "samples": SamplePrompts()}
    weights = SelectedWeights(parameter_refs(layers, "w."), [layers])
    Loop(RunFolder(Path(root)), weights, Uneven(layers, stop), Batches(), LoopConfig(steps=steps, **options)).run()


def stopped(root, rank, kind):
    """`uneven`, in which one process fails or is cancelled at its third step; each writes a file on why it ends."""

    def stop(step):
        if step == 3 and world().rank == rank:
            if kind == "cancel":
                os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("no third step")

    try:
        uneven(root, 50, stop)
    except BaseException as error:
        (Path(root) / f"ended {world().rank}").write_text(type(error).__name__, encoding="utf-8")
        raise


@contextmanager
def recorded(file):
    """The gradients of every step, "<step> <name>", go to a file."""
    found, former = {}, GradientStep.gradient

    def gradient(self, step, callbacks):
        figures = former(self, step, callbacks)
        parameters = self.trainable.parameters.items()
        found.update({f"{step} {name}": p.grad.clone() for name, p in parameters if p.grad is not None})
        return figures

    GradientStep.gradient = gradient
    try:
        yield
    finally:
        GradientStep.gradient = former
        save_file(found, file)


def verb(arguments, status, gradients):
    """The command line; gradients: name of the file of each process."""
    from retune.training.__main__ import main

    with recorded(Path(f"{gradients} {world().rank}")):
        assert main(arguments) == status


def run_jobs(jobs):
    for name, arguments in json.loads(jobs):
        file, _, function = name.rpartition(".")
        getattr(importlib.import_module(file or "__main__"), function)(*arguments)


if __name__ == "__main__":
    run_jobs(sys.argv[1])
