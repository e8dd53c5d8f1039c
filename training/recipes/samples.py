"""How a run draws its sample pictures."""

from __future__ import annotations

from torch import Tensor

from ..common.callbacks import Callbacks
from ..config.run import RunConfig
from ..models.protocols import TextToImage
from ..runs.samples import Sampler
from ..sampling.generate import TextOf, decode, draw_latents


def build_sampler(model: TextToImage, config: RunConfig, text_of: TextOf, callbacks: Callbacks) -> Sampler | None:
    """The sampler of a run's sample prompts, or None where there are none.

    Its batches, doubled for guidance, are no larger than a training batch.

    Args:
        model: draws and decodes, and scores the pictures if it has a judge.
        config: its samples and batch size.
        text_of: prompt -> conditioning.
        callbacks: progress display and cancelling.
    """
    samples = config.samples
    if not samples.prompts:
        return None

    def draw() -> list[Tensor]:
        return draw_latents(
            model,
            list(samples.prompts),
            width=samples.width,
            height=samples.height,
            steps=samples.steps,
            cfg=samples.cfg,
            seed=samples.seed,
            batch_size=max(1, config.batch_size // 2),
            text_of=text_of,
            on_batch=lambda done, total: callbacks.on_text(f"drawing samples ({done}/{total})"),
        )

    return Sampler(draw, lambda latents: decode(model, latents, callbacks.pulse), model.judge)
