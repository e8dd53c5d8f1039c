"""TextToImage over diffusers and transformers modules: for the command line, tests and several machines.

Loads a diffusers folder, or a single-file checkpoint in the original layout (SD1.x, SD2.x and SDXL by shape; the demo
model by its metadata). Tokenizers are never downloaded: they come with the folder, from an explicit path, or from
ComfyUI's folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from ..common.fingerprint import Sampled, sampled, tensors_fingerprint
from ..common.foreign import reading
from ..common.transfer import upload
from . import ldm
from .blocks import recomputed
from .checkpoint import SD1_VAE, SDXL_VAE, Checkpoint, ConfigOf, no_config, open_checkpoint
from .clip import SD2_WIDTH, ClipTextEncoder
from .folders import empty_folder_unet, expect_parts, folder_clip, folder_scheduler, folder_unet, folder_vae
from .kinds import expect_checkpoint_file
from .noise_levels import OWN_SIGMAS, SD1_SCHEDULER, is_edm, prediction_type_of, training_sigmas
from .prediction import AS_READ, Correction, Finding
from .protocols import Conditioning, TextToImage
from .recast import recastable_names, store_in
from .sdxl_clip import SECOND_PAD, SdxlTextEncoder
from .visitors import arrive, send_visitors_away

__all__ = [
    "SD1_SCHEDULER",
    "SD1_VAE",
    "SDXL_VAE",
    "DiffusersAutoencoder",
    "DiffusersDenoiser",
    "denoiser_outline",
    "load_denoiser",
    "load_model",
    "training_sigmas",
]


FLOW_TIMES = 1000
"""Time that the network of a flow model reads at pure noise, as in diffusers and ComfyUI."""


class DiffusersDenoiser:
    """Denoiser over a UNet2DConditionModel.

    Args:
        unet: the network.
        scheduler: values of a diffusers scheduler, which tell what it predicts and at which noise levels.
        source: where these come from, as a phrase.
    """

    def __init__(self, unet: nn.Module, scheduler: Mapping = SD1_SCHEDULER, source: str = "its caller"):
        self.network = unet.eval()
        self.scheduler, self.source = dict(scheduler), source
        self.prediction_type = prediction_type_of(scheduler)
        self.sigmas = training_sigmas(scheduler)
        self._log_sigmas = self.sigmas.log()
        self._names = {b: a for a, b in ldm.unet_names(unet.config).items()}
        self.latent_channels = unet.config.out_channels
        self.input_channels = unet.config.in_channels
        self.context_width = unet.config.cross_attention_dim
        self.pooled_width = _pooled_width(unet.config)
        self._exact: dict[str, Sampled] = {}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def fingerprint(self) -> str:
        names = ((self.canonical_name(name), value) for name, value in self.network.named_parameters())
        weights = ((name, self._exact.get(name, value)) for name, value in names)
        return tensors_fingerprint([*weights, ("sigmas", self.sigmas)], self.prediction_type)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        sigma = _column(sigma)
        return (1 - sigma) * latent + sigma * noise if self.prediction_type == "flow" else latent + sigma * noise

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        send_visitors_away(self.network)
        scaled = noisy if self.prediction_type == "flow" else noisy / (1 + _column(sigma) ** 2).sqrt()
        return self.network(
            scaled,
            self._times(sigma),
            encoder_hidden_states=conditioning.context,
            encoder_attention_mask=conditioning.mask,
            added_cond_kwargs=self._size_conditioning(noisy, conditioning),
        ).sample

    def _times(self, sigma: Tensor) -> Tensor:
        """(B,), the times that the network reads; EDM's log(sigma) / 4 is arXiv 2206.00364, table 1."""
        if self.prediction_type == "flow":
            return sigma * FLOW_TIMES
        if is_edm(self.scheduler):
            return sigma.log() / 4
        levels = self._log_sigmas.to(sigma.device)
        if detect_fake_mode() is None:  # what a rehearsal makes has no values
            self._log_sigmas = levels
        return (sigma.log()[:, None] - levels[None]).abs().argmin(1)

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "flow":
            return noise - latent
        return (noise - _column(sigma) * latent) / (1 + _column(sigma) ** 2).sqrt()

    def denoised(self, noisy: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        sigma = _column(sigma)
        if self.prediction_type in ("eps", "flow"):
            return noisy - sigma * output
        return noisy / (1 + sigma**2) - sigma * output / (1 + sigma**2).sqrt()

    def with_sigmas(self, sigmas: Tensor) -> DiffusersDenoiser:
        if self.prediction_type == "flow" or is_edm(self.scheduler):
            raise ValueError(OWN_SIGMAS)
        other = copy.copy(self)
        other.sigmas, other._log_sigmas = sigmas, sigmas.log()
        return other

    def store_in(self, dtype: torch.dtype, exact: Callable[[str], bool] = lambda name: False) -> None:
        """Holds the weights in the dtype of a run's arithmetic; see `recast.store_in`. `fingerprint` stays what it was.

        Args:
            dtype: fp32, or half precision to hold the frozen weights in.
            exact: whether a weight, by its canonical name, trains and so is not rounded.
        """
        weights = {self.canonical_name(name): value for name, value in self.network.named_parameters()}
        self._exact = {name: sampled(self._exact.get(name, value)) for name, value in weights.items()}
        store_in(self.network, dtype, lambda name: exact(self.canonical_name(name)))

    def rounding(self, dtype: torch.dtype, exact: Callable[[str], bool]) -> Callable[[str, Tensor], Tensor]:
        """(canonical name, new fp32 weight) -> what `store_in` with these arguments would leave of it.

        `fingerprint` is then that of the new weights in fp32, so they must be put into the network.
        """
        layers = {self.canonical_name(name) for name in recastable_names(self.network)}

        def rounded(name: str, value: Tensor) -> Tensor:
            self._exact[name] = sampled(value)
            return value if exact(name) or name not in layers else value.to(dtype)

        return rounded

    def checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return recomputed(self.network, enabled)

    def canonical_name(self, name: str) -> str:
        return ldm.rename(name, self._names)

    def _size_conditioning(self, noisy: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """SDXL's pooled text and (height, width, crop 0, 0, height, width) in pixels; None for models without it."""
        if self.network.config.addition_embed_type != "text_time":
            return None
        if conditioning.pooled is None:
            raise ValueError("text encoder gives no pooled output; expected one for this model (SDXL).")
        height, width = noisy.shape[-2] * 8, noisy.shape[-1] * 8
        sizes = upload(torch.tensor([height, width, 0, 0, height, width], dtype=noisy.dtype), noisy.device)
        return {"text_embeds": conditioning.pooled, "time_ids": sizes.expand(len(noisy), -1)}


def _pooled_width(config) -> int:
    """Width of the pooled output that a UNet reads next to six picture sizes (SDXL: 1280); 0 when it reads none."""
    if config.addition_embed_type != "text_time":
        return 0
    return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


class DiffusersAutoencoder:
    """Autoencoder over an AutoencoderKL; latents are the mean of its posterior, scaled."""

    def __init__(self, vae: nn.Module):
        self.network = vae.eval().requires_grad_(False)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)

    @cached_property
    def fingerprint(self) -> str:
        return tensors_fingerprint(self.network.named_parameters(), self.network.config.scaling_factor)

    def encode(self, images: Tensor) -> Tensor:
        arrive(self.network)
        parameter = next(self.network.parameters())
        posterior = self.network.encode(images.to(parameter) * 2 - 1).latent_dist
        return posterior.mode() * self.network.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.pixels(latents).clamp(0, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        arrive(self.network)
        parameter = next(self.network.parameters())
        images = self.network.decode(latents.to(parameter) / self.network.config.scaling_factor).sample
        return images / 2 + 0.5


def load_model(
    path: Path,
    *,
    tokenizer: Path | None = None,
    correction: Correction = AS_READ,
    config_of: ConfigOf = no_config,
    own_dtypes: bool = False,
    own_text: bool = False,
) -> TextToImage:
    """A text-to-image model in fp32 from a diffusers folder or a single-file checkpoint in the original layout.

    Args:
        path: the folder or file.
        tokenizer: folder of a CLIP tokenizer (of both of SDXL's encoders); needed for a single file other than the demo
            model.
        correction: of what the model predicts and at which noise levels, where the path tells it wrong.
        config_of: describes a single file without a description by its shapes.
        own_dtypes: whether UNet and VAE keep the dtypes of their file: the UNet until `DiffusersDenoiser.store_in`,
            which must follow, the VAE for good (`recast.hold`).
        own_text: whether the text encoder does, where it does not train.

    Raises:
        ValueError: with the path's name: nothing is there, it is another kind of model, or it is damaged.
    """
    path = Path(path)
    expect_checkpoint_file(path)
    with reading(path, "no model of Stable Diffusion"):
        if path.is_dir():
            return _load_folder(path, tokenizer, correction, own_dtypes, own_text)
        checkpoint = open_checkpoint(path, config_of=config_of)
        return _load_file(checkpoint, tokenizer, correction, own_dtypes, own_text)


def load_denoiser(path: Path, correction: Correction = AS_READ, config_of: ConfigOf = no_config) -> DiffusersDenoiser:
    """The UNet of a diffusers folder or single-file checkpoint, in fp32; other parts may be missing from it.

    Args and errors are those of `load_model`.
    """
    path = Path(path)
    expect_checkpoint_file(path)
    with reading(path, "no model of Stable Diffusion"):
        if path.is_dir():
            expect_parts(path, "unet")
            return _denoiser(folder_unet(path), folder_scheduler(path, correction))
        checkpoint = open_checkpoint(path, unet_only=True, config_of=config_of)
        return _denoiser(checkpoint.build_unet(), checkpoint.scheduler(correction))


def denoiser_outline(path: Path, config_of: ConfigOf = no_config) -> DiffusersDenoiser:
    """The UNet of `load_denoiser` as meta tensors: of a file the header alone is read, of a folder its config.json.

    Args and errors are those of `load_model`.
    """
    path = Path(path)
    expect_checkpoint_file(path)
    with reading(path, "no model of Stable Diffusion"):
        if path.is_dir():
            expect_parts(path, "unet")
            return DiffusersDenoiser(empty_folder_unet(path))
        return DiffusersDenoiser(open_checkpoint(path, unet_only=True, config_of=config_of).empty_unet())


def _denoiser(unet: nn.Module, finding: Finding) -> DiffusersDenoiser:
    return DiffusersDenoiser(unet, finding.scheduler, finding.source)


def _load_folder(
    path: Path, tokenizer: Path | None, correction: Correction, own_dtypes: bool, own_text: bool
) -> TextToImage:
    expect_parts(path, "unet", "vae", "text_encoder")
    denoiser = _denoiser(folder_unet(path, own_dtype=own_dtypes), folder_scheduler(path, correction))
    text_encoder = (_folder_sdxl_text if denoiser.pooled_width else _folder_text)(path, tokenizer, own_text)
    return TextToImage(denoiser, text_encoder, DiffusersAutoencoder(folder_vae(path, own_dtype=own_dtypes)))


def _folder_text(path: Path, tokenizer: Path | None, own_dtype: bool) -> ClipTextEncoder:
    from transformers import CLIPTextModel

    text = folder_clip(CLIPTextModel, path / "text_encoder", own_dtype=own_dtype)
    pad = SECOND_PAD if tokenizer is not None and text.config.hidden_size == SD2_WIDTH else None
    return ClipTextEncoder(text, tokenizer or path / "tokenizer", pad=pad)


def _folder_sdxl_text(path: Path, tokenizer: Path | None, own_dtype: bool) -> SdxlTextEncoder:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    expect_parts(path, "text_encoder", "text_encoder_2")
    first = folder_clip(CLIPTextModel, path / "text_encoder", own_dtype=own_dtype)
    second = folder_clip(CLIPTextModelWithProjection, path / "text_encoder_2", own_dtype=own_dtype)
    pad = None if tokenizer is None else SECOND_PAD
    return SdxlTextEncoder(
        ClipTextEncoder(first, tokenizer or path / "tokenizer", penultimate=True),
        ClipTextEncoder(second, tokenizer or path / "tokenizer_2", penultimate=True, pad=pad),
    )


def _load_file(
    checkpoint: Checkpoint, tokenizer: Path | None, correction: Correction, own_dtypes: bool, own_text: bool
) -> TextToImage:
    denoiser = _denoiser(checkpoint.build_unet(own_dtypes=own_dtypes), checkpoint.scheduler(correction))
    sdxl = denoiser.pooled_width > 0
    vae = DiffusersAutoencoder(checkpoint.build_vae(sdxl, own_dtypes=own_dtypes))
    return TextToImage(denoiser, checkpoint.build_text_encoder(tokenizer, sdxl, own_dtypes=own_text), vae)


def _column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
