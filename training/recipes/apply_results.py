"""Results of earlier runs put into a model that this process loaded for itself: tuning in stages, or apart and merged.

What a file holds decides: weights of the UNet or the text encoder and a projection take the place of the model's (or
are blended with them), a LoRA is added to the weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import read_json
from ..common.text import first_few
from ..formats.lora import Lora, LoraModule, dora_axis, parse_lora, read_lora_tensors
from ..formats.lora_difference import delta_weight
from ..formats.lora_keys import BIAS, split_key
from ..formats.lora_names import TEXT, UNET, detect_naming
from ..models import ldm
from ..models.protocols import TextToImage
from ..text_encoder.blend import blend_projections, weighted_sum
from ..text_encoder.projection import PROJECTION_PREFIX, Projection
from ..text_encoder.t5_file import file_hash
from ..trainables.lora_init import plain_layer

log = logging.getLogger(__name__)

ARTIFACTS = ("tuned.safetensors", "model.safetensors", "lora.safetensors")
"""Results in the folder of a run of `reward`, `train` and `lora`."""


@dataclass(frozen=True)
class TunedFile:
    """An earlier result. strength: 0 is the model as it was, 1 the result; between them the weights are interpolated
    (arXiv 2403.18978, section 3.4) or the LoRA is added with it."""

    path: Path
    strength: float = 1.0


def tuned_file(text: str) -> TunedFile:
    """From "PATH" or "PATH:STRENGTH"; ValueError for a strength that is no finite number."""
    path, colon, number = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            strength = float(number)
        except ValueError:  # a Windows drive, or a name with a colon in it
            return TunedFile(Path(text))
        if not math.isfinite(strength):
            raise ValueError(f"strength of {path} is {number}; expected a number, 0 (as it was) to 1 (as tuned).")
        return TunedFile(Path(path), strength)
    return TunedFile(Path(text))


def result_files(path: Path) -> list[Path]:
    """The files of a result: a file itself, or what its run left in a folder.

    Errors: ValueError for a folder without result, FileNotFoundError where there is nothing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"tuned is {path}, which does not exist; expected a run's folder or its result's file.")
    found = [path / name for name in ARTIFACTS if (path / name).is_file()]
    if not found:
        status = path / "status.json"
        state = f"; its run is {read_json(status).get('state')}" if status.is_file() else ""
        raise ValueError(
            f"{path} holds no result ({', '.join(ARTIFACTS)}){state}; expected the folder of a finished run of "
            "`reward`, `train` or `lora`."
        )
    return found


def tuned_identity(texts: Sequence[str]) -> list[list]:
    """[SHA-256 of a file, strength] of each file, in their order: equal exactly where the same goes into a model."""
    found = map(tuned_file, texts)
    return [[file_hash(file), one.strength] for one in found for file in result_files(one.path)]


def with_tuned(model: TextToImage, texts: Sequence[str]) -> TextToImage:
    """The model with each result in it, in order. Its weights are changed in place, and its fingerprints with them.

    texts: as `tuned_file` reads them. Errors: those of `result_files`; ValueError for a file that holds nothing, or
    what the model has no place for, before anything of that file is put in.
    """
    for one in map(tuned_file, texts):
        parts = {file: read_lora_tensors(file) for file in result_files(one.path)}
        if not any(tensors for tensors, _ in parts.values()):
            raise ValueError(f"{one.path} holds no tensors; expected weights, a projection or a LoRA.")
        for file, (tensors, metadata) in parts.items():
            name = file.name if file == one.path else f"{one.path.name}/{file.name}"
            model = _with_file(model, name, tensors, metadata, one.strength)
    return model


@torch.no_grad()
def _with_file(
    model: TextToImage, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], strength: float
) -> TextToImage:
    weights, encoder = model_weights(model), model.text_encoder
    if any(split_key(key)[1] for key in tensors):
        config = model.denoiser.network.config
        values = merged(parse_lora(name, tensors, metadata), weights, strength, config)
    else:
        state = {k.removeprefix(PROJECTION_PREFIX): v for k, v in tensors.items() if k.startswith(PROJECTION_PREFIX)}
        own = {_layer_name(k): v for k, v in tensors.items() if not k.startswith(PROJECTION_PREFIX)}
        values = interpolated(name, own, weights, strength)
        if state:
            projection = _projection(name, encoder.projection, state, metadata, strength)
            encoder = encoder.with_projection(projection)
    for key, value in values.items():
        weights[key].copy_(value)
    changed = any(key.startswith(TEXT) for key in values)
    return replace(model, text_encoder=encoder.refreshed() if changed else encoder)


def model_weights(model: TextToImage) -> dict[str, Tensor]:
    """Every weight of the UNet and of the text encoder by its layer's name in ComfyUI's LoRA files, and `.weight` or
    `.bias`: `diffusion_model.input_blocks...`, `text_encoders.clip_l.transformer...`."""
    denoiser = model.denoiser
    unet = {UNET + denoiser.canonical_name(name): value for name, value in denoiser.network.named_parameters()}
    return unet | {name: target.tensor for name, target in model.text_encoder.weights.items()}


def _layer_name(key: str) -> str:
    return UNET + key.removeprefix(ldm.UNET_PREFIX) if key.startswith(ldm.UNET_PREFIX) else key


def interpolated(
    name: str, tuned: Mapping[str, Tensor], weights: Mapping[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """(1 - strength) W + strength W_tuned by name, fp32; exactly W_tuned at strength 1. name: the file's, for errors.

    Raises ValueError for names that are not among `weights`, and for other shapes.
    """
    if strange := [key for key in tuned if key not in weights]:
        raise ValueError(
            f"{name} has {first_few(strange)}, which the model lacks; expected a result of `reward` or `train` on a "
            "model of this kind, or a LoRA. Give the flags with which its run opened the model, such as --t5."
        )
    for key, value in tuned.items():
        if value.shape != weights[key].shape:
            found, wanted = tuple(value.shape), tuple(weights[key].shape)
            raise ValueError(f"{key} in {name} is {found}; expected {wanted}. It belongs to another kind of model.")
    return {key: weighted_sum((1 - strength, strength), (weights[key], value)) for key, value in tuned.items()}


def _projection(
    name: str, own: Projection | None, state: Mapping[str, Tensor], metadata: Mapping[str, str], strength: float
) -> Projection:
    """The projection of a file, or the blend of the model's own and it."""
    if own is None:
        raise ValueError(
            f"{name} holds a projection and the text encoder has none; expected the T5 that its run had. Use --t5."
        )
    about = json.loads(metadata.get("retune.run", "{}")).get("projection")
    try:
        tuned = Projection.from_state(about or own.config(), state)
    except ValueError as error:
        raise ValueError(f"{name}: {error} Give --projection and --max-tokens as its run had them.") from error
    if (tuned.in_width, tuned.width) != (own.in_width, own.width):
        found, wanted = (f"{one.in_width} -> {one.width}" for one in (tuned, own))
        raise ValueError(f"the projection in {name} maps {found}; expected {wanted}. Use the T5 that its run had.")
    if strength == 1:
        return tuned
    if tuned.config() != own.config():
        raise ValueError(
            f"the projection in {name} is {tuned.config()} and the text encoder's {own.config()}; expected one kind to "
            "go a part of the way. Use strength 1, or --projection as its run had it."
        )
    return blend_projections((1 - strength, strength), (own, tuned))


def merged(
    lora: Lora, weights: Mapping[str, Tensor], strength: float, unet_config: Mapping | None = None
) -> dict[str, Tensor]:
    """W + strength dW by name of every weight and bias that the LoRA changes, fp32; DoRA as `_with_magnitude`.

    Layers that are not among `weights` are left out with a warning. unet_config: UNet2DConditionModel's, for the names
    of layers. Raises ValueError when none is, for other shapes, and for kinds that do not merge (OFT, GLoRA).
    """
    naming = detect_naming(lora, unet_config=unet_config)
    known = {plain_layer(name): name for name in weights}
    values, idle = {}, []
    for module in lora.modules.values():
        layer = plain_layer(naming.comfyui_name(module.name) or module.name)
        parts = {known[key]: part for part in ("weight", "bias") if (key := f"{layer}.{part}") in known}
        try:
            found = {name: _changed(module, weights[name], part, strength) for name, part in parts.items()}
        except ValueError as error:
            raise ValueError(f"{lora.name}: {error}") from error
        found = {name: value for name, value in found.items() if value is not None}
        values |= found
        if not found:
            idle.append(module.name)
    if not values:
        raise ValueError(
            f"{lora.name} has no layer that the model has, only {first_few(idle)}; expected a LoRA for it."
        )
    if idle:
        log.warning("%s: %d layers are not in the model and are left out: %s", lora.name, len(idle), first_few(idle))
    return values


def _changed(module: LoraModule, weight: Tensor, part: str, strength: float) -> Tensor | None:
    """A layer's weight or bias with its module's change; None where that has none."""
    wanted = BIAS if part == "bias" else ("w_norm",)
    vector = next((module.tensors[role] for role in wanted if role in module.tensors), None)
    if vector is not None:
        return weight.float() + strength * vector.float().reshape(weight.shape)
    if part == "bias" or not (module.tensors.keys() - set(BIAS)):
        return None
    bare = {role: value for role, value in module.tensors.items() if role != "dora_scale"}
    change = delta_weight(LoraModule(module.name, bare, module.keys))
    if change.numel() != weight.numel():
        raise ValueError(f"layer {module.name} changes {tuple(change.shape)}; expected {tuple(weight.shape)}")
    changed = weight.float() + change.reshape(weight.shape)
    if "dora_scale" in module.tensors:
        changed = _with_magnitude(changed, module.tensors["dora_scale"].float())
    return weight.float() + strength * (changed - weight.float())


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """m W / |W|, the norm over everything but the axis that has magnitudes (DoRA, arXiv 2402.09353, eq. 5)."""
    axis = dora_axis(magnitude, tuple(weight.shape))
    others = [one for one in range(weight.ndim) if one != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * magnitude.reshape(norm.shape) / norm
