"""The demo model as ComfyUI's MODEL, CLIP and VAE, built here since ComfyUI detects models by their real widths."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ...training.common.foreign import read_tensors
from ...training.demo.editions import CONV_IN, EDITIONS, edition_of_unet
from ...training.demo.files import weights_path
from ...training.models import ldm
from ...training.text_encoder.stock_file import read_stock_file

log = logging.getLogger(__name__)

BUILT_IN = "demo.safetensors"
DEMO_CLASS = "RetuneDemoModel"


class Ratio(Fraction):
    """A UNet level's width over the first level's: ComfyUI multiplies a width by it and requires an int."""

    def __mul__(self, width: int) -> int:
        return int(super().__mul__(width))

    __rmul__ = __mul__


def read_demo(path: Path | None = None) -> tuple[dict[str, Tensor], dict]:
    """Tensors (fp32) and config of a demo checkpoint.

    A file that stock ModelSave or CheckpointSave wrote has no config and may lack parts: both come from the built-in
    checkpoint. Raises ValueError for a file of another model.
    """
    tensors, metadata = read_tensors(weights_path(BUILT_IN))
    config = json.loads(metadata["retune.config"])
    if path is not None:
        fitting = _fitting(read_tensors(path)[0], tensors, path)
        edition = edition_of_unet(fitting.get(ldm.UNET_PREFIX + CONV_IN))
        if edition not in ("", EDITIONS[-1].name) and len(fitting) < len(tensors):
            log.warning(
                "%s has the UNet of %s, and not all else; the rest is of %s and does not fit it. Save the whole "
                "checkpoint with CheckpointSave in that version.",
                path.name,
                edition,
                EDITIONS[-1].name,
            )
        tensors |= fitting
    return {name: value.float() for name, value in tensors.items()}, config


def _fitting(tensors: dict[str, Tensor], built_in: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors of a file that the demo model has too. Raises ValueError unless its whole UNet is the demo model's."""
    fitting = {n: value for n, value in tensors.items() if n in built_in and value.shape == built_in[n].shape}
    wrong = [n for n in tensors if n.startswith(ldm.UNET_PREFIX) and n not in fitting]
    if wrong or not any(name.startswith(ldm.UNET_PREFIX) for name in fitting):
        raise ValueError(
            f"file {path.name} is no demo checkpoint ({wrong[0] if wrong else 'no UNet tensors'}); expected one saved "
            "from the demo model. Real checkpoints go into ComfyUI's own Load Checkpoint."
        )
    return fitting


def load_demo(path: Path | None = None, *, with_clip: bool = True, disable_dynamic: bool = False):
    """The built-in demo model, or a checkpoint trained from it.

    Args:
        path: the checkpoint; None for the built-in one.
        disable_dynamic: whether ComfyUI's dynamic VRAM is not used for them.

    Returns:
        MODEL, CLIP (None without it) and VAE, in fp32.
    """
    tensors, config = read_demo(path)
    model = _model(tensors, config, disable_dynamic)
    model.cached_patcher_init = (_load_model_patcher, (path,))
    vae = _vae(tensors, config, disable_dynamic)
    vae.patcher.cached_patcher_init = (_load_vae_patcher, (path,))
    clip = _clip(tensors, config, disable_dynamic) if with_clip else None
    if clip is not None:
        clip.patcher.cached_patcher_init = (_load_clip_patcher, (path,))
    return model, clip, vae


def load_demo_clip(path: Path, disable_dynamic: bool = False):
    """The demo model's CLIP in fp32, with the weights of a file in the stock layout (`text_model.*`).

    Raises ValueError for a file of another CLIP, which ComfyUI's loaders read.
    """
    built_in, config = read_demo()
    expected = {name: value for name, value in built_in.items() if name.startswith(ldm.CLIP_PREFIX)}
    tensors = {ldm.CLIP_PREFIX + name: value.float() for name, value in read_stock_file(path)[0].items()}
    shapes = [{name: value.shape for name, value in state.items()} for state in (expected, tensors)]
    if shapes[0] != shapes[1]:
        width = tensors[f"{ldm.CLIP_PREFIX}text_model.embeddings.token_embedding.weight"].shape[1]
        raise ValueError(
            f"{path.name} is a CLIP of width {width}; expected a file that Save Text Encoder wrote from a T5 or from "
            "the demo model. ComfyUI's Load CLIP reads it; SDXL's two go into its DualCLIPLoader."
        )
    clip = _clip(built_in | tensors, config, disable_dynamic)
    clip.patcher.cached_patcher_init = (_load_saved_clip_patcher, (path,))
    return clip


# What ComfyUI calls for an independent copy of a patcher (another GPU, without dynamic VRAM): `cached_patcher_init`.


def _load_saved_clip_patcher(path: Path, disable_dynamic: bool = False):
    return load_demo_clip(path, disable_dynamic).patcher


def _load_model_patcher(path: Path | None, disable_dynamic: bool = False):
    return load_demo(path, with_clip=False, disable_dynamic=disable_dynamic)[0]


def _load_clip_patcher(path: Path | None, disable_dynamic: bool = False):
    return load_demo(path, disable_dynamic=disable_dynamic)[1].patcher


def _load_vae_patcher(path: Path | None, disable_dynamic: bool = False):
    return load_demo(path, with_clip=False, disable_dynamic=disable_dynamic)[2].patcher


def _model(tensors: dict[str, Tensor], config: dict, disable_dynamic: bool):
    import comfy.model_management
    import comfy.model_patcher

    state = {name: value for name, value in tensors.items() if name.startswith(ldm.UNET_PREFIX)}
    model_config = _model_config(state, config)
    offload = comfy.model_management.unet_offload_device()
    network = model_config.get_model(state, ldm.UNET_PREFIX, device=offload)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(network, comfy.model_management.get_torch_device(), offload)
    network.load_model_weights(state, ldm.UNET_PREFIX, assign=patcher.is_dynamic())
    return patcher


def _demo_config_class(scheduler: dict, base: type) -> type:
    """A subclass of ComfyUI's model config with the scheduler's prediction type, by whose name `is_demo` works."""
    from comfy.model_base import ModelType

    kind = ModelType.V_PREDICTION if scheduler["prediction_type"] == "v_prediction" else ModelType.EPS
    return type(DEMO_CLASS, (base,), {"model_type": lambda self, state_dict, prefix="": kind})


def is_demo(model) -> bool:
    """Whether a MODEL is the demo model, built-in or trained."""
    return type(model.model.model_config).__name__ == DEMO_CLASS


def _model_config(state: dict[str, Tensor], config: dict):
    """ComfyUI's model config for the UNet's tensors `state`."""
    import comfy.latent_formats
    import comfy.model_detection
    import comfy.supported_models

    shape = comfy.model_detection.detect_unet_config(state, ldm.UNET_PREFIX)
    model_config = _demo_config_class(config["scheduler"], comfy.supported_models.SD15)(shape)
    widths = config["unet"]["block_out_channels"]
    model_config.unet_config["channel_mult"] = [Ratio(width, widths[0]) for width in widths]
    model_config.unet_config["num_heads"] = config["unet"]["attention_head_dim"]
    model_config.latent_format = comfy.latent_formats.SD15(scale_factor=config["vae"]["scaling_factor"])
    model_config.set_inference_dtype(torch.float32, None)
    return model_config


def _vae(tensors: dict[str, Tensor], config: dict, disable_dynamic: bool):
    import comfy.model_patcher
    import comfy.sd

    state = {n.removeprefix(ldm.VAE_PREFIX): v for n, v in tensors.items() if n.startswith(ldm.VAE_PREFIX)}
    params = {"ddconfig": _ddconfig(config["vae"]), "embed_dim": config["vae"]["latent_channels"]}
    vae = comfy.sd.VAE(sd=state, config={"params": params}, dtype=torch.float32)
    if disable_dynamic:  # for which comfy.sd.VAE has no argument
        devices = vae.patcher.load_device, vae.patcher.offload_device
        vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, *devices)
    return vae


def _ddconfig(vae: dict) -> dict:
    """The original layout's config of the autoencoder, from diffusers' config."""
    channels = vae["block_out_channels"]
    return {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": 128,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def _clip(tensors: dict[str, Tensor], config: dict, disable_dynamic: bool):
    import comfy.sd
    import folder_paths

    prefix = "cond_stage_model."
    state = {"clip_l." + n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    # The file has none, as SD1.5's has none, and ComfyUI would leave it uninitialised, NaN included.
    state["clip_l.transformer.text_projection.weight"] = torch.eye(config["clip"]["hidden_size"])
    return comfy.sd.CLIP(
        _clip_target(config["clip"]),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(value.numel() for value in state.values()),
        state_dict=state,
        model_options={"dtype": torch.float32},
        disable_dynamic=disable_dynamic,
    )


def _clip_target(config: dict) -> SimpleNamespace:
    """Model and tokenizer classes for comfy.sd.CLIP: SD1.5's, with the demo's small vocabulary."""
    from comfy import clip_model, sd1_clip

    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["eos_token_id"]}

    class TextModel(clip_model.CLIPTextModel):
        def __init__(self, config_dict, dtype, device, operations):
            super().__init__(config_dict, dtype, device, operations)
            embedding = operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
            self.text_model.embeddings.token_embedding = embedding

    class Backbone(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(config),
                model_class=TextModel,
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                tokenizer_path=str(weights_path("clip_tokenizer")),
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
            )

    def clip(device="cpu", dtype=None, model_options=None):
        return sd1_clip.SD1ClipModel(device, dtype, model_options or {}, clip_model=Backbone)

    def tokenizer(embedding_directory=None, tokenizer_data=None):
        return sd1_clip.SD1Tokenizer(embedding_directory, tokenizer_data or {}, tokenizer=Tokenizer)

    return SimpleNamespace(clip=clip, tokenizer=tokenizer, params={})
