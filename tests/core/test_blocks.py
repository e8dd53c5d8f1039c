"""Blocks of a UNet: their order, recomputing them, and keeping their weights in RAM (block swap)."""

import logging

import pytest
import torch
from retune.benchmarks.random_models import SDXL_UNET
from retune.training.models import block_swap
from retune.training.models.block_swap import check_block_swap, swapped_blocks
from retune.training.models.blocks import blocks_in_order, recomputed, units_to_recompute, wrapped
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.protocols import Conditioning
from torch import nn

SDXL = {name: value for name, value in SDXL_UNET.items() if not name.startswith(("addition", "projection_class"))}
"""Without pooled text and sizes."""


def conditioning(denoiser, batch=1):
    random = torch.Generator().manual_seed(1)
    pooled = torch.randn(batch, denoiser.pooled_width, generator=random) if denoiser.pooled_width else None
    return Conditioning(torch.randn(batch, 5, denoiser.context_width, generator=random), pooled)


def gradients(denoiser, size=8, trained=("attn2.to_k.weight",)):
    """The loss and its gradients at the input, the context and the weights whose names end so; others are frozen."""
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, size, size, generator=random).requires_grad_()
    states = conditioning(denoiser)
    states.context.requires_grad_()
    weights = {}
    for name, parameter in denoiser.network.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
        parameter.grad = None
        weights |= {name: parameter} if parameter.requires_grad else {}
    loss = denoiser.predict(noisy, torch.tensor([1.5]), states).square().mean()
    loss.backward()
    found = {"loss": loss.detach(), "noisy": noisy.grad, "context": states.context.grad}
    return found | {name: weight.grad for name, weight in weights.items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_blocks_come_in_the_order_in_which_they_run(sd15_unet, sdxl_unet):
    for unet, count in ((sd15_unet, 38), (sdxl_unet, 34)):
        denoiser, ran = DiffusersDenoiser(unet), []
        blocks, note = blocks_in_order(denoiser), ran.append
        hooks = [b.register_forward_pre_hook(lambda module, inputs, note=note: note(module)) for b in blocks]
        with torch.no_grad():
            denoiser.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1.5]), conditioning(denoiser))
        for hook in hooks:
            hook.remove()
        assert len(blocks) == count and ran == blocks


def test_sdxl_has_87_blocks_and_its_deep_transformers_are_recomputed_block_by_block():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    assert len(blocks_in_order(DiffusersDenoiser(unet))) == 87 == len(units_to_recompute(unet))


@pytest.mark.parametrize("name", ["sd15_unet", "sdxl_unet"])
def test_recomputing_gives_the_same_bits_and_needs_less_than_diffusers_own(name, request, live_bytes):
    denoiser, figures, found = DiffusersDenoiser(request.getfixturevalue(name)), {}, {}
    for kind in ("all kept", "diffusers", "recomputed"):
        if kind == "diffusers":
            denoiser.network.enable_gradient_checkpointing()
        with recomputed(denoiser.network, kind == "recomputed"), live_bytes() as memory:
            found[kind] = gradients(denoiser, size=32)
        denoiser.network.disable_gradient_checkpointing()
        figures[kind] = memory.peak
    assert same_bits(found["all kept"], found["recomputed"])
    assert figures["recomputed"] <= figures["diffusers"] < figures["all kept"]
    assert figures["recomputed"] < 0.7 * figures["all kept"]
    assert name == "sdxl_unet" or figures["recomputed"] < figures["diffusers"]
    assert all("forward" not in vars(module) for module in denoiser.network.modules())


def test_wrapping_nests_and_ends_after_an_error():
    layer = nn.Linear(1, 1)
    with pytest.raises(KeyError), wrapped([layer], lambda m, f: lambda x: f(x) + 1):
        with wrapped([layer], lambda m, f: lambda x: 2 * f(x)):
            assert torch.equal(layer(torch.ones(1)), 2 * (nn.Linear.forward(layer, torch.ones(1)) + 1))
        assert torch.equal(layer(torch.ones(1)), nn.Linear.forward(layer, torch.ones(1)) + 1)
        raise KeyError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name, count", [("sd15_unet", 1), ("sd15_unet", 38), ("sdxl_unet", 20)])
def test_swapped_blocks_give_gradients_of_the_same_bits(name, count, recompute, request):
    denoiser = DiffusersDenoiser(request.getfixturevalue(name))
    before = {n: p.detach().clone() for n, p in denoiser.network.named_parameters()}
    expected = gradients(denoiser)
    trained = {denoiser.canonical_name(n) for n in before if n.endswith("attn2.to_k.weight")}
    with swapped_blocks(denoiser, count, trained, recompute) as swap, recomputed(denoiser.network, recompute):
        for _ in range(2):
            assert same_bits(gradients(denoiser), expected)
        with torch.no_grad():
            denoiser.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1.5]), conditioning(denoiser))
        assert swap.resident_bytes > 0
    assert all(torch.equal(p, before[n]) for n, p in denoiser.network.named_parameters())
    assert same_bits(gradients(denoiser), expected)
    assert all("forward" not in vars(module) for module in denoiser.network.modules())


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_falls_by_the_swapped_blocks_bytes(sd15_unet, recompute, monkeypatch):
    """Copies that are alive at any time, those that autograd keeps among them, are those of two blocks."""
    import weakref

    denoiser, alive, most = DiffusersDenoiser(sd15_unet), {}, []
    copy = block_swap.BlockSwap._copy

    def counted(self, number):
        result = copy(self, number)
        storage = result.flat.untyped_storage()
        alive[storage._cdata] = weakref.ref(storage), storage.nbytes()
        most.append(sum(size for one, size in alive.values() if one() is not None))
        return result

    monkeypatch.setattr(block_swap.BlockSwap, "_copy", counted)
    blocks = blocks_in_order(denoiser)[-30:]
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    with swapped_blocks(denoiser, 30, (), recompute) as swap, recomputed(denoiser.network, recompute):
        assert swap.swapped_bytes == sum(sizes)
        gradients(denoiser, trained=("conv_in.weight",))
        assert len(most) >= 2 * 30 - 2  # forward and backward
        assert max(most) <= 1.01 * max(a + b for a, b in zip(sizes, sizes[1:], strict=False)) + 2 * 256 * 40
    assert not any(one() is not None for one, _ in alive.values())


def test_one_block_ahead_is_fetched_in_both_directions(sd15_unet, monkeypatch):
    denoiser, fetched = DiffusersDenoiser(sd15_unet), []
    copy = block_swap.BlockSwap._copy
    monkeypatch.setattr(block_swap.BlockSwap, "_copy", lambda self, n: fetched.append((n, self._last)) or copy(self, n))
    with swapped_blocks(denoiser, 6):
        gradients(denoiser, trained=("conv_in.weight",))
    assert [n for n, _ in fetched] == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
    assert [(n, last) for n, last in fetched[2:]] == [(2, 0), (3, 1), (4, 2), (5, 3), (3, 5), (2, 4), (1, 3), (0, 2)]


def test_weights_of_other_dtypes_and_orders_of_dimensions_come_back(sd15_unet):
    import copy

    unet = copy.deepcopy(sd15_unet).to(torch.bfloat16).to(memory_format=torch.channels_last)
    denoiser = DiffusersDenoiser(unet)
    before = {n: (p.detach().clone(), p.stride()) for n, p in unet.named_parameters()}
    with swapped_blocks(denoiser, 38):
        assert all(p.stride() == before[n][1] for n, p in unet.named_parameters())
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.stride() == before[name][1]


def test_an_error_leaves_the_weights(sd15_unet):
    denoiser = DiffusersDenoiser(sd15_unet)
    before = {n: p.detach().clone() for n, p in denoiser.network.named_parameters()}
    with pytest.raises(RuntimeError), swapped_blocks(denoiser, 38):
        denoiser.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1.5]), Conditioning(torch.zeros(1, 5, 3)))
    assert all(torch.equal(p, before[n]) for n, p in denoiser.network.named_parameters())


def test_more_blocks_than_there_are_and_blocks_without_frozen_weights_are_refused(sd15_unet, caplog):
    denoiser = DiffusersDenoiser(sd15_unet)
    with pytest.raises(ValueError, match="block_swap is 39; expected at most 38, the blocks of this UNet"):
        check_block_swap(denoiser, 39)
    everything = {denoiser.canonical_name(name) for name, _ in denoiser.network.named_parameters()}
    with pytest.raises(ValueError, match="block_swap is 3, but all weights of these blocks train"):
        with swapped_blocks(denoiser, 3, everything):
            pass
    with caplog.at_level(logging.WARNING), swapped_blocks(denoiser, 1):
        assert "block_swap saves nothing on a CPU" in caplog.text


def lora_run(name, **settings):
    from retune.training.config.lora import LoraConfig
    from retune.training.config.training_settings import TrainingSettings

    settings = TrainingSettings(save_every=1, warmup_steps=0, **settings)
    return LoraConfig(run_name=name, steps=3, learning_rate=1e-3, rank=2, alpha=2.0, settings=settings)


def test_a_run_with_swapped_blocks_writes_the_same_bytes_and_may_begin_without(tiny_model, pictures, tmp_path):
    from retune.training.common.callbacks import Callbacks
    from retune.training.recipes.lora import train_lora

    class Stop(Callbacks):
        def on_step(self, info):
            if info.step == 2:
                raise KeyboardInterrupt

    count = len(blocks_in_order(tiny_model.denoiser))
    before = {name: p.detach().clone() for name, p in tiny_model.denoiser.network.named_parameters()}
    train_lora(tiny_model, pictures, lora_run("r"), tmp_path / "plain")
    swapped = lora_run("r", block_swap=count, gradient_checkpointing=True)
    train_lora(tiny_model, pictures, swapped, tmp_path / "swapped")
    with pytest.raises(KeyboardInterrupt):
        train_lora(tiny_model, pictures, lora_run("r", block_swap=1), tmp_path / "changed", Stop())
    train_lora(tiny_model, pictures, lora_run("r"), tmp_path / "changed")
    for root in ("swapped", "changed"):
        for file in ("lora.safetensors", "metrics.jsonl", "state/latest.safetensors"):
            assert (tmp_path / root / "r" / file).read_bytes() == (tmp_path / "plain" / "r" / file).read_bytes()
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.denoiser.network.named_parameters())


def test_a_run_with_more_blocks_than_there_are_ends_before_any_work(tiny_model, pictures, tmp_path):
    from retune.training.recipes.lora import train_lora

    with pytest.raises(ValueError, match="block_swap is 999; expected at most"):
        train_lora(tiny_model, pictures, lora_run("r", block_swap=999), tmp_path)
    assert not list(tmp_path.glob("r*"))


def test_swapping_blocks_of_which_all_weights_train_ends_before_any_work(tiny_model, pictures, tmp_path):
    from retune.training.config.run import TrainModelConfig
    from retune.training.config.training_settings import TrainingSettings
    from retune.training.recipes.unet import train_model

    config = TrainModelConfig(run_name="r", train="whole UNet", settings=TrainingSettings(block_swap=2))
    with pytest.raises(ValueError, match="block_swap is 2 with train = whole UNet; expected 0"):
        train_model(tiny_model, pictures, config, tmp_path)
    assert not list(tmp_path.glob("r*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_retraining_keeps_the_trained_weights_on_the_device(tiny_model, pictures, tmp_path, precision):
    from retune.training.config.run import TrainModelConfig
    from retune.training.config.training_settings import TrainingSettings
    from retune.training.recipes.unet import train_model

    found = []
    for number, count in enumerate((0, 4)):
        settings = TrainingSettings(warmup_steps=0, block_swap=count, precision=precision)
        run = TrainModelConfig(run_name=f"{number}", steps=2, learning_rate=1e-3, settings=settings)
        found.append(train_model(tiny_model, pictures, run, tmp_path).unet)
    assert same_bits(*found)


class Attention(torch.autograd.Function):
    """What fused attention keeps for backward, without computing it: on the meta device torch has no such kernel."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, size, kept, least", [({"cross_attention_dim": 768}, 64, 764, 163), (SDXL, 128, 5119, 588)]
)
def test_megabytes_of_activations_at_real_size(config, size, kept, least, live_bytes, monkeypatch):
    """SD1.5 at 512 pixels and SDXL at 1024, one picture in bf16: the figures of the help page."""
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: Attention.apply(q, k, v)
    )
    found = {}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(torch.bfloat16).requires_grad_(False)
        for enabled in (False, True):
            noisy = torch.empty(1, 4, size, size, dtype=torch.bfloat16, requires_grad=True)
            context = torch.empty(1, 77, config["cross_attention_dim"], dtype=torch.bfloat16, requires_grad=True)
            with recomputed(unet, enabled), live_bytes("meta") as memory:
                output = unet(noisy, torch.zeros(1), encoder_hidden_states=context).sample
                output.backward(torch.empty_like(output))
            found[enabled] = memory.peak / 2**20
    assert found[False] == pytest.approx(kept, rel=0.05) and found[True] == pytest.approx(least, rel=0.05)
