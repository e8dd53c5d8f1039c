"""How any training is carried out: identity, run folder, loop, result."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.fingerprint import tensors_sketch
from ..config.run import RunConfig, former_identity, identity
from ..loop.loop import Loop
from ..models.protocols import TextToImage
from ..runs.folder import RunFolder
from ..runs.outcome import guard_words, is_finished, record_failure
from ..runs.report import write_report
from ..trainables.weights import Trainable
from .checks import check_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
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


def run_training(
    job: TrainingJob,
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
            about = {"config": asdict(config), "environment": environment(model), **job.details}
            folder.claim({**identity, **job.identity}, about, former_identity(config))
        here.barrier()
        if finished(folder, config, job.artifact):
            callbacks.on_state("finished", folder.status()["step"])
            callbacks.on_end(f"run {folder.name} is finished; reading its result{guard_words(folder.status())}")
            return folder.path
        with record_failure(folder, callbacks):
            loop = loop_of(folder, callbacks)
        with model.denoiser.checkpointing(config.settings.gradient_checkpointing):
            values = loop.run()
        if here.is_main:
            with record_failure(folder, callbacks):
                callbacks.on_text(f"writing the result of run {folder.name}")
                job.write(folder, values, {"steps": loop.step, **loop.ending})
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
