"""TextToImage over diffusers and transformers modules: for the command line, tests and several machines.

Loads a diffusers folder, or a single-file checkpoint in the original layout (SD1.x and SDXL by shape; the demo model by
its metadata). Tokenizers are never downloaded: they come with the folder, from an explicit path, or from ComfyUI's
folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.files import read_tensors
from ..common.fingerprint import tensors_fingerprint
from . import ldm
from .clip import ClipTextEncoder
from .noise_levels import zero_terminal_sigmas
from .parameters import expect_tensors
from .protocols import Conditioning, TextEncoder, TextToImage
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
SD1_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def training_sigmas(scheduler: Mapping) -> Tensor:
    """(T,) noise levels sqrt((1 - alphas_cumprod) / alphas_cumprod) of a discrete beta schedule, ascending, fp32.

    Rescaled to zero terminal SNR where the scheduler is. Raises ValueError for a schedule other than linear or
    scaled_linear, and for listed betas.
    """
    if scheduler.get("trained_betas"):
        raise ValueError("scheduler's trained_betas is set; expected a plain beta schedule. Its noise levels differ.")
    alphas_cumprod = torch.cumprod(1 - _betas(scheduler), dim=0)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()
    return zero_terminal_sigmas(sigmas) if scheduler.get("rescale_betas_zero_snr") else sigmas


def _betas(scheduler: Mapping) -> Tensor:
    """(T,) in fp64."""
    start, end = scheduler["beta_start"], scheduler["beta_end"]
    count = scheduler.get("num_train_timesteps", 1000)
    kind = scheduler.get("beta_schedule", "scaled_linear")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    raise ValueError(f"beta_schedule is {kind!r}; expected 'scaled_linear' or 'linear'.")


class DiffusersDenoiser:
    """Denoiser over a UNet2DConditionModel that predicts eps or v."""

    def __init__(self, unet: nn.Module, scheduler: Mapping = SD1_SCHEDULER):
        kinds = {"epsilon": "eps", "v_prediction": "v"}
        prediction = scheduler.get("prediction_type", "epsilon")
        if prediction not in kinds:
            raise ValueError(f"prediction_type is {prediction!r}; expected one of {', '.join(kinds)}.")
        self.network = unet.eval()
        self.prediction_type = kinds[prediction]
        self.sigmas = training_sigmas(scheduler)
        self._log_sigmas = self.sigmas.log()
        self._names = {b: a for a, b in ldm.unet_names(unet.config).items()}
        self.latent_channels = unet.config.out_channels
        self.input_channels = unet.config.in_channels
        self.context_width = unet.config.cross_attention_dim
        self.pooled_width = _pooled_width(unet.config)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def fingerprint(self) -> str:
        weights = ((self.canonical_name(n), p) for n, p in self.network.named_parameters())
        return tensors_fingerprint([*weights, ("sigmas", self.sigmas)], self.prediction_type)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return latent + _column(sigma) * noise

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        scaled = noisy / (1 + _column(sigma) ** 2).sqrt()
        distance = (sigma.log().cpu()[:, None] - self._log_sigmas[None]).abs()
        times = distance.argmin(1).to(noisy.device)
        return self.network(
            scaled,
            times,
            encoder_hidden_states=conditioning.context,
            encoder_attention_mask=conditioning.mask,
            added_cond_kwargs=self._size_conditioning(noisy, conditioning),
        ).sample

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction_type == "eps":
            return noise
        return (noise - _column(sigma) * latent) / (1 + _column(sigma) ** 2).sqrt()

    def denoised(self, noisy: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        sigma = _column(sigma)
        if self.prediction_type == "eps":
            return noisy - sigma * output
        return noisy / (1 + sigma**2) - sigma * output / (1 + sigma**2).sqrt()

    def with_sigmas(self, sigmas: Tensor) -> DiffusersDenoiser:
        other = copy.copy(self)
        other.sigmas, other._log_sigmas = sigmas, sigmas.log()
        return other

    @contextmanager
    def checkpointing(self, enabled: bool):
        if enabled:
            self.network.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.network.disable_gradient_checkpointing()

    def canonical_name(self, name: str) -> str:
        return ldm.rename(name, self._names)

    def _size_conditioning(self, noisy: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """SDXL's pooled text and (height, width, crop 0, 0, height, width) in pixels; None for models without it."""
        if self.network.config.addition_embed_type != "text_time":
            return None
        if conditioning.pooled is None:
            raise ValueError("text encoder gives no pooled output; expected one for this model (SDXL).")
        height, width = noisy.shape[-2] * 8, noisy.shape[-1] * 8
        sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device, dtype=noisy.dtype)
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
        self.fingerprint = tensors_fingerprint(vae.named_parameters(), vae.config.scaling_factor)

    def encode(self, images: Tensor) -> Tensor:
        parameter = next(self.network.parameters())
        posterior = self.network.encode(images.to(parameter) * 2 - 1).latent_dist
        return posterior.mode() * self.network.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.pixels(latents).clamp(0, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        parameter = next(self.network.parameters())
        images = self.network.decode(latents.to(parameter) / self.network.config.scaling_factor).sample
        return images / 2 + 0.5


def load_model(path: Path, *, tokenizer: Path | None = None) -> TextToImage:
    """A text-to-image model in fp32 from a diffusers folder or a single-file checkpoint in the original layout.

    tokenizer: folder of a CLIP tokenizer (of both of SDXL's encoders); needed for a single file other than the demo
    model.
    """
    path = _existing_model(path)
    return _load_folder(path, tokenizer) if path.is_dir() else _load_file(path, tokenizer)


def load_denoiser(path: Path) -> DiffusersDenoiser:
    """The UNet of a diffusers folder or single-file checkpoint, in fp32; other parts may be missing from it."""
    path = _existing_model(path)
    if path.is_dir():
        _expect_parts(path, "unet")
        return _folder_denoiser(path)
    tensors, metadata = read_tensors(path, ldm.UNET_PREFIX)
    return _file_denoiser(tensors, json.loads(metadata.get("retune.config", "{}")))


def _existing_model(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir() and (path.suffix != ".safetensors" or not path.is_file()):
        raise ValueError(f"model is {path}; expected a diffusers folder or a .safetensors checkpoint.")
    return path


def _expect_parts(path: Path, *parts: str) -> None:
    missing = [part for part in parts if not (path / part).is_dir()]
    if missing:
        raise ValueError(f"diffusers folder {path} lacks {', '.join(missing)}; expected {', '.join(parts)}.")


def _folder_denoiser(path: Path) -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(path / "unet", local_files_only=True, torch_dtype=torch.float32)
    settings = path / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else SD1_SCHEDULER
    return DiffusersDenoiser(unet, scheduler)


def _load_folder(path: Path, tokenizer: Path | None) -> TextToImage:
    from diffusers import AutoencoderKL

    _expect_parts(path, "unet", "vae", "text_encoder")
    denoiser = _folder_denoiser(path)
    vae = AutoencoderKL.from_pretrained(path / "vae", local_files_only=True, torch_dtype=torch.float32)
    text_encoder = (_folder_sdxl_text if denoiser.pooled_width else _folder_text)(path, tokenizer)
    return TextToImage(denoiser, text_encoder, DiffusersAutoencoder(vae))


def _folder_text(path: Path, tokenizer: Path | None) -> ClipTextEncoder:
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(path / "text_encoder", local_files_only=True, dtype=torch.float32)
    return ClipTextEncoder(text, tokenizer or path / "tokenizer")


def _folder_sdxl_text(path: Path, tokenizer: Path | None) -> SdxlTextEncoder:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    _expect_parts(path, "text_encoder", "text_encoder_2")
    options = {"local_files_only": True, "dtype": torch.float32}
    first = CLIPTextModel.from_pretrained(path / "text_encoder", **options)
    second = CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2", **options)
    pad = None if tokenizer is None else SECOND_PAD
    return SdxlTextEncoder(
        ClipTextEncoder(first, tokenizer or path / "tokenizer", penultimate=True),
        ClipTextEncoder(second, tokenizer or path / "tokenizer_2", penultimate=True, pad=pad),
    )


def _file_denoiser(tensors: Mapping[str, Tensor], config: Mapping) -> DiffusersDenoiser:
    """The UNet among a checkpoint's tensors; config: the metadata entry retune.config, empty for other files."""
    from diffusers import UNet2DConditionModel

    state = _stripped(tensors, ldm.UNET_PREFIX)
    with torch.device("meta"):
        unet_config = config.get("unet") or ldm.unet_config({k: v.shape for k, v in state.items()})
        unet = UNet2DConditionModel.from_config(unet_config)
    _assign(unet, ldm.to_diffusers(state, ldm.unet_names(unet.config)), "UNet")
    return DiffusersDenoiser(unet, config.get("scheduler") or SD1_SCHEDULER)


def _load_file(path: Path, tokenizer: Path | None) -> TextToImage:
    from diffusers import AutoencoderKL

    tensors, metadata = read_tensors(path)
    config = json.loads(metadata.get("retune.config", "{}"))
    denoiser = _file_denoiser(tensors, config)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config.get("vae") or (SDXL_VAE if denoiser.pooled_width else SD1_VAE))
    vae_state = _stripped(tensors, ldm.VAE_PREFIX)
    vae_state = {k: v for k, v in vae_state.items() if k.startswith(("encoder.", "decoder.", "quant", "post_quant"))}
    _assign(vae, ldm.to_diffusers(vae_state, ldm.vae_names(vae.config)), "VAE")
    text_encoder = _file_text(tensors, config, tokenizer, sdxl=denoiser.pooled_width > 0)
    return TextToImage(denoiser, text_encoder, DiffusersAutoencoder(vae))


def _file_text(tensors: Mapping[str, Tensor], config: Mapping, tokenizer: Path | None, *, sdxl: bool) -> TextEncoder:
    if sdxl:
        states = tuple(_stripped(tensors, prefix) for prefix in ldm.SDXL_CLIP_PREFIXES)
        return SdxlTextEncoder.from_state(states, (config.get("clip"), config.get("clip_2")), tokenizer)
    return ClipTextEncoder.from_state(_stripped(tensors, ldm.CLIP_PREFIX), config.get("clip"), tokenizer)


def _stripped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _assign(module: nn.Module, state: Mapping[str, Tensor], part: str) -> None:
    """Fills a module made on the meta device with a complete state dict, in fp32."""
    expect_tensors(state, module.state_dict(), f"{part} in the checkpoint")
    module.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)


def _column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
