"""Retraining parts of a UNet, and the projection behind its text encoder, on captioned images."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .callbacks import Callbacks
from .config import RunConfig, TrainingSettings, TrainModelConfig, former_identity, identity
from .data.cache import LatentCache, TextCache
from .data.dataset import split_validation
from .data.examples import Dataset
from .data.order import BatchOrder, Slot
from .distributed import world
from .ending import guard_words, is_finished, noted
from .evaluate import evaluate
from .files import read_tensors, write_tensors
from .fingerprint import tensors_sketch
from .formats import ldm
from .generate import TextOf, decode, draw_latents, heard_by
from .generators import generator
from .journal import check_tensorboard
from .layers import select
from .loop import Loop, LoopConfig, Sampler
from .memory import hints
from .model import TextToImage
from .noise import zero_terminal_sigmas
from .objectives import DenoisingObjective, check_objective
from .optim import check_optimizer
from .report import write_report
from .run_folder import RunFolder
from .trainable import SelectedWeights, Trainable, targets

log = logging.getLogger(__name__)

ARTIFACT = "model.safetensors"
PROJECTION_PREFIX = "projection."


@dataclass(frozen=True)
class TrainedModel:
    """What a run made. unet: canonical (LDM) name -> fp32 weight. projection: its whole state, with `projection_config`
    to build it again; both empty for a text encoder without one."""

    path: Path
    unet: dict[str, Tensor]
    projection: dict[str, Tensor]
    projection_config: dict


def train_model(
    model: TextToImage,
    dataset: Dataset,
    config: TrainModelConfig,
    root: Path,
    callbacks: Callbacks | None = None,
    details: dict | None = None,
) -> TrainedModel:
    """Trains, or goes on, or returns a finished run of this name and config from disk; see `config.resume`.

    root: the folder that holds all runs. details: anything JSON that should stand in config.json beside the settings
    (such as the workflow). The model is left bit-identical. Raises ValueError before any training for a text encoder
    that does not fit the UNet, a run of other settings under this name, or too little disk.
    """
    check_fit(model, config)
    projection = model.text_encoder.projection
    kind = Kind(
        name="model",
        artifact=ARTIFACT,
        trainable=partial(_trainable, model, config),
        write=lambda folder, values, ending: _write(folder, values, config, projection, ending),
        details=details or {},
    )
    return read_trained(carry_out(kind, model, dataset, config, Path(root), callbacks or Callbacks()) / ARTIFACT)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What one kind of training has of its own."""

    name: str
    """"model" or "lora"; part of a run's identity."""
    artifact: str
    """File of the result in the run folder."""
    trainable: Callable[[], Trainable]
    """Made when the caches are full and the network is loaded: masters take memory."""
    write: Callable[[RunFolder, Mapping[str, Tensor], dict], None]
    """Writes the result from the trained values; the last argument says how the run ended."""
    identity: dict = field(default_factory=dict)
    """What else must be equal for a run to go on."""
    details: dict = field(default_factory=dict)
    """Anything JSON that should stand in config.json beside the settings."""
    text_trains: bool = False
    """Whether the text encoder has something that trains; its `training` is entered by the caller."""
    caption_of: Callable[[str, int, int], str] | None = None
    """Caption of an image, as batch number (0: outside of training) and place in it show it; needs text_trains."""
    watch: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    """Of the trained values: what the loop logs now and then."""


def carry_out(
    kind: Kind, model: TextToImage, dataset: Dataset, config: RunConfig, root: Path, callbacks: Callbacks
) -> Path:
    """A training of the denoising objective on a data set; see `run_in_folder`."""
    identity = run_identity(kind.name, model, config) | {"dataset": dataset.fingerprint}
    return run_in_folder(
        kind, model, config, root, callbacks, identity, partial(denoising_loop, kind, model, dataset, config)
    )


def run_in_folder(
    kind: Kind,
    model: TextToImage,
    config: RunConfig,
    root: Path,
    callbacks: Callbacks,
    identity: Mapping[str, Any],
    loop_of: Callable[[RunFolder, Callbacks], Loop],
) -> Path:
    """Trains, or goes on, and writes the result, unless the run has it already; returns the run folder's path."""
    here = world()
    with open_run(root, config) as folder:
        if here.is_main:
            check_steps(folder, config.steps)
            about = {"config": asdict(config), "environment": environment(model), **kind.details}
            folder.claim({**identity, **kind.identity}, about, former_identity(config))
        here.barrier()
        if finished(folder, config, kind.artifact):
            callbacks.on_state("finished", folder.status()["step"])
            callbacks.on_end(f"run {folder.name} is finished; reading its result{guard_words(folder.status())}")
            return folder.path
        with noted(folder, callbacks):
            loop = loop_of(folder, callbacks)
        with model.denoiser.checkpointing(config.settings.gradient_checkpointing):
            values = loop.run()
        if here.is_main:
            with noted(folder, callbacks):
                callbacks.on_text(f"writing the result of run {folder.name}")
                kind.write(folder, values, {"steps": loop.step, **loop.ending})
            folder.set_status("finished", loop.step, **loop.ending)
            write_report(folder)
            callbacks.on_state("finished", loop.step)
            callbacks.on_end(f"run {folder.name} is finished after {loop.step} steps{guard_words(loop.ending)}")
        here.barrier()
        return folder.path


def open_run(root: Path, config: RunConfig) -> AbstractContextManager[RunFolder]:
    """The run folder, locked by the main process alone."""
    if world().is_main:
        return RunFolder.open(root, config.run_name, resume=config.resume)
    return nullcontext(RunFolder(root / config.run_name))


def check_steps(folder: RunFolder, steps: int) -> None:
    done = folder.status()["step"]
    if done > steps:
        raise ValueError(
            f"steps is {steps}; run {folder.name!r} has done {done}. Ask for as many, or choose resume = restart."
        )


def check_fit(model: TextToImage, config: RunConfig) -> None:
    """Raises ValueError for what could only fail after long work: widths, precision, loss weighting, channels."""
    check_tensorboard(config.settings)
    check_width(model)
    check_pooled(model)
    denoiser, settings = model.denoiser, config.settings
    check_optimizer(settings, config.learning_rate, denoiser.device)
    if settings.precision == "fp16" and denoiser.device.type != "cuda":
        raise ValueError("precision is 'fp16' without a CUDA device; expected 'fp32' or 'bf16' there.")
    check_objective(settings, denoiser.prediction_type)
    channels = denoiser.input_channels
    if channels != denoiser.latent_channels:
        raise ValueError(
            f"UNet reads {channels} channels; expected {denoiser.latent_channels}. Inpainting and edit models have "
            "inputs that captioned images do not give."
        )


def check_width(model: TextToImage) -> None:
    """Raises ValueError when the text encoder's width is not what the UNet's cross-attention reads."""
    width, expected = model.text_encoder.width, model.denoiser.context_width
    if width != expected:
        raise ValueError(
            f"text encoder's width is {width}; the UNet reads {expected}. Load the text encoder with context_width "
            f"{expected} (or 'auto' with this model connected)."
        )


def check_pooled(model: TextToImage) -> None:
    """Raises ValueError when the UNet reads a pooled text (SDXL) that the text encoder does not give."""
    width, expected = model.text_encoder.pooled_width, model.denoiser.pooled_width
    if expected and width != expected:
        raise ValueError(
            f"text encoder's pooled output is {width or 'none'}; the UNet reads one of {expected}, as SDXL does. Load "
            "the text encoder with context_width 'sdxl' (or 'auto' with this model connected)."
        )


def run_identity(kind: str, model: TextToImage, config: RunConfig) -> dict:
    """What must be equal for a run to go on, its data aside. kind: what is made, "model" or "lora"."""
    projection = model.text_encoder.projection
    start = tensors_sketch(projection.state_dict().items()) if projection is not None else None
    return {
        "kind": kind,
        **identity(config),
        "model": model.denoiser.fingerprint,
        "text_encoder": model.text_encoder.fingerprint,
        "projection": start,
        "vae": model.autoencoder.fingerprint,
    }


def environment(model: TextToImage) -> dict:
    """What decides the last bits of a result."""
    device = str(model.denoiser.device)
    about = {"python": platform.python_version(), "system": platform.platform()}
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device, **about}


def finished(folder: RunFolder, config: RunConfig, artifact: str) -> bool:
    """Whether the folder holds the result of exactly these steps, or of a run that stopped early all the same."""
    ended = is_finished(folder.status(), config.steps, config.settings, config.guard_rule)
    return ended and (folder.path / artifact).exists()


def denoising_loop(
    kind: Kind, model: TextToImage, dataset: Dataset, config: RunConfig, folder: RunFolder, callbacks: Callbacks
) -> Loop:
    """Fills the caches, makes what trains, and puts a run of the denoising objective together.

    Where the text encoder trains it runs anew for every caption, with what trains in it, instead of once for the cache.
    """
    text_trains = kind.text_trains
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
    text_of = heard_by(model.text_encoder) if text_trains else texts.get
    objective = DenoisingObjective(
        model.denoiser,
        config.settings,
        config.seed,
        latent_of=lambda slot: shown(latents.get, slot, crops[slot.example.key], config.seed),
        text_of=text_of,
        project=model.text_encoder.project,
        mask_of=lambda slot: shown(latents.mask, slot, crops[slot.example.key], config.seed),
        varied_text_of=(lambda caption: None) if text_trains else texts.once,
        caption_of=kind.caption_of,
        pulse=callbacks.pulse,
    )
    order = BatchOrder(training, config.batch_size, config.seed)
    return Loop(
        folder,
        kind.trainable(),
        objective,
        order,
        LoopConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            settings=replace(config.settings, gradient_accumulation=config.gradient_accumulation),
            samples=config.samples,
            steps_per_epoch=order.steps_per_epoch / config.gradient_accumulation,
            when_full=hints(config, dataset.largest),
        ),
        sampler=sampler_of(model, config, text_of, callbacks) if prompts else None,
        validation=[Slot(e, False, i, 0) for i, e in enumerate(held_out.examples)] if held_out else [],
        evaluation=partial(evaluate, objective),
        watch=kind.watch,
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


def sampler_of(model: TextToImage, config: RunConfig, text_of: TextOf, callbacks: Callbacks) -> Sampler:
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


def shown(get: Callable[..., Tensor | None], slot: Slot, crop: str, seed: int) -> Tensor | None:
    """The latent or the mask of a slot, whichever `get` gives, cropped alike."""
    if crop == "random":
        random = generator(seed, "crop", slot.epoch, slot.index, slot.example.key)
        return get(slot.example, slot.flip, crop=crop, generator=random)
    return get(slot.example, slot.flip)


def _trainable(model: TextToImage, config: TrainModelConfig) -> SelectedWeights:
    denoiser, projection = model.denoiser, model.text_encoder.projection
    found = {denoiser.canonical_name(n): t for n, t in targets(denoiser.network).items()}
    selected = {ldm.UNET_PREFIX + name: found[name] for name in select(found, config.train)}
    networks = [denoiser.network]
    if config.train_projection and projection is not None:
        selected |= targets(projection, PROJECTION_PREFIX)
        networks.append(projection)
    elif config.train_projection:
        log.info("the text encoder has no projection; only the UNet trains")
    return SelectedWeights(selected, networks)


def _write(
    folder: RunFolder,
    values: Mapping[str, Tensor],
    config: TrainModelConfig,
    projection: nn.Module | None,
    ending: Mapping[str, Any],
) -> None:
    about = {"run": config.run_name, "train": config.train, **ending}
    whole = dict(values)
    if projection is not None:
        about["projection"] = projection.config()
        whole = {PROJECTION_PREFIX + name: value for name, value in projection.state_dict().items()} | whole
    write_tensors(folder.path / ARTIFACT, whole, {"retune.run": json.dumps(about)})


def read_trained(path: Path) -> TrainedModel:
    """The result of a run from its file."""
    tensors, metadata = read_tensors(path)
    unet = {k.removeprefix(ldm.UNET_PREFIX): v for k, v in tensors.items() if k.startswith(ldm.UNET_PREFIX)}
    projection = {k.removeprefix(PROJECTION_PREFIX): v for k, v in tensors.items() if k.startswith(PROJECTION_PREFIX)}
    config = json.loads(metadata["retune.run"]).get("projection", {})
    return TrainedModel(Path(path), unet, projection, config)
