"""Parts of a model that train at rates of their own and begin at steps of their own."""

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import GROUPS, TrainingSettings
from retune.training.loop.loop import Loop, LoopConfig
from retune.training.models.layers import group_of
from retune.training.models.parameters import parameter_refs
from retune.training.objectives.objective import Loss
from retune.training.runs.folder import RunFolder
from retune.training.trainables.weights import SelectedWeights
from torch import nn

UNET = "model.diffusion_model.input_blocks.1."
NAMES = {
    "projection": "projection.linear.weight",
    "cross_attention": UNET + "1.transformer_blocks.0.attn2.to_k.weight",
    "self_attention": UNET + "1.transformer_blocks.0.attn1.to_q.weight",
    "rest": UNET + "0.in_layers.2.weight",
}


class Stop(Callbacks):
    def __init__(self, at):
        self.at = at

    def on_step(self, info):
        if info.step == self.at:
            raise KeyboardInterrupt


class Sum:
    """A loss whose gradient is 1 for every weight."""

    def __init__(self, layers):
        self.layers = layers

    def load(self, slots):
        return slots

    def __call__(self, batch, step):
        return Loss(torch.stack([sum(layer.weight.sum() for layer in self.layers.values()) for _ in batch]))

    def state(self):
        return {}

    def load_state(self, state):
        assert state == {}


class One:
    def batch(self, number):
        return [number]


def run(path, steps, stop=None, optimizer="SGD", **settings):
    """Values of the four weights, all 1 at first, after a run with learning rate 0.1."""
    layers = {group: nn.Linear(1, 1, bias=False) for group in NAMES}
    selected = {}
    for group, layer in layers.items():
        nn.init.ones_(layer.weight)
        selected[NAMES[group]] = parameter_refs(layer)["weight"]
    plain = {"weight_decay": 0.0, "warmup_steps": 0, "lr_schedule": "constant", "max_grad_norm": 0.0}
    loop = Loop(
        RunFolder(path),
        SelectedWeights(selected, list(layers.values())),
        Sum(layers),
        One(),
        LoopConfig(
            steps=steps,
            batch_size=1,
            learning_rate=0.1,
            settings=TrainingSettings(optimizer=optimizer, **(plain | settings)),
            samples=SamplePrompts(),
        ),
        callbacks=Stop(stop),
    )
    values = loop.run()
    return {group: values[name].item() for group, name in NAMES.items()}, loop.folder.rows()


def test_every_name_has_its_group():
    assert {group: group_of(name) for group, name in NAMES.items()} == {group: group for group in GROUPS}
    assert group_of("middle_block.1.transformer_blocks.0.attn2.to_out.0.bias") == "cross_attention"
    assert group_of("middle_block.1.transformer_blocks.0.ff.net.2.weight") == "rest"


def test_rates_are_multiples_of_the_runs(tmp_path):
    values, rows = run(tmp_path, 1, lr_projection=2.0, lr_self_attention=0.5, lr_rest=0.0)
    assert values == pytest.approx({"projection": 0.8, "cross_attention": 0.9, "self_attention": 0.95, "rest": 1.0})
    assert values["rest"] == 1.0 and rows[0]["learning_rate"] == 0.1


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "SGD"])
def test_a_part_rests_bit_for_bit_until_its_step(tmp_path, optimizer):
    settings = {"unfreeze_cross_attention": 3, "unfreeze_rest": 4, "weight_decay": 0.1, "optimizer": optimizer}
    before, rows = run(tmp_path / "a", 2, **settings)
    assert before["cross_attention"] == before["rest"] == 1.0 and before["projection"] < 1
    assert rows[0]["grad_norm"] == pytest.approx(2**0.5)  # of the two parts that train
    after, rows = run(tmp_path / "b", 3, **settings)
    assert after["cross_attention"] < 1.0 and after["rest"] == 1.0
    assert rows[2]["grad_norm"] == pytest.approx(3**0.5)
    assert run(tmp_path / "c", 4, **settings)[0]["rest"] < 1.0


def test_stopped_while_a_part_rests_and_gone_on_is_the_whole_run(tmp_path):
    settings = {"optimizer": "AdamW", "unfreeze_rest": 3, "unfreeze_self_attention": 5}
    whole = run(tmp_path / "whole", 6, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 6, stop=2, **settings)
    assert run(tmp_path / "parts", 6, **settings) == whole


def test_nothing_that_trains_at_first_is_refused(tmp_path):
    zero = {f"lr_{group}": 0.0 for group in GROUPS if group != "rest"}
    with pytest.raises(ValueError, match="are 0 at the first step; expected one that trains"):
        run(tmp_path, 2, unfreeze_rest=2, **zero)
    with pytest.raises(ValueError, match="lr_rest is -1"):
        TrainingSettings(lr_rest=-1)
