"""DDIM whose end is differentiated with respect to what single steps read, one UNet graph at a time.

A deterministic DDIM step (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0) is affine in the network's output:
x' = a x + b out. With the gradient stopped at the network's input (DRTune, arXiv 2405.00760) the end of the chain
depends on the output of step i by d x_N / d out_i = b_i a_{i+1} ... a_{N-1} alone, a number. So each step is
back-propagated on its own, and peak memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..common.transfer import upload
from ..models.protocols import Denoiser
from .ddim import noise_schedule, scale_noise
from .guidance import Guidance, guided


@dataclass(frozen=True)
class Step:
    """One step of a chain: x' = a x + b out, where out is the network's (guided) output at `sigma`.

    sigma, a and b: scalars, or one per sample, sigma (B,) and the others (B, 1, 1, 1).
    """

    sigma: Tensor
    a: Tensor
    b: Tensor

    def images(self, numbers: slice) -> Step:
        """The step of some of the batch's images."""
        return Step(self.sigma[numbers], self.a[numbers], self.b[numbers]) if self.sigma.ndim else self


OutputGradient = Callable[[int, slice, Tensor], Tensor]
"""(number of a step, the images' numbers, their outputs (B', C, h, w)) -> gradient, at these outputs, of a further term
of the objective."""


def ddim_chain(denoiser: Denoiser, count: int, dtype: torch.dtype = torch.float32) -> list[Step]:
    """The steps of `ddim_steps`, noisiest first, as coefficients of x and of the network's output.

    x' = (sigma' / sigma) x + (alpha' - sigma' alpha / sigma) D with D = p x + q out. Equal to the expression in
    `ddim_steps` up to rounding; both expressions stay, because pictures and tuned
    models depend on their last bits.
    """
    alphas, sigmas = noise_schedule(denoiser, count, dtype)
    steps = []
    for i, sigma in enumerate(sigmas[:-1]):
        p, q = _latent_coefficients(denoiser, sigma)
        of_x, of_latent = sigmas[i + 1] / sigma, alphas[i + 1] - sigmas[i + 1] * alphas[i] / sigma
        steps.append(Step(sigma, of_x + of_latent * p, of_latent * q))
    return steps


def on_device(chain: Sequence[Step], device: torch.device) -> list[Step]:
    """The steps of `ddim_chain` on a device, in one copy."""
    numbers = upload(torch.stack([torch.stack([step.sigma, step.a, step.b]) for step in chain]), device)
    return [Step(*row) for row in numbers.unbind()]


def clean_step(denoiser: Denoiser, sigma: Tensor) -> Step:
    """The step from a noisy latent x straight to the clean one, D = p x + q out; sigma: a scalar or one per sample."""
    return Step(sigma, *_latent_coefficients(denoiser, sigma))


def _latent_coefficients(denoiser: Denoiser, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of the clean latent D = p x + q out, from the denoiser's own formula at (x, out) = (1, 0) and (0, 1)."""
    shape = (sigma.numel(), 1, 1, 1)
    one, zero = sigma.new_ones(shape), sigma.new_zeros(shape)
    p, q = (denoiser.denoised(x, sigma.reshape(-1), out) for x, out in ((one, zero), (zero, one)))
    return (p, q) if sigma.ndim else (p.view(()), q.view(()))


def first_latent(denoiser: Denoiser, noise: Tensor, chain: Sequence[Step]) -> Tensor:
    """The noisy latent that a chain starts from; noise: (B, C, h, w), standard normal."""
    return scale_noise(denoiser, noise, chain[0].sigma.to(noise))


def guided_output(denoiser: Denoiser, x: Tensor, step: Step, guidance: Guidance) -> Tensor:
    """The network's output (B, C, h, w) under guidance."""
    return guided(denoiser.predict, x, step.sigma.to(x).expand(len(x)), guidance)


def advance(denoiser: Denoiser, x: Tensor, step: Step, guidance: Guidance, *, stop_gradient: bool = False) -> Tensor:
    """The latent after one step; stop_gradient: the network reads x detached."""
    out = guided_output(denoiser, x.detach() if stop_gradient else x, step, guidance)
    return step.a.to(x) * x + step.b.to(x) * out


def _no_pulse() -> None:
    """No progress callback."""


@torch.no_grad()
def rollout(
    denoiser: Denoiser, x: Tensor, chain: Sequence[Step], guidance: Guidance, pulse: Callable[[], None] = _no_pulse
) -> list[Tensor]:
    """Runs a whole chain without gradients.

    Args:
        x: (B, C, h, w), the latent before the first step, as `first_latent` returns it.
        guidance: the conditionings of all steps.
        pulse: called before each step; may raise to cancel.

    Returns:
        The latents before each step, then the end: len(chain) + 1 tensors (B, C, h, w).
    """
    states = [x]
    for step in chain:
        pulse()
        states.append(advance(denoiser, states[-1], step, guidance))
    return states


def stepwise_gradient(
    denoiser: Denoiser,
    states: Sequence[Tensor],
    chain: Sequence[Step],
    chosen: Sequence[int],
    guidance: Guidance,
    end_gradient: Tensor,
    inputs: Sequence[Tensor],
    output_gradient: OutputGradient | None = None,
    pulse: Callable[[], None] = _no_pulse,
    images: Sequence[slice] = (slice(None),),
) -> list[Tensor]:
    """Gradient of a function of the chain's end through the network outputs of some steps, one step at a time.

    Equals back-propagation through the whole chain with `stop_gradient`, all other steps' outputs held constant.

    Args:
        denoiser: the network of the chain.
        states: the latents that `rollout` returned.
        chain: the steps.
        chosen: numbers of the steps whose outputs are differentiated.
        guidance: the conditionings of all steps.
        end_gradient: (B, C, h, w), the function's gradient at states[-1].
        inputs: tensors to differentiate with respect to: those of `guidance`, parameters of the network.
        output_gradient: adds a function of each chosen step's output, by its gradient there.
        pulse: called before each graph of the network; may raise to cancel.
        images: parts of the batch; each has a graph of its own, one in memory at a time.

    Returns:
        One gradient for each of `inputs`, zeros for those that no chosen step reads.
    """
    total: list[Tensor | None] = [None] * len(inputs)
    for number, part in product(chosen, images):
        pulse()
        step = chain[number].images(part)
        weight = _weight_at_end(chain[number:], part)
        with torch.enable_grad():
            out = guided_output(denoiser, states[number][part], step, guidance.images(part))
            at_output = weight.to(out) * end_gradient[part]
            if output_gradient is not None:
                at_output = at_output + output_gradient(number, part, out.detach())
            gradients = torch.autograd.grad(out, inputs, at_output, allow_unused=True)
        total = add_gradients(total, gradients)
    return zeros_for_none(inputs, total)


def _weight_at_end(chain: Sequence[Step], images: slice) -> Tensor:
    """d end / d out of the first step of a chain."""
    weight, *factors = (step.images(images).a if i else step.images(images).b for i, step in enumerate(chain))
    for factor in factors:
        weight = weight * factor
    return weight


def add_gradients(total: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of two lists of gradients, where None is zero."""
    pairs = zip(total, more, strict=True)
    return [whole if part is None else part if whole is None else whole + part for whole, part in pairs]


def zeros_for_none(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of `inputs`, zeros in place of None."""
    return [torch.zeros_like(x) if part is None else part for x, part in zip(inputs, gradients, strict=True)]


def joint_end(
    denoiser: Denoiser,
    states: Sequence[Tensor],
    chain: Sequence[Step],
    last: int,
    guidance: Guidance,
    stop_gradient: bool,
    pulse: Callable[[], None] = _no_pulse,
) -> Tensor:
    """The chain's end (B, C, h, w) with the graph of its last steps, to back-propagate through them jointly.

    Args:
        denoiser: the network of the chain.
        states: the latents that `rollout` returned.
        chain: the steps.
        last: number of final steps in the graph.
        guidance: the conditionings of all steps.
        stop_gradient: the network reads each latent detached.
        pulse: called before each of the last steps; may raise to cancel.
    """
    x = states[len(chain) - last]
    for step in chain[len(chain) - last :]:
        pulse()
        x = advance(denoiser, x, step, guidance, stop_gradient=stop_gradient)
    return x
