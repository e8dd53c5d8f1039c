"""DDIM as an affine chain: the sampler's own latents, and gradients step by step against autograd."""

import copy
from functools import partial

import pytest
import torch
from retune.benchmarks.memory import peak_saved_bytes
from retune.training.models.protocols import Conditioning
from retune.training.sampling.ddim import ddim_steps
from retune.training.sampling.guidance import Guidance
from retune.training.sampling.rollout import (
    advance,
    ddim_chain,
    first_latent,
    joint_end,
    rollout,
    stepwise_gradient,
)

COUNT = 6


@pytest.fixture
def double(tiny_model):
    """The tiny model's denoiser in float64."""
    denoiser = copy.copy(tiny_model.denoiser)
    denoiser.network = copy.deepcopy(denoiser.network).double().requires_grad_(False)
    return denoiser


def make_guidance(cfg=3.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    contexts = [torch.randn(2, 5, 32, generator=random, dtype=torch.float64).to(dtype) for _ in range(2)]
    return Guidance(*map(Conditioning, contexts), cfg)


def noise(dtype=torch.float64):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def reward(x):
    """Something smooth that every latent cell enters."""
    weights = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x)
    return (torch.tanh(x) * weights).sum()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_chain_is_the_samplers(tiny_model, prediction):
    denoiser = copy.copy(tiny_model.denoiser)
    denoiser.prediction_type = prediction
    guidance, start = make_guidance(dtype=torch.float32), noise(torch.float32)
    chain = ddim_chain(denoiser, COUNT)
    states = rollout(denoiser, first_latent(denoiser, start, chain), chain, guidance)
    with torch.no_grad():
        expected = [x for _, x in ddim_steps(denoiser, start, guidance, COUNT)]
    for ours, theirs in zip(states[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Flow:
    """A denoiser of flow prediction as far as a chain asks for one: its output is a smooth function of all it reads."""

    prediction_type = "flow"
    sigmas = torch.linspace(0.001, 1, 1000, dtype=torch.float64)

    def predict(self, noisy, sigma, conditioning):
        return torch.tanh(noisy * sigma.view(-1, 1, 1, 1) + conditioning.context.mean((1, 2)).view(-1, 1, 1, 1))

    def denoised(self, noisy, sigma, output):
        return noisy - sigma.view(-1, 1, 1, 1) * output


def test_the_chain_of_a_flow_model():
    denoiser, guidance = Flow(), make_guidance()
    chain = ddim_chain(denoiser, COUNT, torch.float64)
    states = rollout(denoiser, first_latent(denoiser, noise(), chain), chain, guidance)
    expected = [x for _, x in ddim_steps(denoiser, noise(), guidance, COUNT)]
    torch.testing.assert_close(states[-1], expected[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("last", [1, 3, COUNT])
def test_step_by_step_equals_joint_back_propagation(double, prediction, last):
    """Gradients of contexts and of a UNet weight, float64, 1e-10."""
    double.prediction_type = prediction
    guidance, chain = make_guidance().detached(), ddim_chain(double, COUNT, torch.float64)
    states = rollout(double, first_latent(double, noise(), chain), chain, guidance)
    weight = next(p for n, p in double.network.named_parameters() if n.endswith("attn2.to_k.weight"))
    weight.requires_grad_(True)
    inputs = [*guidance.tensors, weight]
    end = joint_end(double, states, chain, last, guidance, stop_gradient=True)
    expected = torch.autograd.grad(reward(end), inputs)
    torch.testing.assert_close(end.detach(), states[-1], rtol=1e-10, atol=1e-10)
    final = states[-1].clone().requires_grad_(True)
    (end_gradient,) = torch.autograd.grad(reward(final), final)
    found = stepwise_gradient(double, states, chain, range(COUNT - last, COUNT), guidance, end_gradient, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def test_the_last_steps_equal_full_autograd_on_the_same_detached_chain(double):
    """Without stop-gradient: latents of the first steps are constants, everything after them is differentiated."""
    guidance, chain, last = make_guidance().detached(), ddim_chain(double, COUNT, torch.float64), 3
    x = first_latent(double, noise(), chain)
    states = rollout(double, x, chain, guidance)
    for number, step in enumerate(chain):
        x = advance(double, x, step, guidance)
        if number < COUNT - last:
            x = x.detach()
    expected = torch.autograd.grad(reward(x), guidance.tensors)
    end = joint_end(double, states, chain, last, guidance, stop_gradient=False)
    for ours, theirs in zip(torch.autograd.grad(reward(end), guidance.tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def test_a_step_that_reads_nothing_of_it_gives_zeros(double):
    guidance, chain = make_guidance().detached(), ddim_chain(double, 2, torch.float64)
    states = rollout(double, first_latent(double, noise(), chain), chain, guidance)
    idle = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (found,) = stepwise_gradient(double, states, chain, [1], guidance, torch.ones_like(states[-1]), [idle])
    assert not found.any()


def test_peak_memory_is_flat_in_the_number_of_steps(double):
    """What autograd keeps of the UNet at most: within 5 % at 1 to 25 steps one by one, ten times as much jointly."""
    guidance, chain = make_guidance().detached(), ddim_chain(double, 25, torch.float64)
    states = rollout(double, first_latent(double, noise(), chain), chain, guidance)
    gradient, weights = torch.ones_like(states[-1]), list(double.network.parameters())

    def apart(last):
        chosen = range(25 - last, 25)
        run = partial(stepwise_gradient, double, states, chain, chosen, guidance, gradient, guidance.tensors)
        return peak_saved_bytes(run, weights)

    def joint(last):
        run = partial(joint_end, double, states, chain, last, guidance, stop_gradient=True)
        return peak_saved_bytes(lambda: run().sum().backward(), weights)

    sizes = [apart(last) for last in (1, 5, 10, 25)]
    assert sizes[0] > 10_000 and max(sizes) <= 1.05 * min(sizes)
    assert joint(25) >= 10 * joint(1)
