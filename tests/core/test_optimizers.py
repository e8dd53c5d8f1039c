"""Every optimiser through the real loop: it learns, parts train at their own rates, and a stop changes no bit."""

import sys

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import GROUPS, TrainingSettings
from retune.training.loop import optimizers as optim
from retune.training.loop.adafactor import Adafactor
from retune.training.loop.loop import Loop, LoopConfig
from retune.training.loop.optimizers import build_optimizer, check_optimizer, evaluation_weights, library
from retune.training.models.parameters import parameter_refs
from retune.training.objectives.objective import Loss
from retune.training.runs.folder import RunFolder
from retune.training.trainables.weights import SelectedWeights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

RATES = {
    "AdamW": 0.05,
    "Adafactor": 0.05,
    "SGD": 0.05,
    "AdamW8bit": 0.05,
    "Prodigy": 1.0,
    "AdamWScheduleFree": 0.1,
    "Lion": 0.03,
    "CAME": 0.1,
}
SHAPES = {
    "projection.weight": (64, 64),  # 4096 numbers: the least of which bitsandbytes keeps the state in 8 bits
    "projection.other": (64, 64),
    "middle_block.1.attn2.to_k.weight": (8, 4, 3, 3),
    "middle_block.0.bias": (40,),
}


@pytest.fixture(params=RATES)
def name(request):
    if request.param in optim.PACKAGES:
        pytest.importorskip(optim.PACKAGES[request.param][0])
    return request.param


class Net(nn.Module):
    """Four weights, to be found by a quadratic whose minimum is drawn at random."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s, generator=random)) for s in SHAPES.values()])
        self.wanted = [w.detach() + 0.5 * torch.randn(w.shape, generator=random) for w in self.weights]

    def distance(self):
        pairs = zip(self.weights, self.wanted, strict=True)
        return sum(0.5 * ((weight - wanted) ** 2).sum() for weight, wanted in pairs)


class Distance:
    def __init__(self, net):
        self.net = net

    def load(self, slots):
        return slots

    def __call__(self, batch, step):
        return Loss(torch.stack([self.net.distance() for _ in batch]))

    def validation(self, loaded):
        return self.net.distance().item()

    def state(self):
        return {}

    def load_state(self, state):
        assert state == {}


class One:
    def batch(self, number):
        return [number]


class Stop(Callbacks):
    def __init__(self, at):
        self.at = at

    def on_step(self, info):
        if info.step == self.at:
            raise KeyboardInterrupt


def built(path, optimizer, *, steps, stop=None, **settings):
    net = Net()
    found = parameter_refs(net)
    selected = {name: found[f"weights.{i}"] for i, name in enumerate(SHAPES)}
    plain = {"weight_decay": 0.0, "lr_schedule": "cosine", "warmup_steps": 5, "max_grad_norm": 0.0}
    if optimizer == "AdamWScheduleFree":
        plain["lr_schedule"] = "constant"
    return Loop(
        RunFolder(path),
        SelectedWeights(selected, [net]),
        Distance(net),
        One(),
        LoopConfig(
            steps=steps,
            batch_size=1,
            learning_rate=RATES[optimizer],
            settings=TrainingSettings(optimizer=optimizer, **(plain | settings)),
            samples=SamplePrompts(),
        ),
        validation=[0],
        callbacks=Stop(stop),
    )


def test_it_finds_the_minimum(tmp_path, name):
    loop = built(tmp_path, name, steps=300, lr_cross_attention=2.0, unfreeze_rest=40)
    loop.run()
    losses = [row["loss"] for row in loop.folder.rows() if row.get("event") == "validation"]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("stop", [3, 12])
def test_stopped_and_gone_on_is_the_whole_run(tmp_path, name, stop):
    """Stopped before and after a part begins to train; the states of both parts matter then."""
    options = {"steps": 16, "unfreeze_rest": 6, "lr_cross_attention": 2.0, "weight_decay": 0.1, "validate_every": 5}
    whole = built(tmp_path / "whole", name, **options)
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "stopped", name, stop=stop, **options).run()
    again = built(tmp_path / "stopped", name, **options)
    found = again.run()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(p, whole.trainable.parameters[k]) for k, p in again.trainable.parameters.items())
    one, other = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "stopped"))
    assert one == other


def test_a_part_at_rest_keeps_its_bits_and_begins_with_a_usual_step(tmp_path, name):
    options = {"lr_schedule": "constant", "warmup_steps": 0, "lr_cross_attention": 0.0, "unfreeze_rest": 30}
    start = dict(zip(SHAPES, [w.detach() for w in Net().weights], strict=True))
    rests = built(tmp_path / "a", name, steps=29, **options)
    rests.run()
    moved = {key: not torch.equal(p, start[key]) for key, p in rests.trainable.parameters.items()}
    assert moved == {key: key.startswith("projection") for key in SHAPES}
    begins = built(tmp_path / "b", name, steps=30, **options)
    begins.run()
    at_once = built(tmp_path / "c", name, steps=1, **(options | {"unfreeze_rest": 0}))
    at_once.run()
    bias = "middle_block.0.bias"
    steps = [(loop.trainable.parameters[bias] - start[bias]).abs().max() for loop in (begins, at_once)]
    assert steps[1] > 0 and torch.allclose(*steps, rtol=1e-4)


def test_a_look_changes_nothing(tmp_path):
    pytest.importorskip("schedulefree")
    seldom = built(tmp_path / "a", "AdamWScheduleFree", steps=12, validate_every=100)
    often = built(tmp_path / "b", "AdamWScheduleFree", steps=12, validate_every=1, save_every=2)
    one, other = seldom.run(), often.run()
    assert all(torch.equal(one[key], other[key]) for key in SHAPES)


def stepped(optimizer, weight, steps, rates=None):
    for step in range(steps):
        weight.grad = weight.detach() - torch.linspace(-1, 1, weight.numel())
        if rates:
            optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    return weight.detach().clone()


def weight_of(size=7):
    return nn.Parameter(torch.linspace(2, 3, size))


def network_on(device):
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random).to(device)) for shape in SHAPES.values()]


def step_at(optimizer, weights, seed):
    random = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=random).to(weight.device)
    optimizer.step()


@pytest.mark.parametrize("kind", sorted(set(RATES) - {"AdamW8bit", "Prodigy"}))
def test_steps_do_not_read_the_device(device, kind):
    """But those of Prodigy, whose package brings two sums of each tensor to the host. AdamW8bit's are kernels."""
    if kind in optim.PACKAGES:
        pytest.importorskip(optim.PACKAGES[kind][0])
    settings, values = TrainingSettings(optimizer=kind, weight_decay=0.1), []
    for where in ("cpu", "lazy"):
        weights = network_on(where)
        optimizer = build_optimizer(dict(zip(SHAPES, weights, strict=True)), RATES[kind], settings)
        for seed in range(4):
            step_at(optimizer, weights, seed)
        values.append([weight.detach().cpu() for weight in weights])
        state = next(iter(optimizer.state.values()))
    for there, here in zip(*values, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    device.reset()
    step_at(optimizer, weights, 4)
    assert state and not device.reads


def test_adafactor_goes_on_from_a_state_of_torchs_and_is_torchs_on_a_cpu(device):
    runs = []
    for kind, where in ((torch.optim.Adafactor, "cpu"), (Adafactor, "cpu"), (Adafactor, "lazy")):
        before = network_on("cpu")
        optimizer = torch.optim.Adafactor(before, lr=0.05, weight_decay=0.1)
        for seed in range(2):
            step_at(optimizer, before, seed)
        weights = [nn.Parameter(weight.detach().to(where)) for weight in before]
        other = kind(weights, lr=0.05, weight_decay=0.1)
        other.load_state_dict(optimizer.state_dict())
        step_at(other, weights, 2)
        runs.append([weight.detach().cpu() for weight in weights])
    for torchs, here, there in zip(*runs, strict=True):
        assert torch.equal(here, torchs)
        torch.testing.assert_close(there, torchs, rtol=1e-6, atol=1e-7)


class HostReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overflows", [False, True])
def test_a_step_in_fp16_reads_nothing_to_scale_the_loss(tmp_path, overflows):
    loop = built(tmp_path, "SGD", steps=1, precision="fp16", warmup_steps=0)
    step, before = loop.gradient_step, {k: p.detach().clone() for k, p in loop.trainable.parameters.items()}
    loop.gradient_step.objective.net.wanted[0].fill_(float("inf") if overflows else 0)
    with loop.trainable.mounted(), HostReads() as reads:
        step.gradient(1, Callbacks())
        step.update(1)
    assert step.scaler.is_enabled() and reads.count == 0
    assert all(torch.equal(p, before[k]) == overflows for k, p in loop.trainable.parameters.items())
    assert step.scaler.get_scale() == 2.0 ** (15 if overflows else 16)


def test_schedule_free_is_its_authors_and_has_their_warm_up():
    schedulefree = pytest.importorskip("schedulefree")
    ours, theirs = weight_of(), weight_of()
    settings = TrainingSettings(optimizer="AdamWScheduleFree", weight_decay=0.1)
    optimizer = build_optimizer({"w": ours}, 0.1, settings)
    rates = [0.1 * min(1, step / 4) for step in range(1, 11)]
    trained = stepped(optimizer, ours, 10, rates)
    reference = schedulefree.AdamWScheduleFree([theirs], 0.1, weight_decay=0.1, warmup_steps=4, foreach=False)
    reference.train()
    assert torch.allclose(trained, stepped(reference, theirs, 10), rtol=1e-6)
    average = evaluation_weights(optimizer, {"w": ours})["w"]
    assert torch.equal(ours, trained) and not torch.allclose(average, trained)
    reference.eval()
    assert torch.allclose(average, theirs, rtol=1e-6)


def test_prodigy_is_its_authors_with_an_estimate_for_each_part(capsys):
    prodigyopt = pytest.importorskip("prodigyopt")
    ours = {"projection.w": weight_of(7), "attn2.w": weight_of(5)}
    settings = TrainingSettings(optimizer="Prodigy", weight_decay=0.1)
    optimizer = build_optimizer(ours, 1.0, settings)
    assert capsys.readouterr().out == ""
    options = {"weight_decay": 0.1, "safeguard_warmup": True, "use_bias_correction": True}
    for weight, rate in zip(ours.values(), (1.0, 2.0), strict=True):
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        group["lr"] = rate
        expected = stepped(prodigyopt.Prodigy([alone := weight_of(weight.numel())], rate, **options), alone, 200)
        assert torch.equal(stepped(optimizer, weight, 200), expected)
        weight.grad = None
    estimates = [group["d"] for group in optimizer.param_groups]
    assert len(set(estimates)) == 2 and min(estimates) > 1e-3


@pytest.mark.parametrize("optimizer", optim.PACKAGES)
def test_a_missing_package_is_named(monkeypatch, optimizer):
    module, package = optim.PACKAGES[optimizer]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {package}`"):
        build_optimizer({"w": weight_of()}, 0.1, TrainingSettings(optimizer=optimizer))
    with pytest.raises(ValueError, match=f"package {package} of optimizer '{optimizer}' cannot be imported"):
        check_optimizer(TrainingSettings(optimizer=optimizer), 0.1, torch.device("cpu"))


def test_8bit_is_tried_on_the_device(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = TrainingSettings(optimizer="AdamW8bit")
    check_optimizer(settings, 0.1, torch.device("cpu"))
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = build_optimizer({"w": weight}, 0.1, settings)
    stepped(optimizer, weight, 1)
    assert optimizer.state[weight]["state1"].dtype == torch.uint8

    def refuses(*args, **kwargs):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", refuses)
    with pytest.raises(ValueError, match=r"device is cpu; expected one for which .* \(no kernel for this device\)"):
        check_optimizer(settings, 0.1, torch.device("cpu"))


def test_what_does_not_suit_an_optimiser_is_said(caplog):
    cpu = torch.device("cpu")
    for missing in ("prodigyopt", "schedulefree"):
        pytest.importorskip(missing)
    check_optimizer(TrainingSettings(optimizer="Prodigy"), 1.0, cpu)
    check_optimizer(TrainingSettings(optimizer="AdamWScheduleFree", lr_schedule="constant"), 0.1, cpu)
    assert not caplog.records
    check_optimizer(TrainingSettings(optimizer="Prodigy"), 1e-4, cpu)
    check_optimizer(TrainingSettings(optimizer="AdamWScheduleFree", lr_schedule="cosine"), 0.1, cpu)
    assert "expects about 1" in caplog.text and "expects 'constant'" in caplog.text
    with pytest.raises(ValueError, match="learning_rate is 0"):
        check_optimizer(TrainingSettings(optimizer="Prodigy"), 0.0, cpu)
    with pytest.raises(ValueError, match="ema_decay is 0.9; expected 0 with AdamWScheduleFree"):
        TrainingSettings(optimizer="AdamWScheduleFree", ema_decay=0.9)


def test_every_optimiser_and_group_is_covered():
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(TrainingSettings)["optimizer"])) == set(RATES)
    assert {optim.group_of(key) for key in SHAPES} == set(GROUPS) - {"self_attention"}
    for optimizer in optim.PACKAGES:
        pytest.importorskip(optim.PACKAGES[optimizer][0])
        assert library(optimizer)
