"""Retraining parts of a UNet, and the projection behind its text encoder, on captioned images."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import TrainModelConfig, identity
from .data.cache import LatentCache, TextCache
from .data.dataset import split_validation
from .data.examples import Dataset
from .data.order import BatchOrder, Slot
from .fingerprint import tensors_fingerprint
from .formats import ldm
from .generate import draw
from .generators import generator
from .layers import select
from .loop import Callbacks, Loop, LoopConfig
from .model import TextToImage
from .objectives import DenoisingObjective
from .run_folder import RunFolder, read_tensors, write_tensors
from .trainable import SelectedWeights, targets

log = logging.getLogger(__name__)

ARTIFACT = "model.safetensors"
PROJECTION_PREFIX = "projection."


@dataclass(frozen=True)
class TrainedModel:
    """What a run made. unet: canonical (LDM) name -> fp32 weight; projection: name -> fp32 weight, maybe empty."""

    path: Path
    unet: dict[str, Tensor]
    projection: dict[str, Tensor]


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
    callbacks = callbacks or Callbacks()
    check_width(model)
    with RunFolder.open(Path(root), config.run_name, resume=config.resume) as folder:
        about = {"config": asdict(config), "environment": environment(model), **(details or {})}
        folder.claim(run_identity(model, dataset, config), about)
        if finished(folder, config.steps):
            callbacks.on_text(f"run {folder.name} is finished; reading its result")
            return read_trained(folder.path / ARTIFACT)
        trained = _train(model, dataset, config, folder, callbacks)
        folder.set_status("finished", config.steps)
        return trained


def check_width(model: TextToImage) -> None:
    """Raises ValueError when the text encoder's width is not what the UNet's cross-attention reads."""
    width, expected = model.text_encoder.width, model.denoiser.context_width
    if width != expected:
        raise ValueError(
            f"text encoder's width is {width}; the UNet reads {expected}. Load the text encoder with context_width "
            f"{expected} (or 'auto' with this model connected)."
        )


def run_identity(model: TextToImage, dataset: Dataset, config: TrainModelConfig) -> dict:
    """Everything that must be equal for a run to go on."""
    projection = model.text_encoder.projection
    start = tensors_fingerprint(projection.state_dict().items()) if projection is not None else ""
    return {
        "kind": "model",
        **identity(config),
        "model": model.denoiser.fingerprint,
        "text_encoder": model.text_encoder.fingerprint,
        "projection": start,
        "vae": model.autoencoder.fingerprint,
        "dataset": dataset.fingerprint,
    }


def environment(model: TextToImage) -> dict:
    """What decides the last bits of a result."""
    device = str(model.denoiser.device)
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}


def finished(folder: RunFolder, steps: int) -> bool:
    """Whether the folder holds the result of exactly this many steps."""
    status = folder.status()
    return status["state"] == "finished" and status["step"] == steps and (folder.path / ARTIFACT).exists()


def _train(
    model: TextToImage, dataset: Dataset, config: TrainModelConfig, folder: RunFolder, callbacks: Callbacks
) -> TrainedModel:
    training, held_out = split_validation(dataset, config.settings.validation_fraction, config.seed)
    latents, texts = _caches(model, folder.path.parent / ".cache")
    crops = {e.key: side.crop for side in (training, held_out) for e in side.examples}
    prompts = config.samples.prompts
    latents.fill(dataset, lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"))
    texts.fill(
        ["", *prompts, *(e.caption for e in dataset.examples)],
        lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"),
    )
    trainable = _trainable(model, config)
    objective = DenoisingObjective(
        model.denoiser,
        config.settings,
        config.seed,
        latent_of=lambda slot: _latent(latents, slot, crops[slot.example.key], config.seed),
        text_of=texts.get,
        project=model.text_encoder.project,
    )
    sizes = {"width": config.samples.width, "height": config.samples.height}
    look = {"steps": config.samples.steps, "cfg": config.samples.cfg, "seed": config.samples.seed}
    loop = Loop(
        folder,
        trainable,
        objective,
        BatchOrder(training, config.batch_size, config.seed),
        LoopConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            settings=config.settings,
            samples=config.samples,
        ),
        draw_samples=(
            lambda: draw(
                model,
                list(prompts),
                **sizes,
                **look,
                text_of=lambda p: model.text_encoder.project(texts.get(p).to(model.denoiser.device)),
                on_batch=lambda done, total: callbacks.on_text(f"drawing samples ({done}/{total})"),
            )
        )
        if prompts
        else None,
        validation=[Slot(e, False, i, 0) for i, e in enumerate(held_out.examples)] if held_out else [],
        callbacks=callbacks,
        device=model.denoiser.device,
    )
    with model.denoiser.checkpointing(config.settings.gradient_checkpointing):
        values = loop.run()
    return _write(folder, values, config)


def _caches(model: TextToImage, root: Path) -> tuple[LatentCache, TextCache]:
    encoder, autoencoder = model.text_encoder, model.autoencoder
    latents = LatentCache(root / "latents", autoencoder.encode, autoencoder.fingerprint)
    texts = TextCache(root / "text", lambda t: encoder.backbone(encoder.tokenize(t)), encoder.fingerprint)
    return latents, texts


def _latent(latents: LatentCache, slot: Slot, crop: str, seed: int) -> Tensor:
    if crop == "random":
        random = generator(seed, "crop", slot.epoch, slot.index, slot.example.key)
        return latents.get(slot.example, slot.flip, crop=crop, generator=random)
    return latents.get(slot.example, slot.flip)


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


def _write(folder: RunFolder, values: dict[str, Tensor], config: TrainModelConfig) -> TrainedModel:
    about = {"run": config.run_name, "train": config.train, "steps": config.steps}
    write_tensors(folder.path / ARTIFACT, values, {"retune.run": json.dumps(about)})
    return read_trained(folder.path / ARTIFACT)


def read_trained(path: Path) -> TrainedModel:
    """The result of a run from its file."""
    tensors, _ = read_tensors(path)
    unet = {k.removeprefix(ldm.UNET_PREFIX): v for k, v in tensors.items() if k.startswith(ldm.UNET_PREFIX)}
    projection = {k.removeprefix(PROJECTION_PREFIX): v for k, v in tensors.items() if k.startswith(PROJECTION_PREFIX)}
    return TrainedModel(Path(path), unet, projection)
