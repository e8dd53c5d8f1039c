"""Reward tuning of a text encoder, a UNet, a LoRA on either, or a projection, so that pictures score higher."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.files import write_tensors
from ..common.foreign import expect_tensors, read_tensors
from ..config.loop import Batches
from ..config.provenance import about_run
from ..config.reward import RewardTuneConfig
from ..data.dataset import split_validation
from ..data.examples import Dataset
from ..data.order import BatchOrder
from ..data.prompt_lengths import warn_of_long_prompts
from ..data.prompts import Prompt, PromptOrder, PromptSlot, expect_prompts, prompts_fingerprint, split_held_out
from ..evaluation.diversity_guard import Guard
from ..evaluation.guard_pictures import build_guard, guard_prompts, measure_pictures
from ..loop.loop import Loop
from ..models import ldm
from ..models.parameters import parameter_refs
from ..models.prediction import split_markers, unet_description
from ..models.protocols import Conditioning, TextToImage
from ..objectives.reward import RewardObjective
from ..objectives.reward_on_images import DirectObjective
from ..rewards.combined import CombinedReward
from ..runs.folder import RunFolder
from ..sampling.generate import TextOf, encode_with
from ..text_encoder.projection import PROJECTION_PREFIX
from ..text_encoder.stock_file import split_by_encoder, write_stock_files
from ..trainables.base import Trainable
from ..trainables.lora import Adapters, select_layers
from ..trainables.weights import SelectedWeights
from .checks import check_fit, with_precision
from .latents import CroppedLatents, fill_cache, latent_cache
from .lora import ARTIFACT as LORA_ARTIFACT
from .lora import describe_model, describe_training, networks_of, trainable_layers, write_lora
from .run import TrainingJob, loop_config, run_training
from .samples import build_sampler

log = logging.getLogger(__name__)

ARTIFACT = "tuned.safetensors"
MAX_HELD_OUT = 16
"""Held-out prompts that a validation draws, at most."""


@dataclass(frozen=True)
class TunedModel:
    """The result of a run. Only one of its parts is not empty.

    Attributes:
        path: its file.
        unet: canonical (LDM) name -> fp32 weight.
        text: `text_encoders.` name -> fp32 weight.
        projection: the projection's whole state.
        lora: ComfyUI's LORA_MODEL.
    """

    path: Path
    unet: dict[str, Tensor]
    text: dict[str, Tensor]
    projection: dict[str, Tensor]
    lora: dict[str, Tensor]


def tune(
    model: TextToImage,
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    config: RewardTuneConfig,
    root: Path,
    callbacks: Callbacks | None = None,
    details: dict | None = None,
    dataset: Dataset | None = None,
) -> TunedModel:
    """`tune_file`, and its result read into RAM."""
    return read_tuned_model(tune_file(model, reward, prompts, config, root, callbacks, details, dataset).parent)


def tune_file(
    model: TextToImage,
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    config: RewardTuneConfig,
    root: Path,
    callbacks: Callbacks | None = None,
    details: dict | None = None,
    dataset: Dataset | None = None,
) -> Path:
    """Tunes part of a model by a reward, resumes such a run, or finds a finished one; returns the file of its result.

    The model is left bit-identical.

    Args:
        model: the base model.
        reward: the weighted rewards to maximise.
        prompts: to draw pictures of; ignored by method "direct".
        config: settings; `config.resume` decides what happens to an earlier run of this name.
        root: folder of all runs.
        callbacks: progress display and cancelling.
        details: JSON for config.json besides the settings, such as the workflow.
        dataset: captioned images for method "direct"; ignored by the others.

    Raises:
        ValueError: before any tuning: no prompts or images, no reward with a weight, a text encoder that does not fit,
            a part to train that the model lacks, or a run of other settings under this name.
    """
    config = with_precision(config, model.denoiser.device, Path(root))
    _check(model, reward, prompts, config, dataset)
    callbacks = callbacks or Callbacks()
    direct = config.method == "direct"
    warn_of_long_prompts(model.text_encoder, [Prompt(c) for c in dataset.captions] if direct else prompts)
    with model.text_encoder.training() if config.text_trains else nullcontext():
        callbacks.after_load()  # a text encoder that was asked for its width may have pushed the UNet out
        trainable = build_trainable(model, config)
        job = TrainingJob(
            name="reward",
            artifact=ARTIFACT,
            trainable=lambda: trainable,
            write=partial(_write, model, config, trainable),
            identity={"rewards": reward.fingerprint}
            | ({"dataset": dataset.fingerprint} if direct else {"prompts": prompts_fingerprint(prompts)}),
            networks=(reward.network,),
            details=_describe(model, config, dataset) | {"rewards": reward.describe()} | (details or {}),
        )
        reward.checkpoint(config.settings.gradient_checkpointing)
        build_data = partial(_data_of_images, dataset) if direct else partial(_data_of_prompts, prompts)
        loop_of = partial(_build_loop, job, model, reward, build_data, config)
        return expect_tensors(run_training(job, model, config, Path(root), callbacks, loop_of) / ARTIFACT)


def _check(
    model: TextToImage,
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    config: RewardTuneConfig,
    dataset: Dataset | None,
) -> None:
    check_fit(model, config)
    check_data(config, prompts, dataset)
    _warn_of_data(config, prompts, dataset)
    if not any(term.weight for term in reward.terms.values()):
        raise ValueError(f"rewards ({reward.name}) all have weight 0; expected one that is maximised. Raise a weight.")
    if reward.compares_images and world().size > 1:
        raise ValueError(
            f"rewards ({reward.name}) compare the pictures of a batch, on {world().size} processes; expected one: "
            "each has a part of the batch. Start without `accelerate launch`."
        )
    projection = model.text_encoder.projection
    if projection is not None and projection.bands:
        raise ValueError("the projection reads the time; expected another one, reward tuning draws with one encoding.")


def check_data(config: RewardTuneConfig, prompts: Sequence[Prompt], dataset: Dataset | None) -> None:
    """Raises ValueError where there is nothing to draw or to noise."""
    if config.method != "direct":
        expect_prompts(prompts, "prompts")
    elif dataset is None or not len(dataset):
        raise ValueError("dataset is empty with method 'direct'; expected captioned images, from Load Dataset.")


def _warn_of_data(config: RewardTuneConfig, prompts: Sequence[Prompt], dataset: Dataset | None) -> None:
    if config.method != "direct" and dataset is not None:
        log.warning("method %r draws prompts; the data set is left aside (it is for 'direct')", config.method)
    if config.method == "direct" and prompts:
        log.warning("method 'direct' trains on the data set's captions; %d prompts are left aside", len(prompts))


def _describe(model: TextToImage, config: RewardTuneConfig, dataset: Dataset | None) -> dict:
    """Facts for a LoRA file's metadata."""
    if config.method == "direct":
        return describe_training(model, dataset)
    return describe_model(model) | {"resolution": [config.width, config.height]}


def build_trainable(model: TextToImage, config: RewardTuneConfig) -> Trainable:
    """The part that `config.train` names, as fp32 masters. Raises ValueError where the model has no such part."""
    denoiser, encoder = model.denoiser, model.text_encoder
    if config.train == "UNet":
        refs = {ldm.UNET_PREFIX + denoiser.canonical_name(n): r for n, r in parameter_refs(denoiser.network).items()}
        return SelectedWeights(refs, [denoiser.network])
    if config.train == "text encoder":
        owners = list({id(ref.owner): ref.owner for ref in encoder.weights.values()}.values())
        return SelectedWeights(encoder.weights, [denoiser.network, *owners])
    if config.train == "projection":
        if encoder.projection is None:
            raise ValueError("the text encoder has no projection; expected a T5 from Load T5, or choose another train.")
        refs = parameter_refs(encoder.projection, PROJECTION_PREFIX)
        return SelectedWeights(refs, [denoiser.network, encoder.projection])
    layers = select_layers(trainable_layers(model, config.lora), config.lora)
    return Adapters(layers, networks_of(model, layers), config.lora, config.seed, denoiser.device)


class TuningData(NamedTuple):
    """The data of a tuning, and the objective that reads it."""

    objective: Callable[..., RewardObjective]
    batches: Batches
    training: Sequence[Prompt]
    held_out: list[Prompt]
    largest: tuple[int, int]
    """Width and height of the largest picture."""
    steps_per_epoch: float = math.inf
    fill: Callable[[], None] = lambda: None
    """Encodes in advance what the objective reads."""


def _data_of_prompts(
    prompts: Sequence[Prompt], model: TextToImage, config: RewardTuneConfig, folder: RunFolder, callbacks: Callbacks
) -> TuningData:
    """Prompts to draw pictures of; every n-th is held out by `validation_fraction`, MAX_HELD_OUT at most."""
    training, held_out = split_held_out(prompts, config.settings.validation_fraction, MAX_HELD_OUT)
    order = PromptOrder(training, config.batch_size, config.seed)
    return TuningData(RewardObjective, order, training, held_out, (config.width, config.height))


def _data_of_images(
    dataset: Dataset, model: TextToImage, config: RewardTuneConfig, folder: RunFolder, callbacks: Callbacks
) -> TuningData:
    """Captioned images, with a cache of their latents; the captions of held-out images are the held-out prompts."""
    training, held_out = split_validation(dataset, config.settings.validation_fraction, config.seed)
    cache = latent_cache(model, folder.path.parent / ".cache")
    latents = CroppedLatents(cache, [training], config.seed)
    order = BatchOrder(training, config.batch_size, config.seed)
    return TuningData(
        partial(DirectObjective, latent_of=latents.latent),
        order,
        _distinct_captions(training),
        _distinct_captions(held_out)[:MAX_HELD_OUT],
        dataset.largest,
        order.steps_per_epoch / config.gradient_accumulation,
        partial(fill_cache, cache, dataset, callbacks),
    )


def _distinct_captions(dataset: Dataset) -> list[Prompt]:
    return [Prompt(caption) for caption in dict.fromkeys(dataset.captions)] if dataset else []


def _build_loop(
    job: TrainingJob,
    model: TextToImage,
    reward: CombinedReward,
    build_data: Callable[..., TuningData],
    config: RewardTuneConfig,
    folder: RunFolder,
    callbacks: Callbacks,
) -> tuple[Loop, Callable[[], None]]:
    data, trainable = build_data(model, config, folder, callbacks), job.trainable()
    prompts = guard_prompts(data.training, data.held_out, config)
    text_of, encode = encode_with(model.text_encoder), lambda: None
    if not config.text_trains:
        text_of, encode = _encoded_in_advance(text_of, [*config.samples.prompts, *prompts], callbacks)
    callbacks.after_load()
    loop = Loop(
        folder,
        trainable,
        data.objective(model, reward, config, trainable, text_trains=config.text_trains, pulse=callbacks.pulse),
        data.batches,
        loop_config(config, data.largest, data.steps_per_epoch),
        sampler=build_sampler(model, config, text_of, callbacks),
        validation=[PromptSlot(prompt.text, 0, i) for i, prompt in enumerate(data.held_out)],
        guard=_build_guard(model, reward, config, prompts, text_of, callbacks),
        callbacks=callbacks,
        device=model.denoiser.device,
    )

    def fill() -> None:
        data.fill()
        encode()

    return loop, fill


def _build_guard(
    model: TextToImage,
    reward: CombinedReward,
    config: RewardTuneConfig,
    prompts: Sequence[str],
    text_of: TextOf,
    callbacks: Callbacks,
) -> Guard | None:
    def report(done: int, total: int) -> None:
        callbacks.on_text(f"drawing the guard's pictures ({done}/{total})")

    return build_guard(config, reward, partial(measure_pictures, model, reward, config, prompts, text_of, report))


def _encoded_in_advance(
    text_of: TextOf, prompts: Sequence[str], callbacks: Callbacks
) -> tuple[TextOf, Callable[[], None]]:
    """`text_of` for these prompts and the empty one, of a text encoder that does not train, and what encodes them.

    Encoding may move models between devices, which must not happen while weights are attached.
    """
    encoded: dict[str, Conditioning] = {}

    @torch.no_grad()
    def encode() -> None:
        for number, text in enumerate(dict.fromkeys(("", *prompts)) if prompts else ()):
            callbacks.on_text(f"reading the sample prompts ({number}/{len(prompts)})")
            encoded[text] = text_of(text)

    return encoded.__getitem__, encode


def _write(
    model: TextToImage,
    config: RewardTuneConfig,
    trainable: Trainable,
    folder: RunFolder,
    values: Mapping[str, Tensor],
    ending: Mapping[str, Any],
) -> None:
    """Writes the tuned weights; adapters, and a text encoder for stock loaders, into files of their own."""
    names = ("train", "method", "gradient_steps", "sampling_steps")
    about = {"run": config.run_name, **{name: getattr(config, name) for name in names}, **ending}
    if isinstance(trainable, Adapters):
        write_lora(folder, trainable.lora_model(values), config.lora, ending)
        values = {}
    if config.train == "text encoder":  # `values` have every weight, so these are whole files
        paths = {part: folder.path / f"{part}.safetensors" for part in split_by_encoder(values)}
        write_stock_files(paths, values, about_run(folder.config() or {}, ending))
    if config.train == "projection":
        state = model.text_encoder.projection.state_dict()
        values = {PROJECTION_PREFIX + name: value for name, value in state.items()} | dict(values)
    metadata = {}
    if config.train == "UNet":  # a whole one, which others load
        denoiser = model.denoiser
        markers, metadata = unet_description(denoiser.prediction_type, denoiser.sigmas, ldm.UNET_PREFIX)
        values = markers | dict(values)
    write_tensors(folder.path / ARTIFACT, dict(values), {"retune.run": json.dumps(about)} | folder.base() | metadata)


def read_tuned_model(folder: Path) -> TunedModel:
    """The result of a run from its folder."""
    file, lora = Path(folder) / ARTIFACT, Path(folder) / LORA_ARTIFACT
    tensors, _ = split_markers(read_tensors(file)[0], ldm.UNET_PREFIX)

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    text = {name: value for name, value in tensors.items() if name.startswith("text_encoders.")}
    adapters = read_tensors(lora)[0] if lora.exists() else {}
    return TunedModel(file, below(ldm.UNET_PREFIX), text, below(PROJECTION_PREFIX), adapters)
