"""The protocol of a reward and its two implementations: a CLIP's cosine of image and prompt, and an aesthetic head.

A reward is frozen and computes in the dtype of its weights, fp32 as loaded, whatever autocast is on around it. For a
run in half precision `store_in` holds its towers in less.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import astuple
from typing import Protocol

import torch
from torch import Tensor, nn

from ..common.fingerprint import tensors_fingerprint
from ..models.recast import store_in
from .clip_towers import Towers
from .heads import head_width
from .preprocess import Preprocess, expect_finite
from .tokens import ClipTokens


class Reward(Protocol):
    """Scores of images, differentiable to their pixels."""

    name: str
    """As in logs."""
    fingerprint: str
    """Changes with weights, tokenizer and formula."""
    network: nn.Module
    """The frozen weights, to move between devices; inputs are moved to their device."""
    typical_scale: float
    """Rough standard deviation of the scores over prompts, the start of their running scale."""
    reads_prompts: bool
    """Whether the scores depend on prompts."""
    compares_images: bool
    """Whether an image's score depends on the other images of its batch, which is then never scored in parts."""
    files: tuple[str, ...]
    """Names of the files it was loaded from."""

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of (B, 3, H, W) images in 0..1, image i for prompt i; higher is better.

        Raises ValueError for images of another shape, another number of prompts, and scores that are not finite.
        """

    def image_embeddings(self, images: Tensor) -> Tensor:
        """(B, D) projected embeddings of length 1 of (B, 3, H, W) images in 0..1."""

    def store_in(self, dtype: torch.dtype) -> None:
        """Holds large weights in a dtype, in which their products are then computed; the fingerprint stays."""

    def copied_in(self, dtype: torch.dtype) -> Reward:
        """A copy that is held so, with weights of its own."""

    def checkpoint(self, enabled: bool) -> None:
        """Turns activation checkpointing on or off: less memory and more time in the backward pass."""

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        """Estimated bytes for scoring `batch` images, without the weights; gradient: with those that autograd saves."""


class _TowerReward:
    """Base of both rewards: an image tower and its preprocessing."""

    compares_images = False
    files: tuple[str, ...] = ()

    def __init__(self, name: str, network: nn.Module, towers: Towers, preprocess: Preprocess, typical_scale: float):
        self.name, self.network, self.typical_scale = name, network.eval().requires_grad_(False), typical_scale
        self._towers, self._preprocess = towers, preprocess

    @property
    def _title(self) -> str:
        """Its name and its files', for messages."""
        return title_of(self.name, self.files)

    def image_embeddings(self, images: Tensor) -> Tensor:
        weight = self._towers.weight
        with self._towers.arithmetic():
            pixels = images.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            return self._towers.image_embeddings(self._preprocess(pixels))

    def store_in(self, dtype: torch.dtype) -> None:
        store_in(self.network, dtype, lambda name: name.startswith("head."))  # small, and its scores differ little

    def copied_in(self, dtype: torch.dtype) -> Reward:
        shared = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in self.network.parameters()}
        other = copy.deepcopy(self, shared)
        other.store_in(dtype)
        return other

    def checkpoint(self, enabled: bool) -> None:
        self._towers.checkpoint(enabled)

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        return self._towers.activation_bytes(batch, gradient)

    def _fingerprint(self, *more: object) -> str:
        side, mean, std = astuple(self._preprocess)
        formula = (type(self).__name__, side, mean, std, self._towers.vision.config.hidden_act, *more)
        return tensors_fingerprint(self.network.named_parameters(), *formula)


class ClipReward(_TowerReward):
    """factor * cosine of the embeddings of an image and of its prompt."""

    reads_prompts = True

    def __init__(
        self,
        name: str,
        towers: Towers,
        tokens: ClipTokens,
        preprocess: Preprocess,
        *,
        factor: float = 1.0,
        typical_scale: float,
    ):
        super().__init__(name, towers, towers, preprocess, typical_scale)
        self._tokens, self._factor = tokens, factor
        self.fingerprint = self._fingerprint(tokens.fingerprint, tokens.pad, factor)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        expect_a_prompt_each(images, prompts)
        cosine = (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(-1)
        return expect_finite(self._title, self._factor * cosine)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) projected embeddings of length 1."""
        with self._towers.arithmetic():
            return self._towers.text_embeddings(self._tokens(prompts))


class AestheticReward(_TowerReward):
    """An aesthetic head over the image embedding. Raises ValueError for a head of another width."""

    reads_prompts = False

    def __init__(self, name: str, towers: Towers, head: nn.Module, preprocess: Preprocess, *, typical_scale: float):
        if head_width(head) != towers.width:
            raise ValueError(
                f"the image tower gives {towers.width} values and the head reads {head_width(head)}; expected equal "
                "widths: LAION's heads belong to OpenAI's ViT-L/14 (768)."
            )
        network = nn.ModuleDict({"towers": towers, "head": head})
        super().__init__(name, network, towers, preprocess, typical_scale)
        self._head = head
        self.fingerprint = self._fingerprint()

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        expect_a_prompt_each(images, prompts)
        with torch.autocast(self._towers.weight.device.type, enabled=False):
            return expect_finite(self._title, self._head(self.image_embeddings(images))[:, 0])


def title_of(name: str, files: Sequence[str]) -> str:
    """A reward's name and its files', for messages."""
    return f"{name} of {', '.join(files)}" if files else name


def expect_a_prompt_each(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless there are as many prompts as images."""
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)}"
        raise ValueError(f"prompts are {given} for {len(images)} images; expected a list with one for each image.")
