"""CLIP's image and text tower, from files in the layout of Hugging Face or OpenCLIP; sizes from tensor shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..common.foreign import count_numbered
from ..common.transfer import upload
from ..models.clip import clip_config, load_clip_network
from ..models.open_clip import VISUAL, to_transformers, vision_to_transformers
from ..models.parameters import expect_tensors

Activation = Literal["auto", "gelu", "quick_gelu"]
VISION, TEXT = "vision_model.", "text_model."
IMAGE_TOWER, TEXT_TOWER = "its image tower", "its text tower"
_WRAPPERS = ("module.", "model.", "clip_model.", "clip.", "text.")
"""Prefixes that training code, and OpenCLIP for some of its models, adds to the names."""
_HEADS_OF_WIDE = 16
"""Attention heads of every image tower of width 1024 or more (L, H, g, bigG); in narrower towers a head is 64 wide."""
_GELU_FROM = 1280
"""Width of the narrowest common image tower that was trained with the exact GELU."""


@dataclass(frozen=True)
class TowerState:
    """A file's tensors by tower under transformers' names, `vision_model.` and `text_model.` removed; may be empty."""

    vision: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, Tensor] = field(default_factory=dict)
    logit_scale: float | None = None


def tower_state(state: Mapping[str, Tensor]) -> TowerState:
    """Sorts the tensors of a file in either layout by tower; others are left out. ValueError for a wrong scale."""
    state = {_bare(name): tensor for name, tensor in state.items()}
    if any(name.startswith(VISUAL) for name in state):
        vision = vision_to_transformers(state)
    else:
        vision = {name.removeprefix(VISION): t for name, t in state.items() if name.startswith((VISION, "visual_"))}
    if any(name.startswith("transformer.resblocks.") for name in state):
        text = to_transformers(state)
    else:
        text = {name.removeprefix(TEXT): t for name, t in state.items() if name.startswith((TEXT, "text_"))}
    scale = state.get("logit_scale")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"its logit_scale has {scale.numel()} values; expected one.")
    return TowerState(vision, text, None if scale is None else float(scale))


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


class Towers(nn.Module):
    """Frozen image tower and, unless the state's is empty, text tower, in fp32; `recast.store_in` may round them.

    Args:
        state: the towers' tensors.
        config: `vision_config` and `text_config` as CLIPConfig has them; None reads them from the shapes.
        activation: "auto" is quick_gelu below width 1280, as in OpenAI's models; LAION's ViT-B and ViT-L need "gelu".

    Raises:
        ValueError: a tower lacks tensors, or the two project to different widths.
    """

    def __init__(self, state: TowerState, config: Mapping[str, Any] | None = None, activation: Activation = "auto"):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        self._checkpointed = False
        expect_tensors(state.vision, ("embeddings.patch_embedding.weight", "visual_projection.weight"), IMAGE_TOWER)
        vision = CLIPVisionConfig(**(config["vision_config"] if config else vision_config(state.vision, activation)))
        self.side, self.width = vision.image_size, vision.projection_dim
        self.vision = load_clip_network(CLIPVisionModelWithProjection, vision, state.vision, VISION, IMAGE_TOWER)
        self.text = None
        if state.text:
            self.text = _text_network(state.text, config["text_config"] if config else None, vision.hidden_act)
            _expect_equal_widths(self.width, self.text.config.projection_dim)

    @property
    def weight(self) -> Tensor:
        """One of its weights, for device and dtype. (ComfyUI sets an attribute `device` on modules that it manages.)"""
        return self.vision.visual_projection.weight

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """(B, D) projected embeddings of length 1; pixels: (B, 3, side, side), preprocessed."""
        return _of_length_one(self.vision(pixel_values=pixels).image_embeds)

    def text_embeddings(self, tokens: Tensor) -> Tensor:
        """(B, D) projected embeddings of length 1; tokens: (B, 77)."""
        return _of_length_one(self.text(input_ids=upload(tokens, self.weight.device)).text_embeds)

    def arithmetic(self) -> AbstractContextManager:
        """While entered, products are computed in the dtype of the weights."""
        dtype = self.weight.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return torch.autocast(self.weight.device.type, enabled=False)
        # Without the cache of casts: those of a pass without gradients are of no use in the next one with them.
        return torch.autocast(self.weight.device.type, dtype, cache_enabled=False)

    def checkpoint(self, enabled: bool) -> None:
        """Turns activation checkpointing of the image tower's layers on or off.

        transformers' switch for it has other names in other versions and needs training mode, so it is not used.
        """
        self._checkpointed = enabled
        for layer in self.vision.vision_model.encoder.layers:
            layer.__dict__.pop("forward", None)
            if enabled:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        """Estimated bytes that the image tower needs in addition to its weights: the buffers of one layer and, with
        `gradient`, the activations that autograd saves of frozen layers."""
        config = self.vision.config
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        width, hidden = config.hidden_size, config.intermediate_size
        saved = width if self._checkpointed else 6 * width + hidden * (2 if config.hidden_act == "quick_gelu" else 1)
        layers = config.num_hidden_layers * saved if gradient else 0
        pixels = 4 * 3 * config.image_size**2
        return batch * (tokens * (layers + 8 * width + 3 * hidden) + pixels) * self.weight.dtype.itemsize


def _of_length_one(embeddings: Tensor) -> Tensor:
    """(B, D) rows of length 1, in fp32 at least: cosines differ in their third digit, which half precision has not."""
    return functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def _text_network(state: Mapping[str, Tensor], config: Mapping[str, Any] | None, activation: str) -> nn.Module:
    """The text tower. config: CLIPTextConfig values; None reads them from tensor shapes, with `activation`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    expect_tensors(state, ("embeddings.token_embedding.weight", "text_projection.weight"), TEXT_TOWER)
    values = clip_config(state) | {"hidden_act": activation} if config is None else config
    text = CLIPTextConfig(**values)
    return load_clip_network(CLIPTextModelWithProjection, text, state, TEXT, TEXT_TOWER)


def vision_config(state: Mapping[str, Tensor], activation: Activation = "auto") -> dict[str, Any]:
    """CLIPVisionConfig values from tensor shapes."""
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    patches = state["embeddings.position_embedding.weight"].shape[0] - 1
    if activation == "auto":
        activation = "gelu" if width >= _GELU_FROM else "quick_gelu"
    return {
        "hidden_size": width,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count_numbered(state, "encoder.layers.", gaps=True),
        "num_attention_heads": _HEADS_OF_WIDE if width >= 1024 else max(1, width // 64),
        "projection_dim": state["visual_projection.weight"].shape[0],
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "hidden_act": activation,
    }


def _expect_equal_widths(image: int, text: int) -> None:
    if image != text:
        raise ValueError(
            f"its image tower projects to {image} values and its text tower to {text}; expected the two towers of one "
            "CLIP."
        )
