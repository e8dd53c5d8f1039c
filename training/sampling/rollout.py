"""DDIM whose end is differentiated by what single steps read, one UNet graph at a time.

A deterministic DDIM step (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0) is affine in the network's output:
x' = a x + b out. With the gradient stopped at the network's input (DRTune, arXiv 2405.00760) the end of the chain
depends on the output of step i by d x_N / d out_i = b_i a_{i+1} ... a_{N-1} alone, a number. So each step can be gone
through backward on its own, and peak memory does not grow with their count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.protocols import Conditioning, Denoiser
from .ddim import timesteps


@dataclass(frozen=True)
class Step:
    """One step of a chain: x' = a x + b out, where out is the network's (guided) output at `sigma`.

    sigma, a and b: scalars, or one a sample, sigma (B,) and the others (B, 1, 1, 1).
    """

    sigma: Tensor
    a: Tensor
    b: Tensor


OutputGradient = Callable[[int, Tensor], Tensor]
"""Of a step's number and its output (B, C, h, w): the gradient there of something that is to be maximised as well."""


@dataclass(frozen=True)
class Guidance:
    """What guidance reads: out = negative + cfg (positive - negative), arXiv 2207.12598; negative None without it."""

    positive: Conditioning
    negative: Conditioning | None = None
    cfg: float = 1.0

    def detached(self) -> Guidance:
        """The same values as leaves that want a gradient."""
        negative = None if self.negative is None else _leaves(self.negative)
        return Guidance(_leaves(self.positive), negative, self.cfg)

    @property
    def tensors(self) -> list[Tensor]:
        """Contexts and pooled outputs, the positive's first."""
        found = [self.positive, *([] if self.negative is None else [self.negative])]
        return [tensor for one in found for tensor in (one.context, one.pooled) if tensor is not None]


def _leaves(one: Conditioning) -> Conditioning:
    pooled = None if one.pooled is None else one.pooled.detach().requires_grad_(True)
    return Conditioning(one.context.detach().requires_grad_(True), pooled, one.mask)


def ddim_chain(denoiser: Denoiser, count: int, dtype: torch.dtype = torch.float32) -> list[Step]:
    """The steps of `sampling.ddim_steps`, the noisiest first, as numbers; their denoised latent is p x + q out."""
    times = timesteps(count, len(denoiser.sigmas))
    sigmas = [denoiser.sigmas[time].to(dtype) for time in times] + [torch.zeros((), dtype=dtype)]
    steps = []
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        p, q = _clean(denoiser, sigma)
        ratio, share = following / sigma, 1 - following / sigma
        if denoiser.prediction_type == "flow":
            share = 1 - following - following * (1 - sigma) / sigma
        steps.append(Step(sigma, ratio + share * p, share * q))
    return steps


def clean_step(denoiser: Denoiser, sigma: Tensor) -> Step:
    """The step that ends at once: from x to the clean latent p x + q out that its output stands for; sigma: a scalar or
    one a sample, (B,)."""
    return Step(sigma, *_clean(denoiser, sigma))


def _clean(denoiser: Denoiser, sigma: Tensor) -> tuple[Tensor, Tensor]:
    shape = (sigma.numel(), 1, 1, 1)
    one, zero = sigma.new_ones(shape), sigma.new_zeros(shape)
    p, q = (denoiser.denoised(x, sigma.reshape(-1), out) for x, out in ((one, zero), (zero, one)))
    return (p, q) if sigma.ndim else (p.view(()), q.view(()))


def first_latent(denoiser: Denoiser, noise: Tensor, chain: Sequence[Step]) -> Tensor:
    """Where a chain begins, in the sampler's space; noise: (B, C, h, w), standard normal."""
    sigma = chain[0].sigma.to(noise)
    return noise * sigma if denoiser.prediction_type == "flow" else noise * torch.sqrt(1 + sigma**2)


def guided_output(denoiser: Denoiser, x: Tensor, step: Step, guidance: Guidance) -> Tensor:
    """The network's output (B, C, h, w) under guidance."""
    sigma = step.sigma.to(x).expand(len(x))
    if guidance.negative is None or guidance.cfg == 1.0:
        return denoiser.predict(x, sigma, guidance.positive)
    both = Conditioning.cat([guidance.positive, guidance.negative])
    positive, negative = denoiser.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return negative + guidance.cfg * (positive - negative)


def advance(denoiser: Denoiser, x: Tensor, step: Step, guidance: Guidance, *, stop_gradient: bool = False) -> Tensor:
    """One step on; stop_gradient: no gradient goes through what the network reads of x."""
    out = guided_output(denoiser, x.detach() if stop_gradient else x, step, guidance)
    return step.a.to(x) * x + step.b.to(x) * out


def _no_pulse() -> None:
    """No progress callback."""


@torch.no_grad()
def rollout(
    denoiser: Denoiser, x: Tensor, chain: Sequence[Step], guidance: Guidance, pulse: Callable[[], None] = _no_pulse
) -> list[Tensor]:
    """The latents before each step, and the end: len(chain) + 1 of (B, C, h, w). pulse: called before each step."""
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
    wanted: Sequence[Tensor],
    of_output: OutputGradient | None = None,
    pulse: Callable[[], None] = _no_pulse,
) -> list[Tensor]:
    """Gradient of a function of the chain's end with respect to `wanted`, through the outputs of the chosen steps.

    states: as `rollout` gives them. guidance: its tensors may be among `wanted`, as may parameters of the network.
    end_gradient: (B, C, h, w), the function's gradient at states[-1]. Equals back-propagation through the whole chain
    with `stop_gradient`, all steps but the chosen ones held constant. of_output: adds a function of each chosen step's
    output, by its gradient there. One tensor for each of `wanted`, zeros for those that no chosen step reads. pulse:
    called before each of them.
    """
    total: list[Tensor | None] = [None] * len(wanted)
    for number in chosen:
        pulse()
        weight = chain[number].b
        for later in chain[number + 1 :]:
            weight = weight * later.a
        with torch.enable_grad():
            out = guided_output(denoiser, states[number], chain[number], guidance)
            at_output = weight.to(out) * end_gradient
            if of_output is not None:
                at_output = at_output + of_output(number, out.detach())
            found = torch.autograd.grad(out, wanted, at_output, allow_unused=True)
        total = [_added(whole, part) for whole, part in zip(total, found, strict=True)]
    return [torch.zeros_like(one) if part is None else part for one, part in zip(wanted, total, strict=True)]


def _added(whole: Tensor | None, part: Tensor | None) -> Tensor | None:
    return whole if part is None else part if whole is None else whole + part


def joint_end(
    denoiser: Denoiser,
    states: Sequence[Tensor],
    chain: Sequence[Step],
    last: int,
    guidance: Guidance,
    stop_gradient: bool,
    pulse: Callable[[], None] = _no_pulse,
) -> Tensor:
    """The chain's end (B, C, h, w) with gradients through its last steps, so many.

    states: as `rollout` gives them. stop_gradient: as for `advance`. pulse: called before each.
    """
    x = states[len(chain) - last]
    for step in chain[len(chain) - last :]:
        pulse()
        x = advance(denoiser, x, step, guidance, stop_gradient=stop_gradient)
    return x
