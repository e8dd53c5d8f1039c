"""How any training is carried out: identity, run folder, loop, result."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.fingerprint import tensors_sketch
from ..common.full_precision import full_precision
from ..common.tensor_writer import take_part
from ..config.loop import LoopConfig
from ..config.reward import RewardTuneConfig
from ..config.run import RunConfig, former_identity, identity
from ..data.order import Slot
from ..data.prompts import PromptSlot
from ..loop.estimate import FILLING, MemoryEstimate, Rehearsal, check_memory, estimate_memory, free_bytes
from ..loop.gradient_step import GradientStep
from ..loop.known_peaks import KnownPeaks, key_of
from ..loop.loop import Loop
from ..loop.memory import memory_hints
from ..models import ldm
from ..models.block_swap import freed_bytes, swapped_blocks
from ..models.compiled import channels_last, compiled_blocks
from ..models.diffusers import DiffusersAutoencoder, DiffusersDenoiser
from ..models.parameters import copied_to
from ..models.prediction import describe
from ..models.protocols import TextToImage
from ..models.visitors import send_visitors_away
from ..runs.folder import RunFolder
from ..runs.outcome import describe_guard, is_finished, record_failure
from ..runs.report import REPORT, write_report
from ..trainables.base import Trainable
from .checks import check_steps

log = logging.getLogger(__name__)

AGAIN = "Put the file back, or choose resume = restart."
"""What to do about a damaged result of a run."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """How one recipe differs from the others."""

    name: str
    """"model", "lora", "embedding" or "reward"; part of a run's identity."""
    artifact: str
    """File of the result in the run folder."""
    trainable: Callable[[], Trainable]
    """Called when the network is loaded, whose weights are copied."""
    write: Callable[[RunFolder, Mapping[str, Tensor], dict], None]
    """Writes the result from the trained values; the last argument tells how the run ended."""
    identity: dict = field(default_factory=dict)
    """Further entries of the run's identity, which must be equal for it to resume."""
    details: dict = field(default_factory=dict)
    """JSON for config.json besides the settings."""
    text_trains: bool = False
    """Whether something in the text encoder trains; the caller enters its `training`."""
    caption_of: Callable[[str, int, int], str] | None = None
    """(caption, batch number, place in the batch) -> the caption that the image is trained with; the number is 0
    outside of training. Needs text_trains."""
    stays: Callable[[str], bool] = lambda tag: False
    """Whether tag dropout must keep a tag, such as one with a word that trains."""
    watch: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    """Figures of the trained values, for rows with event "watch"."""
    networks: tuple[nn.Module, ...] = ()
    """Networks that are in memory besides the model, such as rewards."""


def run_training(
    job: TrainingJob,
    model: TextToImage,
    config: RunConfig,
    root: Path,
    callbacks: Callbacks,
    build_loop: Callable[[RunFolder, Callbacks], tuple[Loop, Callable[[], None]]],
) -> Path:
    """Trains, resumes or finds a finished run; returns the folder of the run, with its result.

    A run that cannot fit is refused before anything but one sample is encoded.

    Args:
        job: the recipe's part.
        model: the base model.
        config: settings of the run; `config.resume` decides what happens to an earlier one of this name.
        root: folder of all runs.
        callbacks: progress display and cancelling.
        build_loop: called in the run folder when there is something to train; returns the loop, and what encodes all
            that the run encodes in advance, the caches by the main process alone.

    Raises:
        ValueError: the name belongs to a run of other settings, or to one in use; or it has done more steps; or a batch
            does not divide among the processes; or the run cannot fit into the device's memory.
    """
    here, run = world(), run_identity(job.name, model, config) | job.identity
    here.share(config.batch_size)
    with open_run(root, config) as folder:
        if here.is_main:
            check_steps(folder, config.steps)
            about = {"config": asdict(config), **prediction(model), "environment": environment(model), **job.details}
            folder.claim(run, about, former_identity(config))
        here.barrier()
        if _is_finished(folder, config, job.artifact):
            if here.is_main and not (folder.path / REPORT).is_file():
                write_report(folder)
            callbacks.on_state("finished", folder.status()["step"])
            callbacks.on_end(f"run {folder.name} is finished; reading its result{describe_guard(folder.status())}")
            return folder.path
        with record_failure(folder, callbacks):
            loop, fill = build_loop(folder, callbacks)
            with model.denoiser.checkpointing(config.settings.gradient_checkpointing):
                expect_memory(job, model, config, loop, callbacks)
        swaps = config.settings.block_swap and isinstance(model.denoiser, DiffusersDenoiser)  # ComfyUI moves it itself
        if not swaps:
            _fill(fill, folder, callbacks)
        with _in_blocks(model, config, loop):
            if swaps:
                _fill(fill, folder, callbacks)
            with loop.trainable.mounted():
                values = loop.run()
        if here.is_main:
            _finish(job, folder, loop, values, callbacks)
        else:
            take_part(values)
        here.barrier()
        return folder.path


def _fill(fill: Callable[[], None], folder: RunFolder, callbacks: Callbacks) -> None:
    """Encodes in advance; the other processes wait for the main one."""
    with record_failure(folder, callbacks):
        fill()
        world().barrier()
        callbacks.after_load()


@contextmanager
def _in_blocks(model: TextToImage, config: RunConfig, loop: Loop) -> Iterator[None]:
    """While entered, blocks are compiled, swapped and recomputed as the settings ask."""
    settings, denoiser = config.settings, model.denoiser
    trained, recompute = trained_names(loop), settings.gradient_checkpointing
    network, swap = denoiser.network, settings.block_swap
    with channels_last(network, settings.channels_last), compiled_blocks(network, settings.compile_blocks):
        with swapped_blocks(denoiser, swap, trained, recompute), denoiser.checkpointing(recompute):
            yield


def trained_names(loop: Loop) -> set[str]:
    """Canonical names of the UNet's weights that a run trains."""
    return {name.removeprefix(ldm.UNET_PREFIX) for name in loop.trainable.parameters}


def expect_memory(
    job: TrainingJob, model: TextToImage, config: RunConfig, loop: Loop, callbacks: Callbacks
) -> MemoryEstimate | None:
    """Says what a run will do and take of its device's memory. Raises ValueError for one that cannot fit.

    None where the model cannot be run without values, as networks of other packages may refuse to; a warning tells why.
    """
    callbacks.on_text("computing what the run takes of the memory")
    step, networks = loop.gradient_step, (*model_networks(model), *job.networks)
    swapped = freed_bytes(model.denoiser, config.settings.block_swap, trained_names(loop))
    sample, count = _largest_sample(step), -(-config.batch_size // step.world.size)
    callbacks.after_load()
    send_visitors_away(model.denoiser.network)  # as in every step
    idle = callbacks.idle_networks()
    vae_is_idle = any(network is model.autoencoder.network for network in idle)
    more = sample_decoding(model, config, vae_is_idle) | encoding(model, config, step.batches.largest())
    try:
        text, trains = model.text_encoder, loop.trainable.parameters
        tensors = {name: ref.tensor for name, ref in text.weights.items()} | trains
        others = (type(loop.trainable).__name__, text.fingerprint, sample, count, vae_is_idle)
        key = key_of(config, networks, tensors, *others, versions=callbacks.versions())
        known = KnownPeaks(loop.folder.path.parent / ".cache", key)
        estimate = estimate_memory(step, tensors_of(model, networks, idle), sample, count, more, swapped, known)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning("what the run takes of the memory is not known: the model runs with values only (%s)", reason)
        if loop.config.plan:
            callbacks.on_text(loop.config.plan)
        return None
    free = free_bytes(step.device)
    if free is not None:
        free += callbacks.managed_bytes(step.device)
    text = "; ".join(filter(None, (estimate.text(free), loop.config.plan)))
    log.info("run %s: %s", loop.folder.name, text)
    callbacks.on_memory(text, estimate.needed)
    check_memory(estimate, free, step.device, loop.config.memory_hints)
    callbacks.after_load()
    return estimate


def _largest_sample(step: GradientStep) -> Any:
    """The sample that takes the most memory, loaded; the main process comes first, and writes what it encodes."""
    slot, here = step.batches.largest(), step.world
    if not here.is_main:
        here.barrier()
    (sample,) = step.objective.load([slot])
    if here.is_main:
        here.barrier()
    return sample


def sample_decoding(model: TextToImage, config: RunConfig, idle: bool = False) -> Rehearsal:
    """The decoding of a sample picture, where a run draws some, by a VAE that may have to come to the device first.

    idle: whether the VAE is not counted among the run's weights, wherever it is now.
    """
    if not config.samples.prompts:
        return {}
    cells = (size // model.autoencoder.downscale for size in (config.samples.height, config.samples.width))
    shape, device = (1, model.denoiser.latent_channels, *cells), model.denoiser.device

    def decode() -> Tensor:
        with torch.no_grad(), copied_to(model.autoencoder.network, device, whole=idle):
            return model.autoencoder.pixels(torch.zeros(shape, device=device))

    return {"samples": decode}


def encoding(model: TextToImage, config: RunConfig, slot: Slot | PromptSlot) -> Rehearsal:
    """The encoding of the largest picture, and the text encoder that comes to the device, of a model that is not
    ComfyUI's, which makes room for its encoders itself.

    Args:
        slot: the largest of the run's batches; one of prompts has no picture, and its text encoder comes between steps.
    """
    vae, device = model.autoencoder, model.denoiser.device
    if not isinstance(vae, DiffusersAutoencoder):
        return {}
    away = {
        id(w): w for w in (ref.tensor for ref in model.text_encoder.weights.values()) if w.device.type != device.type
    }
    size = sum(weight.nbytes for weight in away.values())

    def read_text() -> None:
        torch.empty(size, dtype=torch.uint8, device=device)

    def fill() -> None:
        read_text()
        if isinstance(slot, Slot):
            picture = torch.zeros(1, 3, slot.example.height, slot.example.width, device=device)
            with torch.no_grad(), full_precision(), copied_to(vae.network, device):
                vae.encode(picture)

    return {FILLING: fill, "text encoder": read_text} if isinstance(config, RewardTuneConfig) else {FILLING: fill}


def model_networks(model: TextToImage) -> list[nn.Module]:
    """The module trees of a model; a text encoder's backbone, which has none of its own, is left out."""
    projection = model.text_encoder.projection
    return [model.denoiser.network, model.autoencoder.network, *([] if projection is None else [projection])]


def tensors_of(model: TextToImage, networks: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> list[Tensor]:
    """All weights and buffers of module trees and of a model's text encoder, without those of further module trees."""
    left_out = {id(tensor) for tensor in _tensors_in(without)}
    text = [ref.tensor for ref in model.text_encoder.weights.values()]
    return [tensor for tensor in (*_tensors_in(networks), *text) if id(tensor) not in left_out]


def _tensors_in(networks: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def _finish(
    job: TrainingJob, folder: RunFolder, loop: Loop, values: Mapping[str, Tensor], callbacks: Callbacks
) -> None:
    """Writes result, report and status, in this order: a run whose status says finished has both others."""
    with record_failure(folder, callbacks, lambda: loop.step):
        callbacks.on_text(f"writing the result of run {folder.name}")
        job.write(folder, values, {"steps": loop.step, **loop.ending})
        write_report(folder, status={"state": "finished", "step": loop.step, **loop.ending})
        folder.set_status("finished", loop.step, **loop.ending)
    callbacks.on_state("finished", loop.step)
    callbacks.on_end(f"run {folder.name} is finished after {loop.step} steps{describe_guard(loop.ending)}")


def open_run(root: Path, config: RunConfig) -> AbstractContextManager[RunFolder]:
    """The run folder, locked by the main process alone."""
    if world().is_main:
        return RunFolder.open(root, config.run_name, resume=config.resume)
    return nullcontext(RunFolder(root / config.run_name))


def run_identity(kind: str, model: TextToImage, config: RunConfig) -> dict:
    """Everything that must be equal for a run to resume, apart from its data. kind: `TrainingJob.name`."""
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


def prediction(model: TextToImage) -> dict:
    """What the UNet predicts and its noise levels in words, for people who ask why a model learned nothing."""
    denoiser = model.denoiser
    return {
        "prediction_type": denoiser.prediction_type,
        "denoiser": describe(denoiser.prediction_type, denoiser.sigmas),
    }


def environment(model: TextToImage) -> dict:
    """Machine and versions, on which the last bits of a result depend."""
    device = str(model.denoiser.device)
    about = {"python": platform.python_version(), "system": platform.platform(), "processes": world().size}
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device, **about}


def loop_config(
    config: RunConfig, largest: tuple[int, int], steps_per_epoch: float = math.inf, plan: str = ""
) -> LoopConfig:
    """The loop's part of a run's settings.

    Args:
        config: the run's.
        largest: width and height of its largest picture in pixels.
        steps_per_epoch: optimizer steps per pass over the images; infinite where there are no images.
        plan: what the run will do, in one line.
    """
    return LoopConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        settings=replace(config.settings, gradient_accumulation=config.gradient_accumulation),
        samples=config.samples,
        seed=config.seed,
        steps_per_epoch=steps_per_epoch,
        plan=plan,
        memory_hints=memory_hints(config, largest),
    )


def _is_finished(folder: RunFolder, config: RunConfig, artifact: str) -> bool:
    """Whether the folder has the result of exactly these steps, or of a run that ended early as it would now."""
    ended = is_finished(folder.status(), config.steps, config.settings, config.guard_rule)
    return ended and (folder.path / artifact).exists()
