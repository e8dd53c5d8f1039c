"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) whose steps do not wait for an accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor: its formula, settings and state.

    torch's step brings two norms of each parameter to the host, which on an accelerator waits each time. Here these
    stay where they are, as numbers in fp32. Where all parameters are on the CPU the step is torch's own, bit for bit.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"]):
            super().step()
            return
        for group in self.param_groups:
            tensors = [[] for _ in range(6)]
            self._init_group(group, *tensors)
            for parameter, *others in zip(*tensors, strict=True):
                _update(parameter, *others, group=group)


def _update(
    parameter: Tensor,
    gradient: Tensor,
    row_var: Tensor | None,
    col_var: Tensor | None,
    variance: Tensor | None,
    count: Tensor,
    *,
    group: Mapping[str, Any],
) -> None:
    """`_single_tensor_adafactor` in torch/optim/_adafactor.py, without its reads; count: of steps, on the CPU."""
    count += 1
    rate, step, (eps1, eps2) = group["lr"], count.item(), group["eps"]
    eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
    alpha = _root_mean_square(parameter).clamp_(min=eps2) * min(rate, step**-0.5)
    if group["weight_decay"]:
        parameter.mul_(1 - rate * group["weight_decay"])
    change = step ** group["beta2_decay"]  # 1 - beta2
    if gradient.dim() > 1:
        row_var.lerp_(_mean_square(gradient, -1), change)
        col_var.lerp_(_mean_square(gradient, -2), change)
        estimate = row_var @ col_var
        estimate.div_(row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1))
    else:
        estimate = variance.lerp_(gradient * gradient, change).clone()
    update = estimate.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient)
    alpha /= (_root_mean_square(update) / group["d"]).clamp_(min=1)
    parameter.addcmul_(update, alpha, value=-1)


def _root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.norm(2) / tensor.numel() ** 0.5


def _mean_square(tensor: Tensor, dim: int) -> Tensor:
    """The mean of squares along a dimension, without a tensor of squares."""
    return torch.norm(tensor, dim=dim, keepdim=True).square_().div_(tensor.size(dim))
