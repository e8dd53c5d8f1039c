"""Runs of the denoising objective on captioned images: caches, held-out images, samples and the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.rng import generator
from ..config.loop import LoopConfig
from ..config.run import RunConfig
from ..config.training_settings import TrainingSettings
from ..data.cache import LatentCache, TextCache
from ..data.dataset import split_validation
from ..data.examples import Dataset
from ..data.order import BatchOrder, Slot
from ..evaluation.text_gap import evaluate
from ..loop.loop import Loop
from ..loop.memory import memory_hints
from ..models.noise_levels import zero_terminal_sigmas
from ..models.protocols import TextToImage
from ..objectives.denoising import DenoisingObjective
from ..runs.folder import RunFolder
from ..runs.samples import Sampler
from ..sampling.generate import TextOf, decode, draw_latents, encode_with
from .run import TrainingJob, run_identity, run_training

log = logging.getLogger(__name__)


def train_on_images(
    job: TrainingJob, model: TextToImage, dataset: Dataset, config: RunConfig, root: Path, callbacks: Callbacks
) -> Path:
    """A training of the denoising objective on a data set; see `run_training`."""
    identity = run_identity(job.name, model, config) | {"dataset": dataset.fingerprint}
    return run_training(job, model, config, root, callbacks, identity, partial(build_loop, job, model, dataset, config))


def build_loop(
    job: TrainingJob, model: TextToImage, dataset: Dataset, config: RunConfig, folder: RunFolder, callbacks: Callbacks
) -> Loop:
    """Fills the caches, makes what trains, and puts a run of the denoising objective together.

    Where the text encoder trains it runs anew for every caption, with what trains in it, instead of once for the cache.
    """
    text_trains = job.text_trains
    model = _with_noise_levels(model, config.settings)
    training, held_out = split_validation(dataset, config.settings.validation_fraction, config.seed)
    latents, texts = _caches(model, folder.path.parent / ".cache")
    crops = {e.key: side.crop for side in (training, held_out) for e in side.examples}
    prompts = config.samples.prompts
    captions = (held_out if config.settings.varies_captions else dataset).captions
    if world().is_main:
        latents.fill(dataset, lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"))
    if world().is_main and not text_trains:
        texts.fill(["", *prompts, *captions], lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"))
    world().barrier()
    callbacks.after_load()
    text_of = encode_with(model.text_encoder) if text_trains else texts.get
    objective = DenoisingObjective(
        model.denoiser,
        config.settings,
        config.seed,
        latent_of=lambda slot: cropped_latent(latents.get, slot, crops[slot.example.key], config.seed),
        text_of=text_of,
        project=model.text_encoder.project,
        mask_of=lambda slot: cropped_latent(latents.mask, slot, crops[slot.example.key], config.seed),
        varied_text_of=(lambda caption: None) if text_trains else texts.once,
        caption_of=job.caption_of,
        pulse=callbacks.pulse,
    )
    order = BatchOrder(training, config.batch_size, config.seed)
    return Loop(
        folder,
        job.trainable(),
        objective,
        order,
        LoopConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            settings=replace(config.settings, gradient_accumulation=config.gradient_accumulation),
            samples=config.samples,
            steps_per_epoch=order.steps_per_epoch / config.gradient_accumulation,
            memory_hints=memory_hints(config, dataset.largest),
        ),
        sampler=build_sampler(model, config, text_of, callbacks) if prompts else None,
        validation=[Slot(e, False, i, 0) for i, e in enumerate(held_out.examples)] if held_out else [],
        evaluation=partial(evaluate, objective),
        watch=job.watch,
        callbacks=callbacks,
        device=model.denoiser.device,
    )


def _with_noise_levels(model: TextToImage, settings: TrainingSettings) -> TextToImage:
    """The model at the noise levels it trains and draws samples at."""
    if not settings.zero_terminal_snr:
        return model
    if settings.loss_weighting == "min-SNR":
        log.warning("min-SNR gives pure noise no weight; for zero_terminal_snr set loss_weighting to none or debiased.")
    return replace(model, denoiser=model.denoiser.with_sigmas(zero_terminal_sigmas(model.denoiser.sigmas)))


def build_sampler(model: TextToImage, config: RunConfig, text_of: TextOf, callbacks: Callbacks) -> Sampler:
    """Draws the sample prompts in batches that, doubled for guidance, are no larger than a training batch."""
    samples = config.samples

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


def _caches(model: TextToImage, root: Path) -> tuple[LatentCache, TextCache]:
    encoder = model.text_encoder
    texts = TextCache(root / "text", lambda t: encoder.backbone(encoder.tokenize(t)), encoder.fingerprint)
    return latent_cache(model, root), texts


def latent_cache(model: TextToImage, root: Path) -> LatentCache:
    """The cache of a model's latents below the folder `root`, which all runs share."""
    autoencoder = model.autoencoder
    return LatentCache(root / "latents", autoencoder.encode, autoencoder.fingerprint, downscale=autoencoder.downscale)


def cropped_latent(get: Callable[..., Tensor | None], slot: Slot, crop: str, seed: int) -> Tensor | None:
    """The latent or the mask of a slot, whichever `get` gives, cropped alike."""
    if crop == "random":
        random = generator(seed, "crop", slot.epoch, slot.index, slot.example.key)
        return get(slot.example, slot.flip, crop=crop, generator=random)
    return get(slot.example, slot.flip)
