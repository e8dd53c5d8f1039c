"""Selection of layers: counts on Stable Diffusion's UNet, and what a reset changes and leaves alone."""

import logging
import math

import pytest
import torch
from retune.training.config.run import LAYERS
from retune.training.models import ldm
from retune.training.models.layers import LAYER_PATTERNS, ResetConfig, reset_weights, select

BLOCK = "middle_block.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def sd1_names():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    names = {b: a for a, b in ldm.unet_names(unet.config).items()}
    return [ldm.rename(name, names) for name in unet.state_dict()]


COUNTS = {
    "cross-attention": 16 * 5,  # q, k, v, and the output's weight and bias, in 16 transformer blocks
    "cross-attention K/V": 16 * 2,
    "QK": 16 * 4,
    "self-attention": 16 * 5,
    "all attention": 16 * 10,
    "whole UNet": 686,
}


@pytest.mark.parametrize("layers", LAYERS)
def test_counts_on_sd1(sd1_names, layers):
    found = select(sd1_names, layers)
    assert len(found) == len(set(found)) == COUNTS[layers]


def test_choices_are_those_of_the_config():
    assert tuple(LAYER_PATTERNS) == LAYERS


def test_blocks_narrow_the_choice(sd1_names):
    assert select(sd1_names, "cross-attention K/V", "middle") == [
        f"{BLOCK}.attn2.to_k.weight",
        f"{BLOCK}.attn2.to_v.weight",
    ]
    down, up = (select(sd1_names, "cross-attention", b) for b in ("input_blocks", "output_blocks"))
    assert (len(down), len(up)) == (6 * 5, 9 * 5)
    assert len(select(sd1_names, "cross-attention", "middle|output_blocks")) == 10 * 5


def test_nothing_found_warns_and_bad_choices_are_errors(sd1_names, caplog):
    with caplog.at_level(logging.WARNING):
        assert select(sd1_names, "cross-attention", "nowhere") == []
    assert "no parameter matched layers 'cross-attention' within blocks 'nowhere'" in caplog.text
    with pytest.raises(ValueError, match="layers is 'attn'; expected one of cross-attention"):
        select(sd1_names, "attn")
    with pytest.raises(ValueError, match=r"blocks is '\(', not a regular expression"):
        select(sd1_names, "QK", "(")


def attention(width=96, context=64, blocks=("input_blocks.1.1.transformer_blocks.0", BLOCK)):
    """Weights of two transformer blocks and of layers around them, std 0.3."""
    random = torch.Generator().manual_seed(0)
    weights = {}
    for block in blocks:
        for layer, reads in (("attn1", width), ("attn2", context)):
            shapes = {
                "to_q": (width, width),
                "to_k": (width, reads),
                "to_v": (width, reads),
                "to_out.0": (width, width),
            }
            for part, shape in shapes.items():
                weights[f"{block}.{layer}.{part}.weight"] = 0.3 * torch.randn(shape, generator=random)
            weights[f"{block}.{layer}.to_out.0.bias"] = 0.3 * torch.randn(width, generator=random)
        weights[f"{block}.norm1.weight"] = torch.ones(width)
    return weights


def kinds(names):
    return {name.split("transformer_blocks.0.")[1].removesuffix(".weight") for name in names}


@pytest.mark.parametrize(
    "layers, parts",
    [
        ("cross-attention", {"attn2.to_q", "attn2.to_k", "attn2.to_v"}),
        ("cross-attention K/V", {"attn2.to_k", "attn2.to_v"}),
        ("QK", {"attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k"}),
        ("self-attention", {"attn1.to_q", "attn1.to_k", "attn1.to_v"}),
        ("all attention", {f"attn{i}.to_{p}" for i in (1, 2) for p in "qkv"}),
    ],
)
def test_reset_chooses_its_tensors_and_leaves_the_input_alone(layers, parts):
    weights = attention()
    before = {name: value.clone() for name, value in weights.items()}
    new, report = reset_weights(weights, ResetConfig(layers=layers))
    assert kinds(new) == parts and len(new) == 2 * len(parts)
    assert all(torch.equal(weights[n], before[n]) for n in before)
    assert all(not torch.equal(new[n], before[n]) for n in new)
    assert [row[0] for row in report.rows] == list(new)


def test_output_is_reset_only_on_request():
    outputs = {"attn2.to_out.0", "attn2.to_out.0.bias"}
    new, _ = reset_weights(attention(), ResetConfig(layers="cross-attention", include_output=True))
    assert kinds(new) == {"attn2.to_q", "attn2.to_k", "attn2.to_v"} | outputs


def test_default_is_what_torch_linear_draws():
    new, _ = reset_weights(attention(), ResetConfig(layers="cross-attention", include_output=True))
    for name, value in new.items():
        fan_in = 64 if "to_k" in name or "to_v" in name else 96
        bound = 1 / math.sqrt(fan_in)
        assert value.abs().max() <= bound
        if value.ndim == 2:  # uniform on +-bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert value.mean().item() == pytest.approx(0, abs=0.05 * bound)


def test_normal_keeps_each_tensors_own_std():
    weights = attention()
    weights[f"{BLOCK}.attn2.to_k.weight"] *= 3
    new, _ = reset_weights(weights, ResetConfig(layers="cross-attention K/V", init="normal"))
    for name, value in new.items():
        assert value.std().item() == pytest.approx(weights[name].std().item(), rel=0.05)


def test_perturb_adds_noise_of_the_asked_size():
    weights = attention()
    new, _ = reset_weights(weights, ResetConfig(layers="QK", init="perturb", strength=0.5))
    for name, value in new.items():
        added = value - weights[name]
        assert added.std().item() == pytest.approx(0.5 * weights[name].std().item(), rel=0.05)


@pytest.mark.parametrize("layers", ["cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention"])
def test_zero_output_silences_the_attention_it_resets(layers):
    new, _ = reset_weights(attention(), ResetConfig(layers=layers, init="zero output"))
    outputs = {name: value for name, value in new.items() if "to_out" in name}
    assert outputs and all(not value.any() for value in outputs.values())
    touched = {name.split(".to_")[0] for name in new}
    assert {name.split(".to_")[0] for name in outputs} == touched
    assert all(value.any() for name, value in new.items() if name not in outputs)


@pytest.mark.parametrize("init", ["default", "normal", "zero output"])
def test_strength_blends_old_and_new(init):
    weights = attention()
    whole, _ = reset_weights(weights, ResetConfig(layers="cross-attention", init=init))
    part, _ = reset_weights(weights, ResetConfig(layers="cross-attention", init=init, strength=0.25))
    none, _ = reset_weights(weights, ResetConfig(layers="cross-attention", init=init, strength=0.0))
    for name in whole:
        torch.testing.assert_close(part[name], 0.75 * weights[name] + 0.25 * whole[name])
        assert torch.equal(none[name], weights[name])


def test_draws_depend_on_seed_and_name_alone():
    whole, _ = reset_weights(attention(), ResetConfig(layers="cross-attention", seed=3))
    part, _ = reset_weights(attention(), ResetConfig(layers="cross-attention K/V", seed=3, blocks="middle"))
    assert len(part) == 2 and all(torch.equal(value, whole[name]) for name, value in part.items())
    other, _ = reset_weights(attention(), ResetConfig(layers="cross-attention K/V", seed=4))
    assert all(not torch.equal(value, whole[name]) for name, value in other.items())


def test_half_weights_give_fp32_values():
    half = {name: value.half() for name, value in attention().items()}
    new, _ = reset_weights(half, ResetConfig(layers="QK", init="perturb", strength=0.1))
    assert all(value.dtype == torch.float32 for value in new.values())


def test_report_names_every_tensor_with_both_stds():
    weights = attention()
    new, report = reset_weights(weights, ResetConfig(layers="cross-attention K/V", blocks="middle"))
    assert str(report).splitlines()[0] == "2 tensors reset" and len(str(report).splitlines()) == 3
    for name, before, after in report.rows:
        assert before == pytest.approx(weights[name].std(correction=0).item())
        assert after == pytest.approx(new[name].std(correction=0).item())


def test_reset_of_nothing_and_bad_strengths_are_refused():
    with pytest.raises(ValueError, match="blocks 'nowhere'"):
        reset_weights(attention(), ResetConfig(layers="QK", blocks="nowhere"))
    with pytest.raises(ValueError, match="strength is 1.5; expected 0.0 to 1.0"):
        ResetConfig(layers="QK", strength=1.5)
    assert ResetConfig(layers="QK", init="perturb", strength=1.5)
    with pytest.raises(ValueError, match="layers is 'whole UNet'"):
        ResetConfig(layers="whole UNet")
