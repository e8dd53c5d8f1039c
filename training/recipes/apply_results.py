"""Applies results of earlier runs to a loaded model: to tune it in stages, or to merge what was tuned separately.

Weights of the UNet or the text encoder and a projection replace the model's, or are blended with them; a LoRA is added
to the weights. The tensors in a file decide which of it happens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common.foreign import existing_file, metadata_json, read_json, reading
from ..common.text import first_few
from ..demo.editions import BASE, CONV_IN, edition_of_unet, made_for_another
from ..formats.lora import Lora, LoraModule, dora_axis, parse_lora, read_lora_tensors
from ..formats.lora_difference import LINEAR_KINDS, delta_weight
from ..formats.lora_keys import BIAS, split_key
from ..formats.lora_names import TEXT, UNET, detect_naming
from ..formats.lora_report import missing_alpha
from ..models import ldm
from ..models.parameters import ParameterRef, parameter_refs
from ..models.prediction import split_markers
from ..models.protocols import Denoiser, TextToImage
from ..models.recast import replace_weight
from ..models.stored import exact
from ..text_encoder.blend import blend_projections, weighted_sum
from ..text_encoder.projection import PROJECTION_PREFIX, Projection
from ..text_encoder.t5_file import file_hash
from ..trainables.lora_init import modules_by_layer, plain_layer

log = logging.getLogger(__name__)

ARTIFACTS = ("tuned.safetensors", "model.safetensors", "lora.safetensors")
"""Results in the folder of a run of `reward`, `train` and `lora`."""
Keep = Callable[[str, Tensor], Tensor]
"""(name, new weight in fp32) -> what is kept of it, such as its rounded values."""


@dataclass(frozen=True)
class TunedFile:
    """The result of an earlier run.

    Attributes:
        path: its file or its run's folder.
        strength: 0 is the model without it, 1 the result; between them the weights are interpolated (arXiv 2403.18978,
            section 3.4), or the LoRA is scaled.
    """

    path: Path
    strength: float = 1.0


def tuned_file(text: str) -> TunedFile:
    """Parses "PATH" or "PATH:STRENGTH". Raises ValueError for a strength that is not finite."""
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
    """The files of a result: the path itself, or the artifacts in a run's folder.

    Raises ValueError for a folder without a result, FileNotFoundError for a path that does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"tuned is {path}, which does not exist; expected a run's folder or its result's file.")
    if not path.is_dir():
        return [existing_file(path)]
    files = [path / name for name in ARTIFACTS if (path / name).is_file()]
    if not files:
        status = path / "status.json"
        state = f"; its run is {read_json(status, dict).get('state')}" if status.is_file() else ""
        raise ValueError(
            f"{path} holds no result ({', '.join(ARTIFACTS)}){state}; expected the folder of a finished run of "
            "`reward`, `train` or `lora`."
        )
    return files


def tuned_identity(texts: Sequence[str]) -> list[list]:
    """[SHA-256 of a file, strength] of each file, in order: equal exactly where they change a model equally."""
    results = map(tuned_file, texts)
    return [[file_hash(file), result.strength] for result in results for file in result_files(result.path)]


def kept_whole(name: str, value: Tensor) -> Tensor:
    """The weight in fp32."""
    return value


def with_tuned(model: TextToImage, texts: Sequence[str], keep: Keep = kept_whole) -> TextToImage:
    """Applies results to a model, in order. Its weights are changed in place, and its fingerprints with them.

    Args:
        model: weights that change are fp32 afterwards, whatever they were.
        texts: for `tuned_file`.
        keep: what is kept of a weight of the UNet that the last of them changes; earlier ones are read again.

    Raises:
        ValueError, FileNotFoundError: as `result_files`, and for a file without tensors or with tensors that do not fit
            the model; nothing of that file is applied then.
    """
    last = result_files(tuned_file(texts[-1]).path)[-1] if texts else None
    for number, result in enumerate(map(tuned_file, texts), 1):
        files = {file: read_lora_tensors(file) for file in result_files(result.path)}
        if not any(tensors for tensors, _ in files.values()):
            raise ValueError(f"{result.path} holds no tensors; expected weights, a projection or a LoRA.")
        for file, (tensors, metadata) in files.items():
            name = file.name if file == result.path else f"{result.path.name}/{file.name}"
            with reading(file):
                kept = keep if number == len(texts) and file == last else kept_whole
                model = _with_file(model, name, tensors, metadata, result.strength, kept)
    return model


@torch.no_grad()
def _with_file(
    model: TextToImage,
    name: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    strength: float,
    keep: Keep,
) -> TextToImage:
    refs, encoder = _weight_refs(model), model.text_encoder
    weights = {key: ref.tensor for key, ref in refs.items()}
    warn_of_another_demo(name, metadata, model.denoiser)
    if any(split_key(key)[1] for key in tensors):
        config = model.denoiser.network.config
        values = merged(parse_lora(name, tensors, metadata), weights, strength, config, keep)
    else:
        state = {k.removeprefix(PROJECTION_PREFIX): v for k, v in tensors.items() if k.startswith(PROJECTION_PREFIX)}
        tensors, _ = split_markers(tensors, ldm.UNET_PREFIX)
        tuned = {_layer_name(k): v for k, v in tensors.items() if not k.startswith(PROJECTION_PREFIX)}
        values = interpolated(name, tuned, weights, strength, keep)
        if state:
            projection = _projection(name, encoder.projection, state, metadata, strength)
            encoder = encoder.with_projection(projection)
    _check_finite(name, values)
    for key, value in values.items():
        replace_weight(refs[key], value.to(weights[key].device))
    changed = any(key.startswith(TEXT) for key in values)
    return replace(model, text_encoder=encoder.refreshed() if changed else encoder)


def _check_finite(name: str, values: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a weight would become NaN, infinite or too large for its dtype."""
    if bad := [key for key, value in values.items() if not torch.isfinite(value).all()]:
        raise ValueError(
            f"{name} makes {first_few(bad)} NaN, infinite or too large for {str(values[bad[0]].dtype)[6:]}; expected "
            "finite weights. Use an earlier save, or a lower strength."
        )


def warn_of_another_demo(name: str, metadata: Mapping[str, str], denoiser: Denoiser) -> None:
    """Logs that a file with this metadata was made for another model than a demo model's denoiser."""
    weights = {denoiser.canonical_name(key): value for key, value in denoiser.network.named_parameters()}
    if line := made_for_another(metadata.get(BASE, ""), edition_of_unet(weights.get(CONV_IN))):
        log.warning("%s %s", name, line)


def model_weights(model: TextToImage) -> dict[str, Tensor]:
    """Every weight of the UNet and of the text encoder by its layer's name in ComfyUI's LoRA files, with `.weight` or
    `.bias`: `diffusion_model.input_blocks...`, `text_encoders.clip_l.transformer...`."""
    return {name: ref.tensor for name, ref in _weight_refs(model).items()}


def _weight_refs(model: TextToImage) -> dict[str, ParameterRef]:
    """The parameters of `model_weights`, by the same names."""
    denoiser = model.denoiser
    unet = {UNET + denoiser.canonical_name(name): ref for name, ref in parameter_refs(denoiser.network).items()}
    return unet | dict(model.text_encoder.weights)


def _layer_name(key: str) -> str:
    return UNET + key.removeprefix(ldm.UNET_PREFIX) if key.startswith(ldm.UNET_PREFIX) else key


def interpolated(
    name: str, tuned: Mapping[str, Tensor], weights: Mapping[str, Tensor], strength: float, keep: Keep = kept_whole
) -> dict[str, Tensor]:
    """(1 - strength) W + strength W_tuned by name, fp32; exactly W_tuned at strength 1.

    Args:
        name: the file's, for errors.
        tuned: W_tuned.
        weights: W, of the whole model.
        strength: 0 to 1.
        keep: what of it is returned.

    Raises:
        ValueError: names that are not among `weights`, or other shapes.
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
    shares = 1 - strength, strength
    return {key: keep(key, weighted_sum(shares, (weights[key], value))) for key, value in tuned.items()}


def _projection(
    name: str, own: Projection | None, state: Mapping[str, Tensor], metadata: Mapping[str, str], strength: float
) -> Projection:
    """The projection of a file, or its blend with `own`, the model's."""
    if own is None:
        raise ValueError(
            f"{name} holds a projection and the text encoder has none; expected the T5 that its run had. Use --t5."
        )
    about = metadata_json(metadata, "retune.run", default={}).get("projection")
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
    lora: Lora,
    weights: Mapping[str, Tensor],
    strength: float,
    unet_config: Mapping | None = None,
    keep: Keep = kept_whole,
) -> dict[str, Tensor]:
    """W + strength dW by name of every weight and bias that the LoRA changes, fp32; DoRA as `_with_magnitude`.

    Args:
        lora: layers that are not among `weights`, and tensors of no layer, are left out with a warning.
        weights: W, of the whole model.
        strength: 0 to 1.
        unet_config: UNet2DConditionModel's, for the names of layers.
        keep: what of it is returned.

    Raises:
        ValueError: no layer is among `weights`, other shapes, or kinds that do not merge (OFT, GLoRA).
    """
    by_layer = {plain_layer(name): name for name in weights}
    values, idle = {}, []
    for layer, module in modules_by_layer(lora, detect_naming(lora, unet_config=unet_config)).items():
        parts = {by_layer[key]: part for part in ("weight", "bias") if (key := f"{layer}.{part}") in by_layer}
        try:
            changed = {name: _changed(module, weights[name], part, strength) for name, part in parts.items()}
        except ValueError as error:
            raise ValueError(f"{lora.name}: {error}") from error
        changed = {name: keep(name, value) for name, value in changed.items() if value is not None}
        values |= changed
        if not changed:
            idle.append(module.name)
    if not values:
        raise ValueError(
            f"{lora.name} has no layer that the model has, only {first_few(idle)}; expected a LoRA for it."
        )
    for count, what, names in ((len(idle), "layers", idle), (len(lora.other_keys), "tensors", lora.other_keys)):
        if count:
            log.warning("%s: %d %s are not in the model and are left out: %s", lora.name, count, what, first_few(names))
    if line := missing_alpha(lora):
        log.warning("%s", line)
    return values


def _changed(module: LoraModule, weight: Tensor, part: str, strength: float) -> Tensor | None:
    """A layer's weight or bias with the module's change; None where the module does not change it."""
    roles = BIAS if part == "bias" else ("w_norm",)
    vector = next((module.tensors[role] for role in roles if role in module.tensors), None)
    if vector is not None:
        _check_size(module, (vector.numel(), 1), (weight.numel(), 1))
        return exact(weight) + strength * vector.float().reshape(weight.shape)
    if part == "bias" or not (module.tensors.keys() - set(BIAS)):
        return None
    tensors = {role: value for role, value in module.tensors.items() if role != "dora_scale"}
    bare = LoraModule(module.name, tensors, module.keys)
    if bare.kind in LINEAR_KINDS:
        _check_size(bare, bare.shape, (weight.shape[0], weight.shape[1:].numel()))
    change = delta_weight(bare)
    base = exact(weight)
    changed = base + change.reshape(weight.shape)
    if "dora_scale" in module.tensors:
        changed = _with_magnitude(changed, module.tensors["dora_scale"].float())
    return base + strength * (changed - base)


def _check_size(module: LoraModule, found: tuple[int, int] | None, expected: tuple[int, int]) -> None:
    """Raises ValueError, before a layer is computed, unless it has as many rows and columns as its weight."""
    if found != expected:
        raise ValueError(f"layer {module.name} changes {found}; expected {expected}")


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """m W / |W|, the norm over everything but the axis that has magnitudes (DoRA, arXiv 2402.09353, eq. 5)."""
    axis = dora_axis(magnitude, tuple(weight.shape))
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * magnitude.reshape(norm.shape) / norm
