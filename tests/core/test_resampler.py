"""The resampler: against PyTorch's own attention, with masks respected, saved and trained like any projection."""

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.models.protocols import Conditioning
from retune.training.text_encoder.projection import Projection, read_projection, save_projection
from retune.training.text_encoder.resampler import Resampler, hidden_width
from retune.training.text_encoder.scale import PROMPTS, scale_to
from retune.training.text_encoder.t5 import Padding, load_t5
from torch import nn

TEXTS = ["a red circle", "two small blue squares on a green ground, and a star", ""]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory, write_t5_folder):
    return write_t5_folder(tmp_path_factory.mktemp("t5"), d_model=48, d_kv=8, d_ff=64)


def encoder(folder, **padding):
    return load_t5(folder, Projection(48, 32, "resampler", tokens=7, layers=2), padding=Padding(**padding))


def reference(resampler, states, mask):
    """The same in PyTorch's modules: nn.MultiheadAttention with its own packed weights and key padding mask."""
    states = resampler.input(states)
    queries = resampler.queries.expand(len(states), -1, -1)
    for block in resampler.blocks:
        attention = nn.MultiheadAttention(queries.shape[-1], block.heads, bias=False, batch_first=True)
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight]))
            attention.out_proj.weight.copy_(block.to_out.weight)
        own = block.norm_queries(queries)
        read = torch.cat([block.norm_states(states), own], dim=1)
        hidden = torch.cat([~mask, torch.zeros(own.shape[:2], dtype=torch.bool)], dim=1)
        queries = queries + attention(own, read, read, key_padding_mask=hidden, need_weights=False)[0]
        forward = nn.Sequential(block.norm_hidden, block.widen, nn.GELU(), block.narrow)
        queries = queries + forward(queries)
    return resampler.norm(queries)


def test_equals_pytorchs_attention():
    resampler = Resampler(24, 128, tokens=5, layers=3)
    resampler.initialise(generator(0, "test"))
    assert resampler.blocks[0].heads == 2
    states = torch.randn(2, 9, 24, generator=generator(1, "test"))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    with torch.no_grad():
        result = resampler(states, mask)
        torch.testing.assert_close(result, reference(resampler, states, mask), atol=1e-5, rtol=1e-5)
        states[1, 4:] = 100  # hidden
        assert torch.equal(resampler(states, mask), result)
        assert not torch.allclose(resampler(states), result)
    assert result.shape == (2, 5, 128) and (result[0] - result[1]).abs().mean() > 0.05  # the text decides


def test_rows_of_a_batch_are_what_they_are_alone(t5_folder):
    t5 = encoder(t5_folder)
    tokens = t5.tokenize(TEXTS)
    batch = t5.encode(tokens)
    assert batch.context.shape == (3, 7, 32) and batch.mask is None
    for row, ids in enumerate(tokens):
        torch.testing.assert_close(batch.context[row], t5.encode([ids]).context[0], atol=1e-5, rtol=1e-5)
    unequal = Conditioning.cat([t5.backbone([ids]) for ids in tokens])  # as training stacks them
    torch.testing.assert_close(t5.project(unequal).context, batch.context, atol=1e-5, rtol=1e-5)
    padded = encoder(t5_folder, pad="max_tokens", max_tokens=40).encode(tokens)
    assert padded.context.shape == (3, 7, 32) and not torch.allclose(padded.context, batch.context, atol=1e-3)


def test_saved_and_loaded_is_bit_equal(t5_folder, tmp_path):
    t5 = encoder(t5_folder).scaled(0.3)
    save_projection(tmp_path / "p.safetensors", t5.projection)
    loaded = read_projection(tmp_path / "p.safetensors")
    assert loaded.config() == t5.projection.config() and (loaded.tokens, len(loaded.resampler.blocks)) == (7, 2)
    tokens = t5.tokenize(TEXTS)
    assert torch.equal(t5.with_projection(loaded).encode(tokens).context, t5.encode(tokens).context)


def test_every_weight_learns(t5_folder):
    t5 = encoder(t5_folder)
    result = t5.encode(t5.tokenize(TEXTS)).context
    (result * torch.randn(result.shape, generator=generator(0, "test"))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in t5.projection.parameters())


def test_scale_counts_all_its_tokens(t5_folder):
    scaled, report = scale_to(encoder(t5_folder), 0.9)
    states = torch.cat([scaled.encode([ids]).context[0] for ids in scaled.tokenize(list(PROMPTS))])
    assert len(states) == 7 * len(PROMPTS)
    assert states.std(unbiased=False).item() == pytest.approx(0.9, rel=1e-4) and report.after.std == pytest.approx(0.9)


def test_sizes():
    assert [hidden_width(width) for width in (32, 96, 128, 768, 1024, 2048)] == [32, 64, 128, 768, 768, 768]
    projection = Projection(64, 96, "resampler")
    assert projection.tokens == 64 and len(projection.resampler.blocks) == 6
    same, other = Projection(64, 96, "resampler", seed=0), Projection(64, 96, "resampler", seed=1)
    states = torch.randn(1, 3, 64, generator=generator(0, "test"))
    assert torch.equal(projection(states), same(states)) and not torch.equal(projection(states), other(states))
    with pytest.raises(ValueError, match="resampler has 0 tokens"):
        Projection(8, 8, "resampler", tokens=0)
