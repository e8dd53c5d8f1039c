"""Compiled blocks and channels last: results of eager blocks, modules as before afterwards, and what is refused."""

import dataclasses

import pytest
import torch
from retune.training.config.lora import LoraConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.models.compiled import channels_last, check_compiler, compiled_blocks
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.models.recast import recastable, recasting
from retune.training.recipes.checks import check_speed
from retune.training.recipes.lora import train_lora
from retune.training.trainables.weights import SelectedWeights

from .conftest import seeded

CPU = torch.device("cpu")


def gradients(denoiser, recompute=False):
    """Output and the gradients of all weights, of two pictures of one size, with masters in the weights' place."""
    random = torch.Generator().manual_seed(1)
    noisy, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 8, 32, generator=random)
    weights = SelectedWeights(parameter_refs(denoiser.network), [denoiser.network])
    with denoiser.checkpointing(recompute), weights.attach():
        output = denoiser.predict(noisy, torch.tensor([1.0, 2.0]), Conditioning(words))
        output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in weights.parameters.values()])


def look(network):
    """What must be as before: order in memory, bits, identity, forward methods."""
    tensors = [(id(p), p.stride(), p.detach().clone()) for p in network.parameters()]
    return tensors, [vars(module).get("forward") for module in network.modules()]


def expect_unchanged(before, network):
    tensors, forwards = look(network)
    assert forwards == before[1]
    for (one, strides, value), (other, others, found) in zip(before[0], tensors, strict=True):
        assert (one, strides) == (other, others) and torch.equal(value, found)


@pytest.fixture
def small():
    """A UNet of three residual blocks and three transformers: each kind of block takes seconds to compile."""
    from diffusers import UNet2DConditionModel

    shape = {"in_channels": 4, "out_channels": 4, "block_out_channels": (32,), "layers_per_block": 1}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return seeded(lambda: UNet2DConditionModel(**shape, **kinds, mid_block_type=None, cross_attention_dim=32))


@pytest.mark.slow
def test_compiled_blocks_compute_what_eager_ones_do(small):
    """Output and gradient to 1e-5 of their norms, of whole and of recomputed blocks, with masters in the weights' place
    anew in each pass; nothing compiles again in the second. Without gradients the bits are eager ones."""
    denoiser, before = DiffusersDenoiser(small), look(small)
    output, expected = gradients(denoiser)
    torch._dynamo.reset()
    with compiled_blocks(small, True), recasting(recastable(small)):  # as a run does once, for all of its steps
        compiled, found = gradients(denoiser)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        gradients(denoiser)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted > 0
        _, recomputed = gradients(denoiser, recompute=True)
        inputs = (torch.ones(1, 4, 8, 8), torch.ones(1), Conditioning(torch.ones(1, 8, 32)))
        with torch.no_grad():
            evaluated = denoiser.predict(*inputs)
    assert not torch.equal(found, expected), "nothing was compiled"
    assert (compiled - output).norm() <= 1e-5 * output.norm()
    for gradient in (found, recomputed):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        assert torch.equal(evaluated, denoiser.predict(*inputs))
    expect_unchanged(before, small)


@pytest.mark.slow
def test_a_lora_trains_on_compiled_blocks_and_channels_last(tiny_model, pictures, tmp_path):
    """The LoRA is that of a plain run to 1e-4 of its norm, with SGD; the base model is as before, in memory too."""
    before, found = look(tiny_model.denoiser.network), {}
    for name, settings in {"plain": {}, "compiled": {"compile_blocks": True}, "last": {"channels_last": True}}.items():
        chosen = TrainingSettings(optimizer="SGD", warmup_steps=0, **settings)
        config = LoraConfig(run_name=name, steps=3, batch_size=2, learning_rate=0.1, rank=2, settings=chosen)
        path = train_lora(tiny_model, pictures, config, tmp_path).path
        from retune.training.common.foreign import read_tensors

        found[name] = torch.cat([value.flatten().float() for value in read_tensors(path)[0].values()])
        expect_unchanged(before, tiny_model.denoiser.network)
    for name in ("compiled", "last"):
        assert (found[name] - found["plain"]).norm() <= 1e-4 * found["plain"].norm()


@pytest.mark.parametrize("fails", [False, True])
def test_channels_last_keeps_values_and_is_put_back(tiny_model, fails):
    denoiser, before = tiny_model.denoiser, look(tiny_model.denoiser.network)
    output, expected = gradients(denoiser)
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), channels_last(denoiser.network, True):
        assert denoiser.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        found, gradient = gradients(denoiser)
        assert (found - output).norm() <= 1e-5 * output.norm()
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()
        1 / (not fails)
    expect_unchanged(before, denoiser.network)


def test_where_nothing_compiles_it_is_refused(tiny_model, monkeypatch):
    """Without a C++ compiler, as on most Windows machines; with block swap, sharding and in ComfyUI."""
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.raises(ValueError, match="expected a C\\+\\+ compiler .* or set compile_blocks off"):
            check_compiler(CPU)
    denoiser = tiny_model.denoiser
    for name in ("compile_blocks", "channels_last"):
        settings = TrainingSettings(**{name: True})
        with pytest.raises(ValueError, match=f"{name} is on in ComfyUI"):
            check_speed(object(), settings)
        with pytest.raises(ValueError, match=f"{name} is on with shard_weights"):
            check_speed(denoiser, dataclasses.replace(settings, shard_weights=True))
    with pytest.raises(ValueError, match="compile_blocks is on with block_swap 2; expected 0"):
        check_speed(denoiser, TrainingSettings(compile_blocks=True, block_swap=2))
