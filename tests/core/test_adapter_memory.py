"""What adapters hold: no base weights, no copies or products of them for backward; and how often they are put on."""

import copy
import gc
import weakref

import pytest
import torch
from retune.training.common import transfer
from retune.training.config.lora import ALGORITHMS, LoraConfig
from retune.training.trainables.adapter_outputs import dora_output, with_low_rank
from retune.training.trainables.lora import Adapters
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

WIDE = 64


def build(algorithm, device="cpu", **changes):
    """Two linear layers and a convolution, wide beside their inputs and ranks, with adapters on all that take them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDE, WIDE), nn.SiLU(), nn.Linear(WIDE, WIDE)).requires_grad_(False)
    layers = {"a": network[0], "b": network[2]}
    if algorithm in ("LoCon", "LoHa", "LoKr"):
        network.append(nn.Unflatten(1, (WIDE, 1, 1))).append(nn.Conv2d(WIDE, WIDE, 3, padding=1).requires_grad_(False))
        layers["c"] = network[4]
    network.to(device)
    config = LoraConfig(run_name="r", algorithm=algorithm, rank=2, targets="all", **changes)
    adapters = Adapters(layers, [network], config, seed=0)
    random = torch.Generator().manual_seed(1)
    values = {n: v.cpu() + 0.1 * torch.randn(v.shape, generator=random) for n, v in adapters.values().items()}
    adapters.load({n: v.to(device) for n, v in values.items()})
    return network, adapters


class Casts(TorchDispatchMode):
    """Bytes of tensors of a network's own shapes that casts read, and that any operation makes."""

    def __init__(self, network):
        super().__init__()
        self.shapes = {p.shape for p in network.parameters() if p.ndim > 1}
        self.cast = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.cast += args[0].nbytes
        return func(*args, **(kwargs or {}))


def step(network, adapters, dtype=None, count=3):
    """Forward and backward; returns bytes kept of a weight's size that are not the weights, and bytes cast."""
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *adapters.parameters.values()]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(count, WIDE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with adapters.attach(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        with Casts(network) as casts, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(x).float().square().mean().backward()
    products = [t for at, t in kept.items() if at not in own and t.numel() >= WIDE * WIDE]
    return sum(t.nbytes for t in products), casts.cast


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_of_a_weights_size_is_kept_for_backward(algorithm, stored):
    network, adapters = build(algorithm)
    network.to(stored)
    kept, cast = step(network, adapters, torch.bfloat16)
    assert kept == 0
    assert (cast == 0) == (stored == torch.bfloat16)
    assert all(p.grad is not None for p in adapters.parameters.values())
    if stored == torch.float32:
        assert step(network, adapters) == (0, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_that_a_forward_pass_leaves_is_small_beside_the_weights(algorithm):
    """As the allocator counts it, activations included: 0.01 of the weights, and 0.04 for DoRA's norms."""
    layers = {str(i): nn.Linear(512, 512).requires_grad_(False) for i in range(3)}
    network = nn.Sequential(*layers.values())
    adapters = Adapters(layers, [network], LoraConfig(run_name="r", algorithm=algorithm, rank=4), seed=0)
    x = torch.randn(4, 512)
    with adapters.attach():
        network(x).sum().backward()  # makes what is made once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            output = network(x)
        kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        output.sum().backward()
    assert output.nbytes <= kept < 0.06 * sum(layer.weight.nbytes for layer in layers.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_base_can_leave_memory_while_adapters_live(algorithm):
    network, adapters = build(algorithm)
    storages = [weakref.ref(layer.weight) for layer in adapters._layers.values()]
    with adapters.mounted():
        step(network, adapters)
        for layer in adapters._layers.values():
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        gc.collect()
        assert all(storage() is None for storage in storages)
        step(network, adapters)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hooks_are_put_on_once_for_many_attaches(algorithm):
    network, adapters = build(algorithm)
    layers, x = list(adapters._layers.values()), torch.ones(1, WIDE)
    plain = network(x)
    with pytest.raises(KeyError), adapters.mounted():
        hooks = [list(layer._forward_hooks.items()) for layer in layers]
        assert all(len(found) == 1 for found in hooks) and torch.equal(network(x), plain)
        outputs = []
        for values in (None, adapters.values(), None):
            with adapters.attach(values):
                outputs.append(network(x))
                with adapters.disabled():
                    assert torch.equal(network(x), plain)
            assert torch.equal(network(x), plain)
        assert torch.equal(outputs[0], outputs[2])
        torch.testing.assert_close(outputs[0], outputs[1])  # without gradients some processors convolve in another way
        assert not torch.equal(outputs[0], plain)
        assert [list(layer._forward_hooks.items()) for layer in layers] == hooks
        raise KeyError("anything")
    assert not any(m._forward_hooks or "forward" in vars(m) for m in network.modules())
    assert torch.equal(network(x), plain)


def test_the_masters_are_what_the_modules_read():
    """So that nothing is swapped in a training step; other values are swapped and taken back."""
    network, adapters = build("LoRA")
    x, masters = torch.ones(1, WIDE), adapters.values()
    with adapters.attach({name: torch.zeros_like(value) for name, value in masters.items()}):
        assert torch.equal(network(x), network(x))
        zero = network(x)
    assert torch.equal(zero, network(x))
    assert all(ref.tensor is adapters.parameters[name] for name, ref in adapters._refs.items())


def dora_by_hand(layer, parameters, scale, x, detach):
    """DoRA's output with the merged weight: arXiv 2402.09353, eq. 5; its norm a constant where detach (section 4.3)."""
    up, down, magnitude = (parameters[f"lin.{n}"] for n in ("lora_up.weight", "lora_down.weight", "dora_scale"))
    merged = layer.weight + scale * up.flatten(1) @ down.flatten(1)
    norm = merged.norm(dim=0)
    return F.linear(x, magnitude.flatten() * merged / (norm.detach() if detach else norm), layer.bias)


def test_doras_gradient_is_the_exact_one_and_not_that_of_a_detached_norm():
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).double().requires_grad_(False)
    config = LoraConfig(run_name="r", algorithm="DoRA", rank=3, alpha=2.0)
    adapters = Adapters({"lin": layer}, [layer], config, seed=0)
    adapters.load({n: v + 0.3 * torch.randn(v.shape) for n, v in adapters.values().items()})
    layer.float()
    x, towards = torch.randn(7, 24, requires_grad=True), torch.randn(7, 16)
    names = list(adapters.parameters)
    wanted = [x, *adapters.parameters.values()]
    with adapters.attach():
        output = layer(x)
        found = torch.autograd.grad((output * towards).sum(), wanted)
    exact, detached = (
        torch.autograd.grad((dora_by_hand(layer, adapters.parameters, 2 / 3, x, d) * towards).sum(), wanted)
        for d in (False, True)
    )
    torch.testing.assert_close(output, dora_by_hand(layer, adapters.parameters, 2 / 3, x, False), rtol=1e-4, atol=1e-5)
    for name, one, other in zip(["x", *names], found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    up = 1 + names.index("lin.lora_up.weight")
    assert (detached[up] - exact[up]).norm() > 0.1 * exact[up].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_doras_output_beside_half_precision_weights(dtype):
    """The difference that the adapter makes, to the rounding of the weights' dtype."""
    network, adapters = build("DoRA")
    layer, module = network[0].to(dtype), adapters.modules["a"]
    x = torch.randn(5, WIDE)
    exact = dora_output(module, layer.float(), layer.weight.norm(dim=0), x)
    found = dora_output(module, layer.to(dtype), layer.weight.float().norm(dim=0), x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - exact).norm() < 0.01 * exact.norm()


def test_loha_draws_the_same_rank_dropout_in_backward():
    network, adapters = build("LoHa", rank_dropout=0.5)
    with adapters.attach(rng_key=(1, 0)):
        output = network(torch.ones(2, WIDE))
        loss = output.square().sum()
        loss.backward()
    name, master = next(iter(adapters.parameters.items()))
    change = 1e-3 * torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            master.add_(sign * change)
            with adapters.attach(rng_key=(1, 0)):
                losses.append(network(torch.ones(2, WIDE)).square().sum().item())
            master.sub_(sign * change)
    assert (losses[0] - losses[1]) / 2 == pytest.approx((master.grad * change).sum().item(), rel=0.05), name


@pytest.mark.parametrize("layout", ["TensorCoreFP8Layout", "TensorWiseINT8Layout"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapters_train_beside_weights_that_comfyui_quantises(algorithm, layout):
    """Outputs and gradients are those beside the dequantised weight, and near those beside the exact one."""
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    torch.manual_seed(0)
    exact = nn.Linear(WIDE, WIDE).requires_grad_(False)
    stored = tensor.QuantizedTensor.from_float(exact.weight.detach().clone(), layout)
    gradients = []
    for weight in (stored, stored.dequantize(), exact.weight):
        layer = nn.Linear(WIDE, WIDE, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        network = nn.Sequential(layer)
        config = LoraConfig(run_name="r", algorithm=algorithm, rank=2)
        adapters = Adapters({"a": layer}, [network], config, seed=0)
        random = torch.Generator().manual_seed(1)
        adapters.load({n: v + 0.1 * torch.randn(v.shape, generator=random) for n, v in adapters.values().items()})
        x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with adapters.attach():
            network(x).square().sum().backward()
        assert layer.weight is weight or torch.equal(layer.weight, weight)
        gradients.append(torch.cat([p.grad.flatten() for p in adapters.parameters.values()] + [x.grad.flatten()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(gradients[0], gradients[2], dim=0) > 0.99


DROPS = [*((a, 0.0) for a in ALGORITHMS), *((a, 0.5) for a in ALGORITHMS if a != "DoRA")]


@pytest.mark.parametrize(("algorithm", "rank_dropout"), DROPS)
def test_nothing_waits_for_an_adapters_device(device, monkeypatch, algorithm, rank_dropout):
    """Copies to it are those to a CUDA device. The numbers are those of a CPU, LyCORIS's own."""
    monkeypatch.setattr(transfer, "STAGING", ("cuda", "lazy"))
    gradients = []
    for where in ("cpu", "lazy"):
        network, adapters = build(algorithm, where, rank_dropout=rank_dropout)
        x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(2)).to(where)
        with adapters.mounted(), adapters.attach(rng_key=(1, 0)):
            device.reset()
            network(x).square().sum().backward()
            assert not device.reads and not device.waits
        gradients.append([parameter.grad.cpu() for parameter in adapters.parameters.values()])
    for there, here in zip(*gradients, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4 * float(here.abs().max()))


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_lora_by_torch_s_products_is_lycoris_own(name):
    """Outputs and gradients, of a linear layer in one pass over its output, and of a convolution."""
    _, adapters = build("LoCon", alpha=3.0, conv_rank=2, conv_alpha=1.5)
    module, shape = adapters.modules[name], (2, 3, WIDE) if name == "a" else (2, WIDE, 4, 4)
    x, base = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    factors = [module.lora_up.weight, module.lora_down.weight]
    outputs = [with_low_rank(module, x, base), base + module.bypass_forward_diff(x)]
    gradients = [torch.autograd.grad(output.square().sum(), factors) for output in outputs]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        half = with_low_rank(copy.deepcopy(module).to("meta"), *(t.to("meta", torch.bfloat16) for t in (x, base)))
    assert half.shape == base.shape and half.dtype == torch.bfloat16
