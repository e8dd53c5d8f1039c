"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def update_ema(ema: Mapping[str, Tensor], parameters: Mapping[str, Tensor], step: int, decay: float) -> None:
    """Moves the averages towards the parameters of optimizer step `step` (from 1), in place.

    ema = d ema + (1 - d) parameter, with the warm-up of TensorFlow's ExponentialMovingAverage:
    d = min(decay, (1 + step) / (10 + step)).
    """
    decay = min(decay, (1 + step) / (10 + step))
    if ema:
        current = [parameters[name].detach().to(average) for name, average in ema.items()]
        get_ema_multi_avg_fn(decay)(list(ema.values()), current, None)
