"""Fitting a projection: exact where an exact answer exists, honest where none does."""

import pytest
import torch
from retune.training.text_encoder.fit import aligned, fit_projection

WORDS = [f"word{i} and more {i * 7 % 11}" for i in range(60)]


class Made:
    """States made from a prompt's words: `width` numbers a word, an end token, `pads` pads."""

    def __init__(self, width, pads=0, start=False, transform=None, noise=0.0):
        self.width, self.pads, self.start, self.transform, self.noise = width, pads, start, transform, noise

    def states(self, prompt):
        random = torch.Generator().manual_seed(sum(map(ord, prompt)))
        base = torch.randn(len(prompt.split()) + 1 + self.pads, 6, generator=random, dtype=torch.float64)
        states = base if self.transform is None else self.transform(base)
        states = states + self.noise * torch.randn(states.shape, generator=random, dtype=torch.float64)
        real = torch.tensor([True] * (len(prompt.split()) + 1) + [False] * self.pads)
        if self.start:
            states, real = torch.cat([torch.zeros_like(states[:1]), states]), torch.cat([torch.tensor([False]), real])
        return states, real


def test_a_linear_map_is_found_exactly():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=random, dtype=torch.float64)
    bias = torch.randn(4, generator=random, dtype=torch.float64)
    reference = Made(4, pads=3, start=True, transform=lambda x: x @ weight.T + bias)
    projection, report = fit_projection(Made(6, pads=3), reference, WORDS, ridge=1e-9)
    torch.testing.assert_close(projection.linear.weight.double(), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(projection.linear.bias.double(), bias, atol=1e-4, rtol=1e-4)
    assert report.explained == pytest.approx(1, abs=1e-6)
    assert (report.prompts, report.held_out) == (60, 12)


def test_noise_explains_nothing():
    unrelated = Made(6, transform=lambda x: x * 0, noise=1.0)
    assert abs(fit_projection(Made(6), unrelated, WORDS, ridge=1.0)[1].explained) < 0.1


def test_words_are_matched_by_their_share_of_the_prompt():
    states = torch.arange(5.0)[:, None]
    target = torch.tensor([[99.0], [10.0], [20.0], [50.0], [0.0], [0.0]])
    real = torch.tensor([False, True, True, True, False, False])
    x, y = aligned(states, torch.ones(5, dtype=torch.bool), target, real)
    assert x.flatten().tolist() == [0, 1, 2, 3, 4]
    assert y.flatten().tolist() == pytest.approx([10.0, 12.5, 17.5, 20.0, 50.0])


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="number of different prompts is 1; expected at least 10"):
        fit_projection(Made(6), Made(6), ["same"] * 20)
