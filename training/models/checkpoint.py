"""A single-file checkpoint in the original layout, taken apart into the modules of diffusers and transformers.

Shapes decide how large a module is; the metadata of this package (`retune.config`) only what shapes leave open, such as
the number of attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.foreign import TensorFile, metadata_json, open_tensors
from . import ldm
from .clip import SD2_WIDTH, ClipTextEncoder
from .kinds import expect_plain_unet, expect_unet
from .open_clip import penultimate
from .parameters import assign_weights
from .prediction import AS_READ, MARKERS, Correction, Finding, file_scheduler, split_markers
from .protocols import TextEncoder
from .quantised import expect_readable_weights, scaled
from .recast import hold
from .sdxl_clip import SECOND_PAD, SdxlTextEncoder

SD1_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SDXL_VAE = SD1_VAE | {"scaling_factor": 0.13025}
SD2_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""By its std ComfyUI tells SD2.x models of v prediction."""
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
_BARE = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_DESCRIBED = ("attention_head_dim", "addition_embed_type", "addition_time_embed_dim", "mid_block_type")
"""Values of a UNet's config that its shapes do not tell, or only for real and complete models."""
_VAE_PARTS = ("encoder.", "decoder.", "quant", "post_quant")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, which stay in its file until they are used; scaled ones as `StoredTensor`.

    Attributes:
        path: its file.
        unet, vae: tensors under LDM names without their prefix.
        text: tensors of the text encoders, by their whole names.
        markers: see `prediction.MARKERS`.
        metadata: the file's.
        config: `retune.config` of the metadata or, without it, what `ConfigOf` knows by the shapes; mostly empty.
    """

    path: Path
    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    markers: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    def scheduler(self, correction: Correction = AS_READ) -> Finding:
        """What the UNet predicts and at which noise levels, as a diffusers scheduler's values."""
        bias = self.unet.get(SD2_BIAS)
        is_sd2 = bias is not None and self.context_width == SD2_WIDTH and self.unet_config["in_channels"] == 4
        return file_scheduler(self.path, self.markers, self.metadata, self.config, bias if is_sd2 else None, correction)

    @property
    def context_width(self) -> int:
        return self.unet_config["cross_attention_dim"]

    @property
    def unet_config(self) -> dict[str, Any]:
        """The UNet2DConditionModel config."""
        read = ldm.unet_config({name: value.shape for name, value in self.unet.items()})
        given = _object(self.config, "unet")
        return given | read | {name: given[name] for name in _DESCRIBED if name in given}

    def empty_unet(self) -> nn.Module:
        """The UNet2DConditionModel of meta tensors, for which no tensor of the file is read."""
        from diffusers import UNet2DConditionModel

        expect_plain_unet({name: tuple(value.shape) for name, value in self.unet.items()}, self.context_width)
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(self.unet_config)

    def build_unet(self, *, own_dtypes: bool = False) -> nn.Module:
        """The UNet2DConditionModel, in fp32 or in the file's own dtypes."""
        unet = self.empty_unet()
        state = ldm.to_diffusers(self.unet, ldm.unet_names(unet.config))
        return assign_weights(unet, state, "UNet in the checkpoint", own_dtypes=own_dtypes)

    def build_vae(self, sdxl: bool, *, own_dtypes: bool = False) -> nn.Module:
        """The AutoencoderKL, in fp32 or held as in the file (`recast.hold`); sdxl: whether it has SDXL's scale where
        the metadata gives none."""
        from diffusers import AutoencoderKL

        usual, given = SDXL_VAE if sdxl else SD1_VAE, _object(self.config, "vae")
        state = {name: value for name, value in self.vae.items() if name.startswith(_VAE_PARTS)}
        read = ldm.vae_config({name: value.shape for name, value in state.items()})
        read = {name: value for name, value in read.items() if not name.startswith("use_")}
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(usual | given | read)
        named = ldm.to_diffusers(state, ldm.vae_names(vae.config))
        assign_weights(vae, named, "VAE in the checkpoint", own_dtypes=own_dtypes)
        return hold(vae) if own_dtypes else vae

    def build_text_encoder(self, tokenizer: Path | None, sdxl: bool, *, own_dtypes: bool = False) -> TextEncoder:
        """The text encoder or, of SDXL, both, in fp32 or held as in the file (`recast.hold`).

        tokenizer: folder of a CLIP tokenizer.
        """
        clip, second = (_object(self.config, name) or None for name in ("clip", "clip_2"))
        if sdxl:
            states = tuple(_below(self.text, prefix) for prefix in ldm.SDXL_CLIP_PREFIXES)
            return SdxlTextEncoder.from_state(states, (clip, second), tokenizer, held=own_dtypes)
        for prefix in ldm.SD2_CLIP_PREFIXES:
            if state := _below(self.text, prefix):
                encoder = ClipTextEncoder.from_state(
                    penultimate(state), clip, tokenizer, pad=SECOND_PAD, held=own_dtypes
                )
                return encoder.named("clip_h")
        state = _below(self.text, ldm.CLIP_PREFIX) or _below(self.text, ldm.SDXL_CLIP_PREFIXES[0])
        return ClipTextEncoder.from_state(state, clip, tokenizer, held=own_dtypes)


ConfigOf = Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
"""Shapes of a file's tensors -> the `retune.config` of such a model; empty for one that needs none."""


def no_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Knows no model."""
    return {}


def open_checkpoint(path: Path, unet_only: bool = False, config_of: ConfigOf = no_config) -> Checkpoint:
    """Reads a checkpoint, or nothing but its UNet. To be used inside `reading`.

    A file of a UNet alone, without the prefix `model.diffusion_model.`, is read too.

    Args:
        path: the file.
        unet_only: whether VAE and text encoders are left out.
        config_of: describes a file without `retune.config`.

    Raises:
        ValueError: It has no UNet of Stable Diffusion, or weights of an unknown layout.
    """
    with open_tensors(path) as file:
        expect_unet(file.shapes)
        chosen = _chosen(file, unet_only)
        expect_readable_weights({name: file.dtypes[name] for name in chosen})
        tensors = scaled({name: file.read(name) for name in chosen}, file.metadata)
        config = metadata_json(file.metadata, "retune.config", dict, config_of(file.shapes))
    weights, markers = split_markers(tensors, ldm.UNET_PREFIX)
    unet = _below(weights, ldm.UNET_PREFIX) or {n: v for n, v in weights.items() if n.startswith(_BARE)}
    text = {name: value for name, value in weights.items() if name.startswith(TEXT_PREFIXES)}
    return Checkpoint(path, unet, _below(weights, ldm.VAE_PREFIX), text, markers, file.metadata, config)


def _chosen(file: TensorFile, unet_only: bool) -> Iterable[str]:
    """Names of the tensors to read: not those of an average beside the weights (model_ema) or of an optimiser."""
    wanted = (ldm.UNET_PREFIX, *MARKERS, *_BARE) + (() if unet_only else (ldm.VAE_PREFIX, *TEXT_PREFIXES))
    return [name for name in file.shapes if name.startswith(wanted)]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} in its metadata is no object; expected the settings of that part. Save it again.")
    return value
