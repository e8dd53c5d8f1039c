"""A model from its config: load it, replace the text encoder, reset layers, apply the results of earlier runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.files import write_tensors
from ..common.foreign import read_text
from ..common.text import filled_lines
from ..config.model import ModelConfig
from ..config.reset import ResetConfig
from ..demo.files import demo_config, weights_path
from ..formats.lora_names import UNET
from ..models import ldm
from ..models.diffusers import DiffusersDenoiser, denoiser_outline, load_denoiser, load_model
from ..models.layers import reset_weights
from ..models.parameters import parameter_refs
from ..models.prediction import Correction, plain_values, unet_description
from ..models.protocols import Denoiser, TextToImage
from ..models.recast import replace_weight
from ..models.visitors import Visitors
from ..recipes.apply_results import Keep, kept_whole, result_files, tuned_file, with_tuned
from ..recipes.unet import TrainedModel
from ..text_encoder.distil import Distillation, fit_or_distil
from ..text_encoder.fit import EncoderStates
from ..text_encoder.projection import Projection
from ..text_encoder.scale import scale_to, scale_to_reference
from ..text_encoder.t5 import Padding, load_t5
from ..text_encoder.t5_file import read_t5_config

log = logging.getLogger(__name__)

DEMO = "demo"
TEXT_ENCODER, VAE = "text encoder", "VAE"
UNET_SHAPE = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "use_linear_projection",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""The values of a UNet's config that a file written here keeps."""


def build_model(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    trains: Callable[[str], bool] = lambda name: False,
    visiting: Collection[str] = (),
    text_trains: bool = True,
    replaced: bool = False,
) -> TextToImage:
    """The model that a config describes: in fp32 or, for a run in half precision, with frozen weights held in less.

    Those of the UNet are held in the dtype of the run's arithmetic, or as they are where that is fp8 or int8; those of
    VAE and text encoder in that of their file. What differs from the arithmetic is unfolded layer by layer.

    Args:
        config: the model, and what is done to it.
        dtype: of the run's arithmetic.
        trains: whether a weight of the UNet, by its canonical name, trains.
        visiting: those of TEXT_ENCODER and VAE that are on the device only while they are used, and the UNet does not
            compute. Not what trains, and nothing that gradients pass through.
        text_trains: whether the text encoder's own weights train; they are then in fp32. Beside adapters and words they
            keep the dtype of their file.
        replaced: whether masters stand in the place of what trains whenever the UNet computes: those weights then keep
            the dtype of their file in fp32 too, and so do VAE and text encoder.

    Raises:
        ValueError, FileNotFoundError: For files of `tuned` that do not exist, before the model is loaded; then those of
            the loaders.
    """
    path, tokenizer = _checkpoint(config)
    for text in config.tuned:
        result_files(tuned_file(text).path)
    held = dtype != torch.float32 or replaced
    own_text = held and not text_trains
    options = {"config_of": demo_config, "own_dtypes": held, "own_text": own_text}
    model = load_model(path, tokenizer=tokenizer, correction=correction_of(config), **options)
    if config.model == DEMO:
        from ..demo.judge import judge_samples

        model = replace(model, judge=judge_samples)
    if config.t5 is not None:
        model = with_t5(model, config, filled_lines(read_text(config.fit)) if config.fit else (), held=own_text)
    if config.reset is not None:
        reset_in_place(model, ResetConfig(layers=config.reset, seed=config.reset_seed))
    model = with_tuned(model, config.tuned, _rounding(model, dtype, trains) if held else kept_whole)
    if held:
        model.denoiser.store_in(dtype, trains)
    _place(model, torch.device(config.device or "cpu"), visiting)
    return model


def _rounding(model: TextToImage, dtype: torch.dtype, trains: Callable[[str], bool]) -> Keep:
    """Rounds a new weight of the UNet at once as `store_in` would afterwards, by its name in `model_weights`."""
    rounded = model.denoiser.rounding(dtype, trains)
    return lambda name, value: rounded(name.removeprefix(UNET), value) if name.startswith(UNET) else value


def _place(model: TextToImage, device: torch.device, visiting: Collection[str]) -> None:
    """Puts a model on a device; its visiting parts wait in RAM for their use."""
    encoder, vae = model.text_encoder, model.autoencoder.network
    backbone = encoder.network if encoder.projection is None else encoder.model
    if encoder.projection is not None:
        encoder.projection.to(device)
    parts = {
        TEXT_ENCODER: list(backbone) if isinstance(backbone, nn.ModuleList) else [backbone],
        VAE: [vae],
    }
    groups = [networks for part, networks in parts.items() if part in visiting and device.type != "cpu"]
    for network in (network for networks in parts.values() if networks not in groups for network in networks):
        network.to(device)
    model.denoiser.network.to(device)
    if groups:
        Visitors(model.denoiser.network, groups, device)


def build_demo_model(**options) -> TextToImage:
    """The demo model; options: further fields of `ModelConfig`, such as t5="demo"."""
    return build_model(ModelConfig(model=DEMO, **options))


def open_unet(model: str) -> dict[str, nn.Parameter]:
    """Canonical name -> fp32 weight of the UNet alone; model: as in ModelConfig, its other parts may be missing."""
    return unet_parameters(open_denoiser(model))


def open_denoiser(model: str, correction: Correction | None = None) -> DiffusersDenoiser:
    """The UNet alone, in fp32; model: as in ModelConfig."""
    path, _ = _checkpoint(ModelConfig(model=model))
    return load_denoiser(path, correction or Correction(), config_of=demo_config)


def open_outline(config: ModelConfig) -> DiffusersDenoiser:
    """The UNet of a config's model without values, before anything is loaded: its file's header tells its shape."""
    path, _ = _checkpoint(config)
    return denoiser_outline(path, config_of=demo_config)


def correction_of(config: ModelConfig) -> Correction:
    """What a config knows better than the model's files about prediction and noise levels."""
    return Correction(config.prediction, config.noise_levels)


def unet_parameters(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter."""
    return {denoiser.canonical_name(name): p for name, p in denoiser.network.named_parameters()}


def _checkpoint(config: ModelConfig) -> tuple[Path, Path | None]:
    """Checkpoint and CLIP tokenizer."""
    if config.model == DEMO:
        return weights_path("demo.safetensors"), weights_path("clip_tokenizer")
    at_comfyui = config.comfyui / "comfy" / "sd1_tokenizer" if config.comfyui else None
    return Path(config.model), config.tokenizer or at_comfyui


def with_t5(model: TextToImage, config: ModelConfig, fit_on: Sequence[str] = (), *, held: bool = False) -> TextToImage:
    """The model with its text encoder replaced by a T5, scaled to the same output std (or to config.target_std).

    Args:
        model: Its denoiser and autoencoder are shared with the result.
        config: The T5, its tokenizer, projection and padding; its other fields are not used.
        fit_on: Prompts on which the projection is fitted to the replaced text encoder, which fits its scale too.
            Without them the projection starts as `config.projection` names and only its scale is matched.
        held: whether the T5, which then does not train, keeps the dtypes of its file.
    """
    path = weights_path("t5.safetensors") if config.t5 == DEMO else Path(config.t5)
    width, pooled_width = model.denoiser.context_width, model.denoiser.pooled_width
    options = {"seed": config.projection_seed, "pooled_width": pooled_width}
    projection = Projection(read_t5_config(path)["d_model"], width, config.projection, **options)
    padding = Padding(max_tokens=config.max_tokens, pad=config.pad)
    places = {"tokenizer": config.t5_tokenizer, "comfyui": config.comfyui}
    encoder = load_t5(path, projection, padding=padding, held=held, **places)
    if fit_on:
        old = EncoderStates(model.text_encoder, before_projection=False)
        new = EncoderStates(encoder, before_projection=True)
        settings = Distillation(steps=config.fit_steps, seed=config.projection_seed)
        how = {"method": config.fit_method, "settings": settings, "pooled_width": pooled_width}
        fitted, report = fit_or_distil(new, old, fit_on, **how)
        log.info("projection: %s", report.text())
        encoder = encoder.with_projection(fitted)
    elif config.target_std is None:
        encoder, _ = scale_to_reference(encoder, model.text_encoder)
    else:
        encoder, _ = scale_to(encoder, config.target_std)
    return replace(model, text_encoder=encoder)


@torch.no_grad()
def reset_in_place(model: TextToImage, config: ResetConfig) -> None:
    """Resets attention weights of the model's UNet, which nothing else may be using; they are fp32 afterwards."""
    denoiser = model.denoiser
    refs = {denoiser.canonical_name(name): ref for name, ref in parameter_refs(denoiser.network).items()}
    for name, value in reset_weights({name: ref.tensor for name, ref in refs.items()}, config)[0].items():
        replace_weight(refs[name], value)


@torch.no_grad()
def apply_weights(model: TextToImage, trained: TrainedModel) -> TextToImage:
    """Copies a run's result into the model, which nothing else may be using, and returns it."""
    parameters = unet_parameters(model.denoiser)
    for name, value in trained.unet.items():
        parameters[name].copy_(value)
    if not trained.projection:
        return model
    projection = Projection.from_state(trained.projection_config, trained.projection)
    return replace(model, text_encoder=model.text_encoder.with_projection(projection))


def save_unet(path: Path, weights: Mapping[str, Tensor], denoiser: DiffusersDenoiser) -> None:
    """Writes canonical UNet weights in the layout that ComfyUI's Load Diffusion Model reads.

    The file tells, as that of `denoiser` did, what the weights predict and at which noise levels: by ComfyUI's marker
    tensors, with and without the prefix, since Load Checkpoint and Load Diffusion Model look for them in different
    places; by ModelSpec's metadata; and by `retune.config`, with what shapes do not tell, such as the demo model's
    heads.

    Args:
        path: the file to write.
        weights: canonical name -> value, the whole UNet.
        denoiser: the model that they are weights of.
    """
    tensors = {ldm.UNET_PREFIX + name: value for name, value in weights.items()}
    markers, metadata = unet_description(denoiser.prediction_type, denoiser.sigmas, ldm.UNET_PREFIX)
    config = denoiser.network.config
    about = {
        "unet": {name: config[name] for name in UNET_SHAPE if name in config},
        "scheduler": plain_values(denoiser.scheduler),
    }
    write_tensors(Path(path), tensors | markers, metadata | {"retune.config": json.dumps(about)})
