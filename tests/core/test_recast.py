"""Frozen weights of another dtype than the arithmetic's: same outputs and gradients, and no copy kept for backward."""

import pytest
import torch
from retune.training.models.recast import recastable, recasting
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def network():
    """Linear, convolution and norm, frozen, in fp16."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(4, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3, bias=False),
        nn.Flatten(2),
        nn.Linear(16, 24),
        nn.SiLU(),
        nn.Linear(24, 8, bias=False),
    )
    return layers.half().requires_grad_(False)


def run(network, dtype):
    """Output, gradient at the input, and the storages that autograd kept with their bytes."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False),
    ):
        output = network(x)
        output.float().square().sum().backward()
    return output.detach(), x.grad, kept


def weight_shapes(network):
    return {p.shape for p in network.parameters() if p.ndim > 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_output_and_gradient_are_those_of_the_cast_network_and_no_copy_is_kept(network, dtype):
    reference = {name: value.clone() for name, value in network.state_dict().items()}
    with recasting(recastable(network)):
        output, gradient, kept = run(network, dtype)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    copies = [t for at, t in kept.items() if at not in own and t.shape in weight_shapes(network)]
    assert not copies
    network.float()
    expected, expected_gradient, kept_by_torch = run(network, dtype)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2 if dtype else 1e-5, atol=1e-2 if dtype else 1e-6)
    if dtype:  # what torch's autocast would have kept
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        assert [t for at, t in kept_by_torch.items() if at not in own and t.shape in weight_shapes(network)]
    assert all(torch.equal(value.half(), reference[name]) for name, value in network.state_dict().items())


def test_layers_are_as_before_after_an_error(network):
    with pytest.raises(KeyError), recasting(recastable(network)):
        assert all("forward" in vars(network[i]) for i in (0, 1, 3, 5))
        raise KeyError("anything")
    assert not any("forward" in vars(module) for module in network.modules())


def test_weights_of_the_arithmetics_dtype_take_torchs_own_way(network):
    network.bfloat16()
    with recasting(recastable(network)):
        output, _, kept = run(network, torch.bfloat16)
    expected, _, kept_by_torch = run(network, torch.bfloat16)
    assert torch.equal(output, expected) and len(kept) == len(kept_by_torch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_train_get_autocasts_gradient_and_keep_no_copy(network, dtype):
    """To the last bit, so that a run which another version began goes on as it would have."""
    network.float().requires_grad_(True)
    gradients = []
    for layers in ([], recastable(network)):
        network.zero_grad()
        with recasting(layers):
            output, of_input, kept = run(network, dtype)
        gradients.append([output, of_input, *(p.grad for p in network.parameters())])
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert not [t for at, t in kept.items() if at not in own and t.shape in weight_shapes(network)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}


def dequantised(scale):
    """Makes operands of a weight that was divided by a scale; biases are as they are."""

    def operand(stored, like):
        value = stored.to(like.dtype)
        return value * scale.to(like.dtype) if stored.dtype in (torch.int8, torch.float8_e4m3fn) else value

    return operand


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448), (torch.int8, 127)])
def test_quantised_weights_are_dequantised_again_in_backward(dtype, largest):
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).requires_grad_(False)
    scale = layer.weight.abs().amax(dim=1, keepdim=True) / largest
    scaled = layer.weight / scale
    stored = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    exact, x = layer.weight.clone(), torch.randn(5, 32)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    with recasting([layer], dequantised(scale)):
        output = layer(found)
        output.square().sum().backward()
    assert layer.weight.dtype == dtype and torch.equal(layer.weight.float(), stored.float())
    torch.testing.assert_close(output, F.linear(x, stored.float() * scale, layer.bias))
    F.linear(expected, exact, layer.bias).square().sum().backward()
    assert F.cosine_similarity(found.grad.flatten(), expected.grad.flatten(), dim=0) > 0.99


def test_the_gradient_of_the_gradient_is_torchs():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double().requires_grad_(False)
    reference = nn.Linear(6, 4).double().requires_grad_(False)
    layer.float(), reference.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with recasting([layer]):
        assert torch.autograd.gradgradcheck(lambda t: layer(t).square(), x)
