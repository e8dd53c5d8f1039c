"""Advice for a run that does not fit into memory: which of its settings to lower, and to what."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config.run import RunConfig, TrainModelConfig
from ..config.training_settings import STEP_BY_TENSOR

LARGE_STATES = ("AdamW", "AdamWScheduleFree", "Prodigy")
"""Optimizers that keep two or more fp32 numbers for every trained one."""
MIN_PICTURE_SIZE = 64
"""Pixels; smaller pictures are not suggested."""


class OutOfMemory(torch.cuda.OutOfMemoryError):
    """A step did not fit into the device's memory; the message has advice. ComfyUI then unloads its models."""


def out_of_memory_message(step: int, saved_step: int, hints: str) -> str:
    """The error message of a run that ran out of memory.

    Args:
        step: number of finished steps.
        saved_step: the step whose state is on disk, -1 for none.
        hints: from `memory_hints`.
    """
    kept = f"the state after step {saved_step} is kept" if saved_step >= 0 else "there is no state to keep yet"
    where = f"after step {step}" if step else "in the first step"
    return f"memory ran out {where}; {kept}. {hints}".strip()


def memory_hints(config: RunConfig, size: tuple[int, int]) -> str:
    """Changes of a run's settings that save memory, the most useful first, without those it has already.

    size: width and height of its largest picture in pixels.
    """
    checkpointing = "" if config.settings.gradient_checkpointing else "gradient_checkpointing on (about a third slower)"
    others = [
        *_smaller_batch(config),
        *_smaller_pictures(config, size),
        *_smaller_numbers(config),
        *_fewer_weights(config),
    ]
    hints = [f"Turn {checkpointing}: this run then goes on where it is."] if checkpointing else []
    hints += _swap_hint(config)
    if others:
        start = "Or, under another run name" if hints else "Under another run name"
        hints.append(f"{start}: {'; '.join(others)}.")
    hints.append("Other programs that use the device may be closed too, and the same run queued again.")
    return " ".join(hints)


def _swap_hint(config: RunConfig) -> Iterator[str]:
    """Frozen weights in RAM, for a run that has them and recomputes its activations already."""
    settings = config.settings
    if settings.gradient_checkpointing and not settings.block_swap and not retrains_whole_unet(config):
        yield "Set block_swap above 0 (slower, frozen weights stay in RAM): this run then goes on where it is."


def _smaller_batch(config: RunConfig) -> Iterator[str]:
    """The next smaller batch, with more accumulation so that a step has the same number of images."""
    size, batches = config.batch_size, config.gradient_accumulation
    if size == 1:
        return
    smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)
    if config.settings.total_batch:
        yield f"batch_size {smaller} in place of {size}, with total_batch {config.settings.total_batch} as it is"
    else:
        yield (
            f"batch_size {smaller} in place of {size}, with gradient_accumulation {batches * size // smaller} in place "
            f"of {batches}, for as many images a step"
        )


def _smaller_pictures(config: RunConfig, size: tuple[int, int]) -> Iterator[str]:
    """Three quarters of each side, in multiples of MIN_PICTURE_SIZE, which every UNet can divide."""
    smaller = [side * 3 // 4 // MIN_PICTURE_SIZE * MIN_PICTURE_SIZE for side in size]
    if min(smaller) >= MIN_PICTURE_SIZE:
        yield f"pictures of {smaller[0]}x{smaller[1]} in place of {size[0]}x{size[1]} (resolution)"
    samples = config.samples
    if samples.prompts and samples.width * samples.height > size[0] * size[1]:
        yield f"samples of {size[0]}x{size[1]} in place of {samples.width}x{samples.height}"


def _smaller_numbers(config: RunConfig) -> Iterator[str]:
    """Fewer bytes per number: precision, optimizer state, average."""
    settings = config.settings
    if settings.precision == "fp32":
        yield "precision bf16 in place of fp32"
    if settings.optimizer in LARGE_STATES:
        yield f"optimizer AdamW8bit or Adafactor in place of {settings.optimizer}"
    fusible = settings.optimizer in STEP_BY_TENSOR and config.gradient_accumulation == 1
    if retrains_whole_unet(config) and fusible and not settings.fused_backward:
        yield "fused_backward on"
    if _can_round(config):
        yield "master_weights bf16"
    if settings.ema_decay:
        yield f"ema_decay 0 in place of {settings.ema_decay:g}"


def _can_round(config: RunConfig) -> bool:
    """Whether a run's masters may be bf16 and are not."""
    settings = config.settings
    possible = settings.optimizer in STEP_BY_TENSOR and not settings.ema_decay and not settings.shard_weights
    unscaled = settings.precision != "fp16"
    return isinstance(config, TrainModelConfig) and possible and unscaled and settings.master_weights == "fp32"


def _fewer_weights(config: RunConfig) -> Iterator[str]:
    """Fewer weights that train; these settings belong to some kinds of run only."""
    for name in ("rank", "lora_rank"):
        rank = getattr(config, name, 0)
        if rank > 1 and (name == "rank" or getattr(config, "train", "LoRA").endswith("LoRA")):
            yield f"{name} {rank // 2} in place of {rank}"
    if getattr(config, "text_encoder_learning_rate", 0):
        yield f"text_encoder_learning_rate 0 in place of {config.text_encoder_learning_rate:g}"
    if retrains_whole_unet(config):
        yield f"fewer layers than train = {config.train}"
    if not getattr(config, "stop_gradient", True):
        yield "stop_gradient on"


def retrains_whole_unet(config: RunConfig) -> bool:
    """Whether no weight of the UNet is frozen."""
    return getattr(config, "train", "") in ("whole UNet", "UNet")
