"""Trainings of the denoising objective on captioned images: caches, held-out images and the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..common.callbacks import Callbacks
from ..config.run import RunConfig
from ..config.training_settings import TrainingSettings
from ..data.cache import TextCache
from ..data.dataset import split_validation
from ..data.examples import Dataset
from ..data.order import BatchOrder, Slot
from ..evaluation.text_gap import evaluate
from ..loop.loop import Loop
from ..loop.plan import plan_text
from ..models.noise_levels import zero_terminal_sigmas
from ..models.protocols import Conditioning, TextToImage
from ..objectives.denoising import DenoisingObjective
from ..runs.folder import RunFolder
from ..sampling.generate import encode_with
from .latents import CroppedLatents, fill_cache, latent_cache
from .run import TrainingJob, loop_config, run_training
from .samples import build_sampler

log = logging.getLogger(__name__)


def train_on_images(
    job: TrainingJob, model: TextToImage, dataset: Dataset, config: RunConfig, root: Path, callbacks: Callbacks
) -> Path:
    """Carries out a training of the denoising objective on a data set; see `run_training`."""
    job = replace(job, identity={"dataset": dataset.fingerprint} | job.identity)
    return run_training(job, model, config, root, callbacks, partial(build_loop, job, model, dataset, config))


def build_loop(
    job: TrainingJob, model: TextToImage, dataset: Dataset, config: RunConfig, folder: RunFolder, callbacks: Callbacks
) -> tuple[Loop, Callable[[], None]]:
    """Trainable, objective and loop, and what fills the caches that they read."""
    model = _with_noise_levels(model, config.settings)
    training, held_out = split_validation(dataset, config.settings.validation_fraction, config.seed)
    cache_folder = folder.path.parent / ".cache"
    cache = latent_cache(model, cache_folder)
    latents = CroppedLatents(cache, (training, held_out), config.seed)
    captions = (held_out if config.settings.varies_captions else dataset).captions
    texts = ["", *config.samples.prompts, *captions]
    text_functions, fill_texts = _text_functions(job, model, texts, cache_folder, callbacks)
    callbacks.after_load()
    objective = DenoisingObjective(
        model.denoiser,
        config.settings,
        config.seed,
        latent_of=latents.latent,
        project=model.text_encoder.project,
        mask_of=latents.mask,
        caption_of=job.caption_of,
        stays=job.stays,
        pulse=callbacks.pulse,
        **text_functions,
    )
    order = BatchOrder(training, config.batch_size, config.seed)
    steps_per_epoch = order.steps_per_epoch / config.gradient_accumulation
    loop = Loop(
        folder,
        job.trainable(),
        objective,
        order,
        loop_config(config, dataset.largest, steps_per_epoch, plan_text(training, config, steps_per_epoch)),
        sampler=build_sampler(model, config, objective.text_of, callbacks),
        validation=[Slot(e, False, i, 0) for i, e in enumerate(held_out.examples)] if held_out else [],
        evaluation=partial(evaluate, objective),
        watch=job.watch,
        callbacks=callbacks,
        device=model.denoiser.device,
    )

    def fill() -> None:
        fill_cache(cache, dataset, callbacks)
        fill_texts()

    return loop, fill


def _text_functions(
    job: TrainingJob, model: TextToImage, texts: list[str], cache_folder: Path, callbacks: Callbacks
) -> tuple[dict[str, Callable], Callable[[], None]]:
    """`text_of`, `texts_of` and `varied_text_of` of the objective, and what fills the cache that they read.

    The cache gets `texts`. Where the text encoder trains, every caption is encoded anew instead, a batch's captions
    together, with the trained values in effect.
    """
    encoder = model.text_encoder

    def backbone(captions: list[str]) -> Conditioning:
        return encoder.backbone(encoder.tokenize(captions))

    if job.text_trains:
        anew = {"text_of": encode_with(encoder), "texts_of": backbone, "varied_text_of": lambda caption: None}
        return anew, lambda: None
    cache = TextCache(cache_folder / "text", backbone, encoder.fingerprint)
    cached = {"text_of": cache.get, "varied_text_of": cache.get_in_memory}
    return cached, partial(fill_cache, cache, texts, callbacks)


def _with_noise_levels(model: TextToImage, settings: TrainingSettings) -> TextToImage:
    """The model at the noise levels of training and samples."""
    if not settings.zero_terminal_snr:
        return model
    if settings.loss_weighting == "min-SNR":
        log.warning("min-SNR gives pure noise no weight; for zero_terminal_snr set loss_weighting to none or debiased.")
    return replace(model, denoiser=model.denoiser.with_sigmas(zero_terminal_sigmas(model.denoiser.sigmas)))
