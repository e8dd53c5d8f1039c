"""bf16 masters with stochastic rounding: updates smaller than a bf16 number's last digit count on average.

An update is computed in fp32, by the optimizer itself and with its states in fp32, for one tensor at a time; the result
is rounded up or down to bf16 with probabilities that make its expected value exact (Gupta et al. 2015, arXiv
1502.02551; for weights in bf16 Zamirai et al. 2020, arXiv 2010.06192). Rounded to nearest, a weight would stand still
once its updates are below 1/256 of it.

torchao's optimizers and adv_optm round likewise, but from the global random state, which a resumed run does not
have, and only in optimizers of their own; optimi compensates errors in further tensors. Here every optimizer that
updates tensors one by one can be used, and every draw has a generator of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..common.distributed import world
from ..common.rng import derive_seed
from ..config.run import RunConfig, TrainModelConfig

DROPPED_BITS = 16
"""Last bits of an fp32 number that bf16 does not have."""


def check_master_weights(config: RunConfig) -> None:
    """Raises ValueError for a run whose masters cannot be bf16."""
    if config.settings.master_weights == "fp32":
        return
    if not isinstance(config, TrainModelConfig):
        raise ValueError(
            "master_weights is 'bf16' in a training of something small, or by rewards; expected it for Train Model "
            "(`train`), which retrains layers of a UNet. Set master_weights to 'fp32'."
        )
    if world().size > 1:
        raise ValueError(
            f"master_weights is 'bf16' with {world().size} processes; expected one, since gradients in bf16 would lose "
            "digits in their sum. Set master_weights to 'fp32'; shard_weights then saves memory."
        )


def stochastic_round(value: Tensor, random: torch.Generator) -> Tensor:
    """fp32 numbers as bf16 ones, one of the two neighbours at random, whose mean is the number itself.

    16 random bits are added to those that bf16 drops: a number that is the share p of the way from one neighbour to the
    next, away from zero, carries over with probability p. Numbers that are not finite stay as they are.

    Args:
        value: fp32.
        random: on the device of `value`.
    """
    bits = torch.randint(0, 1 << DROPPED_BITS, value.shape, generator=random, device=value.device, dtype=torch.int32)
    bits.add_(value.view(torch.int32)).bitwise_and_(-1 << DROPPED_BITS)
    return torch.where(value.isfinite(), bits.view(torch.float32), value).to(torch.bfloat16)


class RoundedMasters:
    """Steps an optimizer, tensor by tensor, through fp32 copies of those of its parameters that are bf16.

    Args:
        optimizer: its update of a tensor depends on no other one.
        parameters: the masters by name.
        seed: of the rounding; the draws of a tensor at a step are named by both.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], seed: int):
        self._optimizer, self._seed = optimizer, seed
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def step(self, step: int) -> None:
        """Updates all parameters that have a gradient, at optimizer step `step`."""
        for number, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_alone(number, parameter, step)

    @torch.no_grad()
    def step_alone(self, number: int, parameter: nn.Parameter, step: int) -> None:
        """Updates one parameter of group `number`."""
        if parameter.dtype != torch.bfloat16:
            step_alone(self._optimizer, number, parameter)
            return
        exact, states = nn.Parameter(parameter.detach().float()), self._optimizer.state
        exact.grad = parameter.grad.float()
        if parameter in states:
            states[exact] = states.pop(parameter)
        try:
            step_alone(self._optimizer, number, exact)
        finally:
            if exact in states:
                states[parameter] = states.pop(exact)
        parameter.copy_(stochastic_round(exact.detach(), self._random(parameter, step)))

    def _random(self, parameter: nn.Parameter, step: int) -> torch.Generator:
        seed = derive_seed(self._seed, "rounding", step, self._names[id(parameter)])
        return torch.Generator(parameter.device).manual_seed(seed)


def step_alone(optimizer: torch.optim.Optimizer, number: int, parameter: nn.Parameter) -> None:
    """Steps an optimizer for one parameter as one of its group `number`."""
    groups = optimizer.param_groups
    try:
        optimizer.param_groups = [{**groups[number], "params": [parameter]}]
        optimizer.step()
    finally:
        optimizer.param_groups = groups


@contextmanager
def fp32_states(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While entered, states that an optimizer loads stay fp32, also those of bf16 parameters, whose dtype torch and
    bitsandbytes would give them."""
    masters = [list(group["params"]) for group in optimizer.param_groups]
    stand_ins = [[_stand_in(parameter) for parameter in params] for params in masters]
    try:
        for group, params in zip(optimizer.param_groups, stand_ins, strict=True):
            group["params"] = params
        yield
    finally:
        for group, params, stood in zip(optimizer.param_groups, masters, stand_ins, strict=True):
            group["params"] = params
            for parameter, other in zip(params, stood, strict=True):
                if other is not parameter and other in optimizer.state:
                    optimizer.state[parameter] = optimizer.state.pop(other)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or an empty one in fp32 in the place of one in bf16."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    return nn.Parameter(torch.empty(0, device=parameter.device))
