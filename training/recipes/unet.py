"""Retraining parts of a UNet, and the projection behind its text encoder, on captioned images."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.callbacks import Callbacks
from ..common.files import read_tensors, write_tensors
from ..config.run import TrainModelConfig
from ..data.examples import Dataset
from ..models import ldm
from ..models.layers import select
from ..models.parameters import parameter_refs
from ..models.protocols import TextToImage
from ..runs.folder import RunFolder
from ..text_encoder.projection import PROJECTION_PREFIX
from ..trainables.weights import SelectedWeights
from .checks import check_fit
from .denoising import train_on_images
from .run import TrainingJob

log = logging.getLogger(__name__)

ARTIFACT = "model.safetensors"


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
    job = TrainingJob(
        name="model",
        artifact=ARTIFACT,
        trainable=partial(_trainable, model, config),
        write=lambda folder, values, ending: _write(folder, values, config, projection, ending),
        details=details or {},
    )
    return read_trained_model(
        train_on_images(job, model, dataset, config, Path(root), callbacks or Callbacks()) / ARTIFACT
    )


def _trainable(model: TextToImage, config: TrainModelConfig) -> SelectedWeights:
    denoiser, projection = model.denoiser, model.text_encoder.projection
    found = {denoiser.canonical_name(n): t for n, t in parameter_refs(denoiser.network).items()}
    selected = {ldm.UNET_PREFIX + name: found[name] for name in select(found, config.train)}
    networks = [denoiser.network]
    if config.train_projection and projection is not None:
        selected |= parameter_refs(projection, PROJECTION_PREFIX)
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


def read_trained_model(path: Path) -> TrainedModel:
    """The result of a run from its file."""
    tensors, metadata = read_tensors(path)
    unet = {k.removeprefix(ldm.UNET_PREFIX): v for k, v in tensors.items() if k.startswith(ldm.UNET_PREFIX)}
    projection = {k.removeprefix(PROJECTION_PREFIX): v for k, v in tensors.items() if k.startswith(PROJECTION_PREFIX)}
    config = json.loads(metadata["retune.run"]).get("projection", {})
    return TrainedModel(Path(path), unet, projection, config)
