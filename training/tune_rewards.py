"""Tuning a text encoder, a UNet, a LoRA on either, or a projection so that pictures score higher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapters, select_layers
from .callbacks import Callbacks
from .data.prompts import Prompt, PromptOrder, PromptSlot, expect_prompts, fingerprint_of
from .files import read_tensors, write_tensors
from .formats import ldm
from .generate import TextOf
from .loop import Loop, LoopConfig
from .model import TextToImage
from .reward_config import RewardTuneConfig
from .reward_objective import RewardObjective
from .rewards.combined import CombinedReward
from .run_folder import RunFolder
from .text_encoder.stock_file import about_run, stock_parts, write_stock_files
from .train_lora import ARTIFACT as LORA_ARTIFACT
from .train_lora import described_model, networks_of, trainable_layers, write_lora
from .train_model import PROJECTION_PREFIX, Kind, check_fit, run_identity, run_in_folder, sampler_of
from .trainable import SelectedWeights, Trainable, targets

ARTIFACT = "tuned.safetensors"
HELD_OUT = 16
"""Most held-out prompts that a validation draws."""


@dataclass(frozen=True)
class Tuned:
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
) -> Tuned:
    """Tunes, or goes on, or returns a finished run of this name and config from disk; see `config.resume`.

    root: the folder that holds all runs. details: anything JSON that should stand in config.json beside the settings.
    The model is left bit-identical. Raises ValueError before any tuning for no prompts, a text encoder that does not
    fit, nothing to train, or a run of other settings under this name.
    """
    check_fit(model, config)
    expect_prompts(prompts, "prompts")
    projection = model.text_encoder.projection
    if projection is not None and projection.bands:
        raise ValueError("the projection reads the time; expected another one, reward tuning draws with one encoding.")
    text_trains = config.train in ("text encoder", "text encoder LoRA", "projection")
    with model.text_encoder.training() if text_trains else nullcontext():
        trainable = trainable_of(model, config)
        kind = Kind(
            name="reward",
            artifact=ARTIFACT,
            trainable=lambda: trainable,
            write=partial(_write, model, config, trainable),
            identity={"rewards": reward.fingerprint, "prompts": fingerprint_of(prompts)},
            details=described_model(model)
            | {"rewards": reward.described(), "resolution": [config.width, config.height]}
            | (details or {}),
        )
        reward.checkpoint(config.settings.gradient_checkpointing)
        objective = RewardObjective(
            model,
            reward,
            config,
            lambda: list(trainable.parameters.values()),
            text_trains=text_trains,
        )
        loop_of = partial(_loop, model, objective, prompts, config, trainable, text_trains)
        identity = run_identity(kind.name, model, config)
        path = run_in_folder(kind, model, config, Path(root), callbacks or Callbacks(), identity, loop_of)
    return read_tuned(path)


def trainable_of(model: TextToImage, config: RewardTuneConfig) -> Trainable:
    """What `config.train` names, as fp32 masters. Raises ValueError where the model has no such part."""
    denoiser, encoder = model.denoiser, model.text_encoder
    if config.train == "UNet":
        found = {ldm.UNET_PREFIX + denoiser.canonical_name(n): t for n, t in targets(denoiser.network).items()}
        return SelectedWeights(found, [denoiser.network])
    if config.train == "text encoder":
        owners = list({id(target.owner): target.owner for target in encoder.weights.values()}.values())
        return SelectedWeights(encoder.weights, [denoiser.network, *owners])
    if config.train == "projection":
        if encoder.projection is None:
            raise ValueError("the text encoder has no projection; expected a T5 from Load T5, or choose another train.")
        return SelectedWeights(targets(encoder.projection, PROJECTION_PREFIX), [denoiser.network, encoder.projection])
    layers = select_layers(trainable_layers(model, config.lora), config.lora)
    return Adapters(layers, networks_of(model, layers), config.lora, config.seed)


def _loop(
    model: TextToImage,
    objective: RewardObjective,
    prompts: Sequence[Prompt],
    config: RewardTuneConfig,
    trainable: Trainable,
    text_trains: bool,
    folder: RunFolder,
    callbacks: Callbacks,
) -> Loop:
    training, held_out = split_prompts(prompts, config)
    text_of = _heard_now(model) if text_trains else _heard_before(model, config.samples.prompts)
    callbacks.after_load()
    return Loop(
        folder,
        trainable,
        objective,
        PromptOrder(training, config.batch_size, config.seed),
        LoopConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            settings=config.settings,
            samples=config.samples,
        ),
        sampler=sampler_of(model, config, text_of, callbacks) if config.samples.prompts else None,
        validation=[PromptSlot(prompt.text, 0, i) for i, prompt in enumerate(held_out)],
        callbacks=callbacks,
        device=model.denoiser.device,
    )


def _heard_now(model: TextToImage) -> TextOf:
    encoder = model.text_encoder
    return lambda text: encoder.backbone(encoder.tokenize([text]))


def _heard_before(model: TextToImage, prompts: Sequence[str]) -> TextOf:
    """Of a text encoder that does not train: encoding may move models about, which nothing may while others train."""
    now = _heard_now(model)
    with torch.no_grad():
        known = {text: now(text) for text in ("", *prompts)} if prompts else {}
    return known.__getitem__


def split_prompts(prompts: Sequence[Prompt], config: RewardTuneConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and every n-th held out by `validation_fraction`, at most HELD_OUT of them."""
    fraction = config.settings.validation_fraction
    if not fraction or len(prompts) < 2:
        return list(prompts), []
    stride = max(2, round(1 / fraction))
    held_out = set(list(range(stride - 1, len(prompts), stride))[:HELD_OUT]) or {len(prompts) - 1}
    return [p for i, p in enumerate(prompts) if i not in held_out], [prompts[i] for i in sorted(held_out)]


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
        paths = {part: folder.path / f"{part}.safetensors" for part in stock_parts(values)}
        write_stock_files(paths, values, about_run(folder.config() or {}, ending))
    projection = model.text_encoder.projection
    if config.train == "projection":
        whole = {PROJECTION_PREFIX + name: value for name, value in projection.state_dict().items()}
        values = whole | dict(values)
    write_tensors(folder.path / ARTIFACT, dict(values), {"retune.run": json.dumps(about)})


def read_tuned(path: Path) -> Tuned:
    """The result of a run from its folder."""
    file, lora = Path(path) / ARTIFACT, Path(path) / LORA_ARTIFACT
    tensors, _ = read_tensors(file)

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    text = {name: value for name, value in tensors.items() if name.startswith("text_encoders.")}
    adapters = read_tensors(lora)[0] if lora.exists() else {}
    return Tuned(file, under(ldm.UNET_PREFIX), text, under(PROJECTION_PREFIX), adapters)
