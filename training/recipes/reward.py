"""Tuning a text encoder, a UNet, a LoRA on either, or a projection so that pictures score higher."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.files import read_tensors, write_tensors
from ..config.loop import Batches, LoopConfig
from ..config.provenance import about_run
from ..config.reward import RewardTuneConfig
from ..data.dataset import split_validation
from ..data.examples import Dataset
from ..data.order import BatchOrder
from ..data.prompt_lengths import warn_of_long_prompts
from ..data.prompts import Prompt, PromptOrder, PromptSlot, expect_prompts, prompts_fingerprint, split_held_out
from ..evaluation.guard_pictures import build_guard, guard_prompts, measure_pictures
from ..loop.loop import Loop
from ..loop.memory import memory_hints
from ..models import ldm
from ..models.parameters import parameter_refs
from ..models.protocols import TextToImage
from ..objectives.reward import RewardObjective
from ..objectives.reward_on_images import DirectObjective
from ..rewards.combined import CombinedReward
from ..runs.folder import RunFolder
from ..sampling.generate import TextOf, encode_with
from ..text_encoder.projection import PROJECTION_PREFIX
from ..text_encoder.stock_file import split_by_encoder, write_stock_files
from ..trainables.lora import Adapters, select_layers
from ..trainables.weights import SelectedWeights, Trainable
from .checks import check_fit
from .denoising import build_sampler, cropped_latent, latent_cache
from .lora import ARTIFACT as LORA_ARTIFACT
from .lora import describe_model, describe_training, networks_of, trainable_layers, write_lora
from .run import TrainingJob, run_identity, run_training

log = logging.getLogger(__name__)

ARTIFACT = "tuned.safetensors"
HELD_OUT = 16
"""Most held-out prompts that a validation draws."""


@dataclass(frozen=True)
class TunedModel:
    """What a run made. unet and projection: as in `TrainedModel`; text: `text_encoders.` names -> fp32; lora: ComfyUI's
    LORA_MODEL. All but one are empty."""

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
    """Tunes, or goes on, or returns a finished run of this name and config from disk; see `config.resume`.

    root: the folder that holds all runs. details: anything JSON that should stand in config.json beside the settings.
    dataset: captioned images for method "direct", which reads no prompts. The model is left bit-identical. Raises
    ValueError before any tuning for no prompts or images, a text encoder that does not fit, nothing to train, or a run
    of other settings under this name.
    """
    check_fit(model, config)
    callbacks = callbacks or Callbacks()
    _check_data(config, prompts, dataset)
    if not any(term.weight for term in reward.terms.values()):
        raise ValueError(f"rewards ({reward.name}) all have weight 0; expected one that is maximised. Raise a weight.")
    direct = config.method == "direct"
    warn_of_long_prompts(model.text_encoder, [Prompt(c) for c in dataset.captions] if direct else prompts)
    projection = model.text_encoder.projection
    if projection is not None and projection.bands:
        raise ValueError("the projection reads the time; expected another one, reward tuning draws with one encoding.")
    drawn = {"resolution": [config.width, config.height]}
    with model.text_encoder.training() if config.text_trains else nullcontext():
        trainable = build_trainable(model, config)
        job = TrainingJob(
            name="reward",
            artifact=ARTIFACT,
            trainable=lambda: trainable,
            write=partial(_write, model, config, trainable),
            identity={"rewards": reward.fingerprint}
            | ({"dataset": dataset.fingerprint} if direct else {"prompts": prompts_fingerprint(prompts)}),
            details=(describe_training(model, dataset) if direct else describe_model(model) | drawn)
            | {"rewards": reward.describe()}
            | (details or {}),
        )
        reward.checkpoint(config.settings.gradient_checkpointing)
        data = partial(_on_images, dataset) if direct else partial(_on_prompts, prompts)
        loop_of = partial(_loop, model, reward, data, config, trainable)
        identity = run_identity(job.name, model, config)
        path = run_training(job, model, config, Path(root), callbacks, identity, loop_of)
    return read_tuned_model(path)


def _check_data(config: RewardTuneConfig, prompts: Sequence[Prompt], dataset: Dataset | None) -> None:
    if config.settings.precision == "fp16":
        raise ValueError(
            "precision is 'fp16' for a reward tuning; expected 'bf16' or 'fp32': gradients through decoder, reward and "
            "sampler are too small for fp16."
        )
    if config.method != "direct":
        expect_prompts(prompts, "prompts")
        if dataset is not None:
            log.warning("method %r draws prompts; the data set is left aside (it is for 'direct')", config.method)
    elif dataset is None or not len(dataset):
        raise ValueError("dataset is empty with method 'direct'; expected captioned images, from Load Dataset.")
    elif prompts:
        log.warning("method 'direct' trains on the data set's captions; %d prompts are left aside", len(prompts))


def build_trainable(model: TextToImage, config: RewardTuneConfig) -> Trainable:
    """What `config.train` names, as fp32 masters. Raises ValueError where the model has no such part."""
    denoiser, encoder = model.denoiser, model.text_encoder
    if config.train == "UNet":
        found = {ldm.UNET_PREFIX + denoiser.canonical_name(n): t for n, t in parameter_refs(denoiser.network).items()}
        return SelectedWeights(found, [denoiser.network])
    if config.train == "text encoder":
        owners = list({id(target.owner): target.owner for target in encoder.weights.values()}.values())
        return SelectedWeights(encoder.weights, [denoiser.network, *owners])
    if config.train == "projection":
        if encoder.projection is None:
            raise ValueError("the text encoder has no projection; expected a T5 from Load T5, or choose another train.")
        return SelectedWeights(
            parameter_refs(encoder.projection, PROJECTION_PREFIX), [denoiser.network, encoder.projection]
        )
    layers = select_layers(trainable_layers(model, config.lora), config.lora)
    return Adapters(layers, networks_of(model, layers), config.lora, config.seed)


class Data(NamedTuple):
    """What a tuning reads: how its objective begins, its batches, its prompts and those held out, the width and height
    of its largest picture, steps an epoch."""

    objective: Callable[..., RewardObjective]
    batches: Batches
    training: Sequence[Prompt]
    held_out: list[Prompt]
    size: tuple[int, int]
    steps_per_epoch: float = math.inf


def _on_prompts(
    prompts: Sequence[Prompt], model: TextToImage, config: RewardTuneConfig, folder: RunFolder, callbacks: Callbacks
) -> Data:
    training, held_out = split_prompts(prompts, config)
    order = PromptOrder(training, config.batch_size, config.seed)
    return Data(RewardObjective, order, training, held_out, (config.width, config.height))


def _on_images(
    dataset: Dataset, model: TextToImage, config: RewardTuneConfig, folder: RunFolder, callbacks: Callbacks
) -> Data:
    """Fills the latents' cache; prompts to validate on are the captions of held-out images."""
    training, held_out = split_validation(dataset, config.settings.validation_fraction, config.seed)
    latents = latent_cache(model, folder.path.parent / ".cache")
    if world().is_main:
        latents.fill(dataset, lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"))
    world().barrier()
    order = BatchOrder(training, config.batch_size, config.seed)
    crops = {example.key: training.crop for example in training.examples}
    objective = partial(
        DirectObjective, latent_of=lambda slot: cropped_latent(latents.get, slot, crops[slot.example.key], config.seed)
    )
    said, kept = ([Prompt(c) for c in dict.fromkeys(one.captions)] if one else [] for one in (training, held_out))
    size, steps = dataset.largest, order.steps_per_epoch / config.gradient_accumulation
    return Data(objective, order, said, kept[:HELD_OUT], size, steps)


def _loop(
    model: TextToImage,
    reward: CombinedReward,
    data_of: Callable[..., Data],
    config: RewardTuneConfig,
    trainable: Trainable,
    folder: RunFolder,
    callbacks: Callbacks,
) -> Loop:
    data = data_of(model, config, folder, callbacks)
    guarded, drawn = guard_prompts(data.training, data.held_out, config), config.samples.prompts
    text_of = encode_with(model.text_encoder)
    if not config.text_trains:
        text_of = _known_before(text_of, [*drawn, *guarded], callbacks)
    look = partial(measure_pictures, model, reward, config, guarded, text_of, partial(_say_drawn, callbacks))
    callbacks.after_load()
    return Loop(
        folder,
        trainable,
        data.objective(model, reward, config, trainable, text_trains=config.text_trains, pulse=callbacks.pulse),
        data.batches,
        LoopConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            settings=replace(config.settings, gradient_accumulation=config.gradient_accumulation),
            samples=config.samples,
            steps_per_epoch=data.steps_per_epoch,
            memory_hints=memory_hints(config, data.size),
        ),
        sampler=build_sampler(model, config, text_of, callbacks) if config.samples.prompts else None,
        validation=[PromptSlot(prompt.text, 0, i) for i, prompt in enumerate(data.held_out)],
        guard=build_guard(config, reward, look),
        callbacks=callbacks,
        device=model.denoiser.device,
    )


def _say_drawn(callbacks: Callbacks, done: int, total: int) -> None:
    callbacks.on_text(f"drawing the guard's pictures ({done}/{total})")


def _known_before(text_of: TextOf, prompts: Sequence[str], callbacks: Callbacks) -> TextOf:
    """Of a text encoder that does not train: encoding may move models about, which nothing may while others train."""
    known = {}
    with torch.no_grad():
        for number, text in enumerate(dict.fromkeys(("", *prompts)) if prompts else ()):
            callbacks.on_text(f"reading the sample prompts ({number}/{len(prompts)})")
            known[text] = text_of(text)
    return known.__getitem__


def split_prompts(prompts: Sequence[Prompt], config: RewardTuneConfig) -> tuple[Sequence[Prompt], list[Prompt]]:
    """Prompts to train on, and every n-th held out by `validation_fraction`, at most HELD_OUT of them."""
    return split_held_out(prompts, config.settings.validation_fraction, HELD_OUT)


def _write(
    model: TextToImage,
    config: RewardTuneConfig,
    trainable: Trainable,
    folder: RunFolder,
    values: Mapping[str, Tensor],
    ending: Mapping,
) -> None:
    about = {
        "run": config.run_name,
        "train": config.train,
        "method": config.method,
        "gradient_steps": config.gradient_steps,
        "sampling_steps": config.sampling_steps,
        **ending,
    }
    if isinstance(trainable, Adapters):
        lora = trainable.lora_model(values)
        write_lora(folder, lora, config.lora, ending)
        values = {}
    if config.train == "text encoder":  # whole files that stock loaders read; `values` hold every weight
        paths = {part: folder.path / f"{part}.safetensors" for part in split_by_encoder(values)}
        write_stock_files(paths, values, about_run(folder.config() or {}, ending))
    projection = model.text_encoder.projection
    if config.train == "projection":
        whole = {PROJECTION_PREFIX + name: value for name, value in projection.state_dict().items()}
        values = whole | dict(values)
    write_tensors(folder.path / ARTIFACT, dict(values), {"retune.run": json.dumps(about)})


def read_tuned_model(path: Path) -> TunedModel:
    """The result of a run from its folder."""
    file, lora = Path(path) / ARTIFACT, Path(path) / LORA_ARTIFACT
    tensors, _ = read_tensors(file)

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    text = {name: value for name, value in tensors.items() if name.startswith("text_encoders.")}
    adapters = read_tensors(lora)[0] if lora.exists() else {}
    return TunedModel(file, under(ldm.UNET_PREFIX), text, under(PROJECTION_PREFIX), adapters)
