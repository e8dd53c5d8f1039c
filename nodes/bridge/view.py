"""ComfyUI's MODEL, CLIP and VAE as the core's `TextToImage`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...training.models.protocols import TextToImage
from ..common.demo_model import is_demo
from ..common.inputs import expect_given
from .autoencoder import ComfyAutoencoder, latent_format_of
from .denoiser import ComfyDenoiser
from .device import training_mode
from .layers import training_layers
from .text_encoder import ComfyTextEncoder


@contextmanager
def text_to_image(model, clip, vae) -> Iterator[TextToImage]:
    """While entered, a MODEL, CLIP and VAE as a `TextToImage` that can train. Raises ValueError for a missing one."""
    from ...training.demo.judge import judge_samples

    expect_given(model=model, clip=clip, vae=vae)
    with training_mode():
        denoiser = ComfyDenoiser(model)
        encoder = ComfyTextEncoder(clip, denoiser)
        if encoder.projection is not None:
            encoder.projection.to(denoiser.device)
        with training_layers(denoiser.network):
            judge = judge_samples if is_demo(model) else None
            yield TextToImage(denoiser, encoder, ComfyAutoencoder(vae, latent_format_of(model)), judge)
