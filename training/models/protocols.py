"""One view of a text-to-image model: a denoiser, a text encoder and an autoencoder.

All of training/ works on these three protocols. `models/diffusers.py` implements them for diffusers and transformers
modules, `nodes/bridge` for ComfyUI's MODEL, CLIP and VAE.
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
    """Encoded prompts, as the denoiser's cross-attention reads them."""

    context: Tensor
    """(B, L, D) states of the tokens."""
    pooled: Tensor | None = None
    """(B, P), one vector for the whole prompt; None for models that read none."""
    mask: Tensor | None = None
    """(B, L) bool, True where a token is attended, pads included where the model was trained so; None: every token."""
    prefix: Conditioning | None = None
    """A second encoder's conditioning, already in the denoiser's width, whose tokens `project` places first. Only the
    result of a backbone has one."""

    def __len__(self) -> int:
        return self.context.shape[0]

    def to(self, *args, **kwargs) -> Conditioning:
        """Moves or casts context and pooled; the mask keeps its dtype and follows the device."""
        context = self.context.to(*args, **kwargs)
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        non_blocking = kwargs.get("non_blocking", False)
        mask = None if self.mask is None else self.mask.to(context.device, non_blocking=non_blocking)
        prefix = None if self.prefix is None else self.prefix.to(*args, **kwargs)
        return Conditioning(context, pooled, mask, prefix)

    def prompts(self, numbers: slice) -> Conditioning:
        """The conditioning of some of the batch's prompts, views of these tensors."""
        rest = (None if part is None else part[numbers] for part in (self.pooled, self.mask))
        return Conditioning(self.context[numbers], *rest, None if self.prefix is None else self.prefix.prompts(numbers))

    def append_to(self, first: Conditioning) -> Conditioning:
        """The tokens of `first`, then these, as one conditioning; `pooled` is that of `first` if it has one."""
        masked = self.mask is not None or first.mask is not None
        masks = [_padded_mask(part, part.context.shape[1]) for part in (first, self)] if masked else None
        context = torch.cat([first.context, self.context], dim=1)
        pooled = self.pooled if first.pooled is None else first.pooled
        return Conditioning(context, pooled, torch.cat(masks, dim=1) if masks else None)

    @staticmethod
    def cat(items: Iterable[Conditioning]) -> Conditioning:
        """Concatenates along the batch; shorter contexts are padded with zeros that the mask excludes."""
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
    """D(x; sigma, c) of Karras et al. 2022 (arXiv 2206.00364), over a network that predicts eps, v or flow.

    Noisy latents are x = latent + sigma * noise for eps and v models, and x = (1 - sigma) * latent + sigma * noise for
    flow models. Latents and noise are (B, C, h, w), sigma is (B,).
    """

    network: nn.Module
    """The UNet or transformer, for its parameters."""
    sigmas: Tensor
    """(T,) training noise levels, ascending; `sigmas[t]` belongs to timestep t."""
    prediction_type: str
    """"eps", "v" or "flow"."""
    fingerprint: str
    """Changes with the weights, the noise levels and the prediction type."""
    latent_channels: int
    """C of the latents."""
    input_channels: int
    """Channels that the network reads: more than latent_channels for inpainting and edit models."""
    context_width: int
    """D of the conditioning's context."""
    pooled_width: int
    """P of the pooled output that the network reads in addition to the context (SDXL: 1280); 0 for none."""
    device: torch.device

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noisy latent x."""
        ...

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's raw output (B, C, h, w) for a noisy latent."""
        ...

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The output that training asks of `predict`: noise (eps), velocity (v) or noise - latent (flow)."""
        ...

    def denoised(self, noisy: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """The estimate of the clean latent that follows from a raw output."""
        ...

    def with_sigmas(self, sigmas: Tensor) -> Denoiser:
        """A denoiser over the same network with other training noise levels, (T,) ascending; eps and v models only."""
        ...

    def checkpointing(self, enabled: bool) -> AbstractContextManager:
        """While entered, if enabled, blocks recompute their activations in the backward pass to save memory."""
        ...

    def canonical_name(self, name: str) -> str:
        """A parameter's name in the original (LDM) layout, `input_blocks.1.1...`; run folders and files use it."""
        ...


class TextEncoder(Protocol):
    """Prompts to conditioning, differentiable: `encode(tokens)` equals `project(backbone(tokens))`.

    The backbone is a pretrained language or CLIP model; the projection, where there is one, maps its states to the
    width that the denoiser reads.
    """

    fingerprint: str
    """Changes whenever `backbone` would return something else; caches are keyed by it."""
    width: int
    """D of the context that `encode` returns."""
    pooled_width: int
    """P of the pooled output; 0 for none."""
    concepts: tuple[Concept, ...]
    """Tokens of prompts that stand for learned vectors."""
    vocabularies: Mapping[str, Vocabulary]
    """By ComfyUI's name of each encoder, such as `clip_l`."""
    projection: nn.Module | None
    """The trainable part between backbone and denoiser, or None."""
    max_prompt_tokens: int
    """Tokens of a prompt that are encoded together, start and end token not counted."""
    chunks_long_prompts: bool
    """Whether a longer prompt is encoded in several windows; otherwise it is cut."""
    layers: dict[str, nn.Module]
    """Linear layers of the backbone by their names in ComfyUI's LoRA files, `text_encoders.clip_l.transformer...`."""
    weights: Mapping[str, ParameterRef]
    """All weights of the backbone under such names, without a text projection that no UNet reads."""

    def with_concepts(self, concepts: Iterable[Concept]) -> TextEncoder:
        """An encoder with the same weights and these concepts in addition.

        Raises ValueError for vectors of another width than the encoder's.
        """
        ...

    def tokenize(self, texts: list[str]) -> Any:
        """Token ids of a batch of prompts, in the form that `backbone` reads."""
        ...

    def backbone(self, tokens: Any) -> Conditioning:
        """Token states before the projection."""
        ...

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        """The conditioning for the denoiser from token states.

        time: (B,), the training timestep as a share of the last one, 0 (clean) to 1, for projections that depend on it.
        """
        ...

    def encode(self, tokens: Any) -> Conditioning:
        """The conditioning for the denoiser from token ids."""
        ...

    def training(self) -> AbstractContextManager:
        """While entered, `backbone` carries gradients to adapters on `layers` and to the concepts' vectors."""
        ...


class Autoencoder(Protocol):
    """Images (B, 3, H, W) in 0..1 to latents (B, C, H / downscale, W / downscale) in the denoiser's scale, and back."""

    network: nn.Module
    """The VAE, for its parameters and to recompute its activations (`models.recompute`)."""
    fingerprint: str
    """Changes with the weights and the scale; caches of latents are keyed by it."""
    downscale: int
    """Pixels for each latent cell along a side, such as 8."""

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images, the same at every call."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents, clamped to 0..1."""
        ...

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, differentiable and not clamped: a clamp has no gradient where pixels are saturated."""
        ...


@dataclass(frozen=True)
class TextToImage:
    """A text-to-image model by its three parts."""

    denoiser: Denoiser
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    judge: Callable[[Sequence[Tensor], Sequence[str]], dict[str, float]] | None = None
    """(pictures (3, H, W), their prompts) -> measures of how well these agree, by name; None where nothing measures it.
    The demo model has a classifier for it."""
