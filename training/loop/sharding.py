"""Whether a run can divide its weights among processes (`trainables.sharded`)."""

from __future__ import annotations

from ..common.distributed import world
from ..config.run import RunConfig, TrainModelConfig
from ..config.training_settings import ELEMENTWISE

START = "Start with `accelerate launch`, or set shard_weights off."


def check_sharding(config: RunConfig) -> None:
    """Raises ValueError for a run whose weights cannot be divided among processes."""
    settings = config.settings
    if not settings.shard_weights:
        return
    if not isinstance(config, TrainModelConfig):
        raise ValueError(
            "shard_weights is on in a training of something small; expected it for `train`, which retrains layers of "
            "a UNet. Set shard_weights off: several processes then train with whole weights each."
        )
    if world().size == 1:
        raise ValueError(
            "shard_weights is on with one process, as ComfyUI always has; expected several to divide weights among. "
            f"{START}"
        )
    if settings.optimizer not in ELEMENTWISE:
        raise ValueError(
            f"shard_weights is on with optimizer {settings.optimizer}; expected one of {', '.join(ELEMENTWISE)}, which "
            "update each number by itself."
        )
    if settings.precision == "fp16":
        raise ValueError(
            "shard_weights is on with precision fp16, whose overflows each process would see in its own part only; "
            "expected bf16 or fp32."
        )
    if settings.block_swap:
        raise ValueError(
            f"shard_weights is on with block_swap {settings.block_swap}; expected 0, since the weights of a block come "
            "from all processes."
        )
