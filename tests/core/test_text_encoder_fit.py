"""Fitting a projection: exact where an exact answer exists, honest where none does."""

import pytest
import torch
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.text_encoder.fit import align_states, fit_projection, match_covariance, ridge_regression
from retune.training.text_encoder.scale import token_std

METHODS = ("ridge", "mean-covariance")
WORDS = [f"word{i} and more {i * 7 % 11}" for i in range(60)]


class Made:
    """States made from a prompt's words: `width` numbers a word or each of its `pieces`, an end token, `pads` pads."""

    def __init__(self, width, pads=0, start=False, transform=None, noise=0.0, pieces=1):
        self.width, self.pads, self.start, self.transform, self.noise = width, pads, start, transform, noise
        self.pieces = pieces

    def states(self, prompt):
        random = torch.Generator().manual_seed(sum(map(ord, prompt)))
        count = len(prompt.split()) * self.pieces + 1
        base = torch.randn(count + self.pads, 6, generator=random, dtype=torch.float64)
        states = base if self.transform is None else self.transform(base)
        states = states + self.noise * torch.randn(states.shape, generator=random, dtype=torch.float64)
        real = torch.tensor([True] * count + [False] * self.pads)
        if self.start:
            states, real = torch.cat([torch.zeros_like(states[:1]), states]), torch.cat([torch.tensor([False]), real])
        return states, real


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_map_is_found_exactly(method):
    """Where y = A x, C_y^(-1/2) A C_x^(1/2) has orthonormal rows, so that A is among the coloured maps."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=random, dtype=torch.float64)
    bias = torch.randn(4, generator=random, dtype=torch.float64)
    reference = Made(4, pads=3, start=True, transform=lambda x: x @ weight.T + bias)
    projection, report = fit_projection(Made(6, pads=3), reference, WORDS, ridge=1e-9, method=method)
    torch.testing.assert_close(projection.linear.weight.double(), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(projection.linear.bias.double(), bias, atol=1e-4, rtol=1e-4)
    assert report.explained == pytest.approx(1, abs=1e-6)
    assert report.std == pytest.approx(1, abs=1e-6) and report.covariance == pytest.approx(0, abs=1e-6)
    assert (report.method, report.prompts, report.held_out) == (method, 60, 12)


def test_noise_explains_nothing():
    unrelated = Made(6, transform=lambda x: x * 0, noise=1.0)
    assert abs(fit_projection(Made(6), unrelated, WORDS, ridge=1.0)[1].explained) < 0.1


def moments(encoder, transform=lambda x: x):
    """Mean and covariance of an encoder's real tokens, or of a map of them, over all prompts."""
    rows = [transform(states[real]) for states, real in map(encoder.states, WORDS)]
    return mean_and_covariance(torch.cat(rows))


def mean_and_covariance(values):
    return values.mean(0), torch.cov(values.T, correction=0)


def test_outputs_get_the_mean_and_covariance_of_the_references_own_tokens():
    """The reference has fewer tokens than the T5 and much that the T5 does not tell."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 6, generator=random, dtype=torch.float64)
    reference = Made(4, start=True, transform=lambda x: x @ weight.T + 5, noise=3.0)
    own = Made(6, pieces=3)
    fitted, report = fit_projection(own, reference, WORDS, method="mean-covariance")
    linear = fitted.linear.double()
    for found, wanted in zip(moments(own, linear), moments(reference), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    ridge = fit_projection(own, reference, WORDS)[1]
    assert abs(report.std - 1) < 0.05 and ridge.std < 0.8
    assert report.covariance < 0.4 < ridge.covariance
    assert report.text().startswith("mean-covariance: fitted on 60 prompts") and "of the reference's" in report.text()


def cloud(count, in_width, width, seed=0):
    """(count, in_width) states of unequal spread and (count, width) targets that follow them in part."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, in_width, generator=random, dtype=torch.float64) * torch.arange(1, in_width + 1) ** -0.5
    weight = torch.randn(width, in_width, generator=random, dtype=torch.float64)
    return x, x @ weight.T + torch.randn(count, width, generator=random, dtype=torch.float64) + 2


def root(matrix):
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def test_it_is_the_ridge_regression_by_optimal_transport():
    """T = C^(1/2) (C^(1/2) C_0 C^(1/2))^(-1/2) C^(1/2) takes a normal distribution of covariance C_0 to one of C."""
    x, y = cloud(300, 8, 5)
    weight, bias = match_covariance([(x, y)], [y], ridge=0.1)
    ridge, _ = ridge_regression([(x, y)], [y], ridge=0.1)
    wanted, got = (root(mean_and_covariance(values)[1]) for values in (y, x @ ridge.T))
    transport = wanted @ torch.linalg.inv(root(wanted @ got @ got @ wanted)) @ wanted
    torch.testing.assert_close(weight, transport @ ridge)
    torch.testing.assert_close(bias, y.mean(0) - weight @ x.mean(0))


def test_no_other_map_of_that_covariance_is_nearer():
    x, y = cloud(300, 8, 5)
    weight, bias = match_covariance([(x, y)], [y], ridge=0.0)
    spread = root(mean_and_covariance(y)[1])
    error = (x @ weight.T + bias - y).square().mean()
    random = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1.0):
        change = size * torch.randn(5, 5, generator=random, dtype=torch.float64)
        turned = spread @ torch.linalg.matrix_exp(change - change.T) @ torch.linalg.inv(spread) @ weight
        outputs = (x - x.mean(0)) @ turned.T + y.mean(0)
        torch.testing.assert_close(mean_and_covariance(outputs), mean_and_covariance(y))
        assert (outputs - y).square().mean() > error


def test_fewer_tokens_than_widths():
    x, y = cloud(30, 50, 40)
    weight, bias = match_covariance([(x, y)], [y])
    torch.testing.assert_close(mean_and_covariance(x @ weight.T + bias), mean_and_covariance(y))
    unseen = torch.linalg.svd(x - x.mean(0))[2][29:]
    torch.testing.assert_close(weight @ unseen.T, torch.zeros(40, 21, dtype=torch.float64))


def test_fewer_states_than_targets_have_directions():
    """Then the covariance is the nearest of their rank: the reference's largest principal directions."""
    x, y = cloud(300, 3, 5)
    weight, bias = match_covariance([(x, y)], [y])
    mean, covariance = mean_and_covariance(x @ weight.T + bias)
    values, vectors = torch.linalg.eigh(mean_and_covariance(y)[1])
    torch.testing.assert_close(covariance, vectors[:, 2:] * values[2:] @ vectors[:, 2:].T)
    torch.testing.assert_close(mean, y.mean(0))


def test_the_command_line_fits_by_either_method(single_file, write_t5_folder, tmp_path):
    folder = write_t5_folder(tmp_path / "t5", d_model=48, d_kv=8, d_ff=64)
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    files = {"model": str(single_file), "tokenizer": single_file.parent / "clip_tokenizer"}
    wanted = token_std(build_model(ModelConfig(**files)).text_encoder, WORDS)
    found = {}
    for method in METHODS:
        config = ModelConfig(**files, t5=str(folder), fit=tmp_path / "prompts.txt", fit_method=method)
        found[method] = token_std(build_model(config).text_encoder, WORDS)
    assert found["mean-covariance"] == pytest.approx(wanted, rel=1e-3)
    assert found["ridge"] < 0.98 * wanted


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="method is 'lasso'; expected one of ridge, mean-covariance"):
        fit_projection(Made(6), Made(6), WORDS, method="lasso")


def test_tokens_are_aligned_by_their_relative_position():
    states = torch.arange(5.0)[:, None]
    target = torch.tensor([[99.0], [10.0], [20.0], [50.0], [0.0], [0.0]])
    real = torch.tensor([False, True, True, True, False, False])
    x, y = align_states(states, torch.ones(5, dtype=torch.bool), target, real)
    assert x.flatten().tolist() == [0, 1, 2, 3, 4]
    assert y.flatten().tolist() == pytest.approx([10.0, 12.5, 17.5, 20.0, 50.0])


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="number of different prompts is 1; expected at least 10"):
        fit_projection(Made(6), Made(6), ["same"] * 20)
