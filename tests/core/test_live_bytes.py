"""Bytes of live tensors: each storage once, freed ones no longer, the same with and without values."""

import pytest
import torch
from retune.training.common.live_bytes import LiveBytes
from retune.training.models.recompute import blocks_of, recomputed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

KB = 1000 * 4


def counted(run):
    with LiveBytes() as live:
        kept = run()
    return live, kept


def test_storages_count_once_while_they_live():
    before = torch.ones(1000)
    live, kept = counted(lambda: before + 1)
    assert (live.now, live.peak) == (KB, KB)
    live, _ = counted(lambda: [before.exp_(), before.view(10, 100).t()])
    assert live.peak == 0
    live, _ = counted(lambda: (before + 1).view(10, 100)[2:].exp_())
    assert live.peak == KB
    live, kept = counted(lambda: before.exp().sin().cos())  # each result outlives its argument by one operation
    assert (live.now, live.peak) == (KB, 2 * KB)
    with LiveBytes() as live:
        kept = before + 1
        del kept
        assert live.now == 0
        kept = before + 2
        assert (live.now, live.peak) == (kept.nbytes, KB)


def test_weights_that_have_values_do_not_count_where_nothing_else_has():
    """A linear layer reads its weight transposed, and `FakeTensorMode` makes tensors of its own for both."""
    layer = nn.Linear(1000, 10)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.ones(2, 1000)
        live, _ = counted(lambda: layer(x).sum().backward())
    assert live.peak < KB + 10 * KB + 200  # the weight's gradient, with little for outputs


@pytest.mark.parametrize("fake", [False, True])
def test_what_a_backward_pass_keeps(fake):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weight = torch.ones(1000, requires_grad=True)

    def run():
        y = weight
        for _ in range(5):
            y = y.exp()
        return torch.autograd.grad(y.sum(), weight)

    if fake:
        with mode:
            live, kept = counted(run)
    else:
        live, kept = counted(run)
    assert live.peak - KB <= live.peak_without(kept) <= live.peak
    assert 6 * KB <= live.peak <= 7 * KB + 64 and live.now == KB
    assert weight.grad is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 10), nn.GELU(), nn.Linear(10, 10)])
        self.norm = nn.LayerNorm(10)

    def forward(self, x, scale=1.0):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) * scale


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(10, 10), nn.ModuleList([Block() for _ in range(8)]), nn.Tanh()

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=2.0)
        return self.last(x)


def test_recomputed_blocks_give_the_same_gradient_and_keep_their_inputs_alone():
    torch.manual_seed(0)
    network, x = Network().requires_grad_(False), torch.randn(1000, 10, requires_grad=True)
    assert blocks_of(network) == list(network.blocks) and blocks_of(nn.Linear(1, 1)) == []

    def gradient():
        return torch.autograd.grad(network(x).square().sum(), x)[0]

    plain, expected = counted(gradient)
    network.blocks[1].forward = network.blocks[1].forward
    own = network.blocks[1].forward
    with recomputed(network):
        less, found = counted(gradient)
    assert torch.equal(found, expected) and less.peak < 0.6 * plain.peak
    assert network.blocks[1].forward is own and "forward" not in network.blocks[0].__dict__
    with pytest.raises(RuntimeError), recomputed(network):
        network(torch.ones(1, 3))
    assert "forward" not in network.blocks[0].__dict__
