"""One view of a text-to-image model: a denoiser, a text encoder and an autoencoder.

Core code sees only these three protocols. `diffusers_model.py` implements them for diffusers modules, `nodes/bridge.py`
for ComfyUI's MODEL, CLIP and VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .concepts import Concept, Vocabulary
from .parameters import ParameterRef


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser listens to.

    context: (B, L, D) token states. pooled: (B, P) or None. mask: (B, L) bool, True where a token is attended;
    None means every token is (a pad inside `context` that the mask keeps is attended like any other token).
    before: only what a backbone returns has it: a second encoder's conditioning, already in the denoiser's width, which
    `project` puts before its own tokens.
    """

    context: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    prefix: Conditioning | None = None

    def __len__(self) -> int:
        return self.context.shape[0]

    def to(self, *args, **kwargs) -> Conditioning:
        """Moves or casts context and pooled; the mask keeps its dtype and follows the device."""
        context = self.context.to(*args, **kwargs)
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        mask = None if self.mask is None else self.mask.to(context.device)
        prefix = None if self.prefix is None else self.prefix.to(*args, **kwargs)
        return Conditioning(context, pooled, mask, prefix)

    def append_to(self, first: Conditioning) -> Conditioning:
        """One conditioning whose tokens are those of `first`, then these; `pooled` is `first`'s if it has one."""
        masked = self.mask is not None or first.mask is not None
        masks = [_padded_mask(part, part.context.shape[1]) for part in (first, self)] if masked else None
        context = torch.cat([first.context, self.context], dim=1)
        pooled = self.pooled if first.pooled is None else first.pooled
        return Conditioning(context, pooled, torch.cat(masks, dim=1) if masks else None)

    @staticmethod
    def cat(items: Iterable[Conditioning]) -> Conditioning:
        """Stacks along the batch; shorter contexts are padded with zeros that the mask hides, so each stays exact."""
        items = list(items)
        longest = max(item.context.shape[1] for item in items)
        padded = any(item.context.shape[1] < longest or item.mask is not None for item in items)
        context = torch.cat([nn.functional.pad(i.context, (0, 0, 0, longest - i.context.shape[1])) for i in items])
        mask = torch.cat([_padded_mask(item, longest) for item in items]) if padded else None
        pooled = None if items[0].pooled is None else torch.cat([item.pooled for item in items])
        prefix = None if items[0].prefix is None else Conditioning.cat(item.prefix for item in items)
        return Conditioning(context, pooled, mask, prefix)


def _padded_mask(item: Conditioning, length: int) -> Tensor:
    mask = item.mask
    if mask is None:
        mask = torch.ones(item.context.shape[:2], dtype=torch.bool, device=item.context.device)
    return nn.functional.pad(mask, (0, length - mask.shape[1]), value=False)


class Denoiser(Protocol):
    """D(x; sigma, c) of Karras et al. 2022 (arXiv 2206.00364). Noisy latents live in the sampler's own space:
    x = latent + sigma * noise for eps and v models, (1 - sigma) * latent + sigma * noise for flow models."""

    network: nn.Module
    sigmas: Tensor
    """(T,) training noise levels, ascending; `sigmas[t]` belongs to timestep t."""
    prediction_type: str
    """"eps", "v" or "flow"."""
    fingerprint: str
    latent_channels: int
    input_channels: int
    """More than latent_channels for inpainting and edit models."""
    context_width: int
    pooled_width: int
    """Width of the pooled text that is read beside the context (SDXL: 1280); 0 when none is."""
    device: torch.device

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw network output, (B, C, h, w); sigma is (B,)."""
        ...

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What `predict` should return, in the network's own parameterisation."""
        ...

    def denoised(self, noisy: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """The clean latent that a raw output stands for."""
        ...

    def with_sigmas(self, sigmas: Tensor) -> Denoiser:
        """The same network at other training noise levels, (T,) ascending; eps and v models only."""
        ...

    def checkpointing(self, enabled: bool) -> AbstractContextManager:
        """While entered (and enabled), blocks recompute their activations in the backward pass to save memory."""
        ...

    def canonical_name(self, name: str) -> str:
        """A parameter's name in the original (LDM) layout, `input_blocks.1.1...`; run folders and files use it."""
        ...


class TextEncoder(Protocol):
    """Prompt in, conditioning out: `encode(tokens) == project(backbone(tokens))`, all of it differentiable."""

    fingerprint: str
    """Changes whenever `backbone` would return something else; caches are keyed by it."""
    width: int
    pooled_width: int
    """Width of the pooled output; 0 when there is none."""
    concepts: tuple[Concept, ...]
    """Words that stand for learned vectors in the prompts."""
    vocabularies: Mapping[str, Vocabulary]
    """By ComfyUI's name of each encoder, `clip_l`."""
    projection: nn.Module | None
    """The trainable part between backbone and denoiser, or None."""
    max_prompt_tokens: int
    """Tokens of a prompt that are read at a time, start and end token left out."""
    chunks_long_prompts: bool
    """Whether a longer prompt is read in several windows; else it is cut."""
    layers: dict[str, nn.Module]
    """Linear layers of the backbone by their names in ComfyUI's LoRA files, `text_encoders.clip_l.transformer...`."""
    weights: Mapping[str, ParameterRef]
    """All weights of the backbone under such names, but for a text projection that no UNet reads."""

    def with_concepts(self, concepts: Iterable[Concept]) -> TextEncoder:
        """The same encoder, weights shared, that knows these concepts too. ValueError for vectors that do not fit."""
        ...

    def tokenize(self, texts: list[str]) -> Any: ...

    def backbone(self, tokens: Any) -> Conditioning:
        """Token states before the projection."""
        ...

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        """time: (B,) training timestep as a share, 0 (clean) to 1, for projections that depend on it."""
        ...

    def encode(self, tokens: Any) -> Conditioning: ...

    def training(self) -> AbstractContextManager:
        """While entered, gradients reach adapters on `layers`, and the concepts' vectors, through `backbone`."""
        ...


class Autoencoder(Protocol):
    """Pixels to latents and back. Images are (B, 3, H, W) in 0..1, latents already in the denoiser's scale."""

    fingerprint: str
    downscale: int

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, with gradients and without the cut to 0..1, which would stop those of saturated pixels."""
        ...


@dataclass(frozen=True)
class TextToImage:
    """The model that everything in the core works on."""

    denoiser: Denoiser
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    judge: Callable[[Sequence[Tensor], Sequence[str]], dict[str, float]] | None = None
    """Figures of how well pictures (3, H, W) show their prompts, where something can tell: the demo model's has one."""
