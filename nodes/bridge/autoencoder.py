"""A VAE as an `Autoencoder`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...training.common.fingerprint import tensors_fingerprint
from ..common.weights import base_weight


class ComfyAutoencoder:
    """Implements `Autoencoder` with a VAE.

    Args:
        vae: a VAE.
        latent_format: ComfyUI's latent format of the MODEL, which scales and shifts the VAE's latents.
    """

    def __init__(self, vae, latent_format):
        self.vae, self.latent_format = vae, latent_format
        self.downscale = int(vae.spacial_compression_encode())
        names = [name for name, _ in vae.first_stage_model.named_parameters()]
        # Under dynamic VRAM a weight has its file's dtype until it is loaded, and the VAE's from then on.
        weights = ((name, base_weight(vae.patcher, name).to(vae.vae_dtype)) for name in names)
        self.fingerprint = tensors_fingerprint(weights, latent_format.scale_factor, str(vae.vae_dtype))

    @property
    def network(self) -> nn.Module:
        """The VAE's modules."""
        return self.vae.first_stage_model

    def encode(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.latent_format.process_in(self.vae.encode(images.movedim(1, -1)).clone())

    def decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vae.decode(self.latent_format.process_out(latents)).movedim(-1, 1).clone()

    def pixels(self, latents: Tensor) -> Tensor:
        network = self.vae.first_stage_model
        inner = self.latent_format.process_out(latents).to(self.vae.device, self.vae.vae_dtype)
        return network.decode(inner).float() / 2 + 0.5


def latent_format_of(model):
    """The latent format that a MODEL samples with: the one that RetuneSwapVAE set, else the architecture's."""
    import comfy.latent_formats

    owner = getattr(model.get_model_object("process_latent_in"), "__self__", None)
    swapped = isinstance(owner, comfy.latent_formats.LatentFormat)
    return owner if swapped else model.get_model_object("latent_format")
