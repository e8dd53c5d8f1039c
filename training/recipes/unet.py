"""Retraining of UNet layers, and of a text encoder's projection, on captioned images."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.files import write_tensors
from ..common.foreign import expect_tensors, metadata_json, read_tensors, reading
from ..config.run import TrainModelConfig
from ..data.examples import Dataset
from ..models import ldm
from ..models.layers import select
from ..models.noise_levels import zero_terminal_sigmas
from ..models.parameters import parameter_refs
from ..models.prediction import split_markers, unet_description
from ..models.protocols import TextToImage
from ..runs.folder import RunFolder
from ..text_encoder.projection import PROJECTION_PREFIX
from ..trainables.base import Trainable
from ..trainables.sharded import ShardedWeights
from ..trainables.weights import SelectedWeights, TrainableGroup
from .checks import check_fit, with_precision
from .denoising import train_on_images
from .run import AGAIN, TrainingJob

log = logging.getLogger(__name__)

ARTIFACT = "model.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """The result of a run.

    Attributes:
        path: its file.
        unet: canonical (LDM) name -> weight, in the dtype that it was trained in.
        projection: the projection's whole state, empty for a text encoder without one.
        projection_config: to build it with; empty likewise.
    """

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
    """`train_model_file`, and its result read into RAM."""
    return read_trained_model(train_model_file(model, dataset, config, root, callbacks, details).parent)


def train_model_file(
    model: TextToImage,
    dataset: Dataset,
    config: TrainModelConfig,
    root: Path,
    callbacks: Callbacks | None = None,
    details: dict | None = None,
) -> Path:
    """Retrains layers of a UNet, resumes such a run, or finds a finished one; returns the file of its result.

    The model is left bit-identical.

    Args:
        model: the base model.
        dataset: captioned images.
        config: settings; `config.resume` decides what happens to an earlier run of this name.
        root: folder of all runs.
        callbacks: progress display and cancelling.
        details: JSON for config.json besides the settings, such as the workflow.

    Raises:
        ValueError: before any training: a text encoder that does not fit the UNet, a run of other settings under this
            name, or too little disk.
    """
    config = with_precision(config, model.denoiser.device, Path(root))
    check_fit(model, config)
    job = TrainingJob(
        name="model",
        artifact=ARTIFACT,
        trainable=partial(_build_trainable, model, config),
        write=partial(_write, model, config),
        details=details or {},
    )
    folder = train_on_images(job, model, dataset, config, Path(root), callbacks or Callbacks())
    return expect_tensors(folder / ARTIFACT)


def _build_trainable(model: TextToImage, config: TrainModelConfig) -> Trainable:
    """The chosen layers, and the projection if it trains too."""
    denoiser, projection = model.denoiser, model.text_encoder.projection
    refs = {denoiser.canonical_name(name): ref for name, ref in parameter_refs(denoiser.network).items()}
    selected = {ldm.UNET_PREFIX + name: refs[name] for name in select(refs, config.train)}
    of_projection, networks = {}, [denoiser.network]
    if config.train_projection and projection is not None:
        of_projection = parameter_refs(projection, PROJECTION_PREFIX)
        networks.append(projection)
    elif config.train_projection:
        log.info("the text encoder has no projection; only the UNet trains")
    if not config.settings.shard_weights:
        bf16 = selected if config.settings.master_weights == "bf16" else ()
        return SelectedWeights(selected | of_projection, networks, bf16)
    mesh, recompute = world().mesh(denoiser.device), config.settings.gradient_checkpointing
    sharded = ShardedWeights(selected, denoiser.network, mesh, recompute)
    if not of_projection:
        return sharded
    return TrainableGroup((sharded, 1.0), (SelectedWeights(of_projection, [projection]), 1.0))


def _write(
    model: TextToImage,
    config: TrainModelConfig,
    folder: RunFolder,
    values: Mapping[str, Tensor],
    ending: Mapping[str, Any],
) -> None:
    """Writes the trained weights, and the whole projection whether it trained or not.

    A whole UNet is a file that others load: it tells what it predicts, as they read it.
    """
    projection, tensors = model.text_encoder.projection, dict(values)
    about = {"run": config.run_name, "train": config.train, **ending}
    metadata = {}
    if config.train == "whole UNet":
        sigmas = model.denoiser.sigmas
        sigmas = zero_terminal_sigmas(sigmas) if config.settings.zero_terminal_snr else sigmas
        markers, metadata = unet_description(model.denoiser.prediction_type, sigmas, ldm.UNET_PREFIX)
        tensors |= markers
    if projection is not None:
        about["projection"] = projection.config()
        tensors = {PROJECTION_PREFIX + name: value for name, value in projection.state_dict().items()} | tensors
    write_tensors(folder.path / ARTIFACT, tensors, {"retune.run": json.dumps(about)} | folder.base() | metadata)


def read_trained_model(folder: Path) -> TrainedModel:
    """The result of a run from its folder. Raises ValueError, with the file's name, for a damaged one."""
    file = Path(folder) / ARTIFACT
    tensors, metadata = read_tensors(file)
    tensors, _ = split_markers(tensors, ldm.UNET_PREFIX)
    unet = {k.removeprefix(ldm.UNET_PREFIX): v for k, v in tensors.items() if k.startswith(ldm.UNET_PREFIX)}
    projection = {k.removeprefix(PROJECTION_PREFIX): v for k, v in tensors.items() if k.startswith(PROJECTION_PREFIX)}
    with reading(file, advice=AGAIN):
        return TrainedModel(file, unet, projection, metadata_json(metadata, "retune.run").get("projection", {}))
