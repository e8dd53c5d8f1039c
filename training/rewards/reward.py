"""What a reward is, and the two kinds there are: likeness of image and prompt by a CLIP, and a head on its image tower.

A reward is frozen and computes in the dtype of its weights, fp32 as loaded, whatever autocast is on around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..common.fingerprint import tensors_fingerprint
from .clip_towers import Towers
from .heads import head_width
from .preprocess import View, expect_finite
from .tokens import ClipTokens


class Reward(Protocol):
    """Scores of images, differentiable to their pixels.

    name: as logs show it. fingerprint: changes with weights, tokenizer and formula. network: its frozen weights, to
    move between devices; inputs are brought to where it is. typical_scale: rough standard deviation of its scores over
    prompts, from which `combined` starts its normalisation. reads_prompts: whether its scores depend on them. files:
    names of the files it was read from.
    """

    name: str
    fingerprint: str
    network: nn.Module
    typical_scale: float
    reads_prompts: bool
    files: tuple[str, ...]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of (B, 3, H, W) images in 0..1, image i by prompt i; a higher one is better.

        Errors: ValueError for another shape, as many prompts as not images, and scores that are no numbers.
        """

    def image_embeddings(self, images: Tensor) -> Tensor:
        """(B, D) projected embeddings of length 1 of (B, 3, H, W) images in 0..1."""

    def checkpoint(self, enabled: bool) -> None:
        """Trades time for memory in the backward pass."""

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        """Bytes that scoring `batch` images takes beside the weights; gradient: with what autograd keeps."""


class _TowerReward:
    """What both kinds share: an image tower and what it looks at."""

    files: tuple[str, ...] = ()

    def __init__(self, name: str, network: nn.Module, towers: Towers, view: View, typical_scale: float):
        self.name, self.network, self.typical_scale = name, network.eval().requires_grad_(False), typical_scale
        self._towers, self._view = towers, view

    def image_embeddings(self, images: Tensor) -> Tensor:
        with torch.autocast(self._towers.weight.device.type, enabled=False):
            return self._towers.image_embeddings(self._view(images.to(self._towers.weight)))

    def checkpoint(self, enabled: bool) -> None:
        self._towers.checkpoint(enabled)

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        return self._towers.activation_bytes(batch, gradient)

    def _fingerprint(self, *more: object) -> str:
        view = self._view
        about = (type(self).__name__, view.side, view.mean, view.std, self._towers.vision.config.hidden_act, *more)
        return tensors_fingerprint(self.network.named_parameters(), *about)


class ClipReward(_TowerReward):
    """factor x cosine of an image's and its prompt's embedding."""

    reads_prompts = True

    def __init__(
        self, name: str, towers: Towers, tokens: ClipTokens, view: View, *, factor: float = 1.0, typical_scale: float
    ):
        super().__init__(name, towers, towers, view, typical_scale)
        self._tokens, self._factor = tokens, factor
        self.fingerprint = self._fingerprint(tokens.fingerprint, tokens.pad, factor)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        expect_a_prompt_each(images, prompts)
        cosine = (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(-1)
        return expect_finite(self.name, self._factor * cosine)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) projected embeddings of length 1."""
        with torch.autocast(self._towers.weight.device.type, enabled=False):
            return self._towers.text_embeddings(self._tokens(prompts))


class AestheticReward(_TowerReward):
    """A head on the image embedding. ValueError for a head of another width."""

    reads_prompts = False

    def __init__(self, name: str, towers: Towers, head: nn.Module, view: View, *, typical_scale: float):
        if head_width(head) != towers.width:
            raise ValueError(
                f"the image tower gives {towers.width} values and the head reads {head_width(head)}; expected equal "
                "widths: LAION's heads belong to OpenAI's ViT-L/14 (768)."
            )
        network = nn.ModuleDict({"towers": towers, "head": head})
        super().__init__(name, network, towers, view, typical_scale)
        self._head = head
        self.fingerprint = self._fingerprint()

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        expect_a_prompt_each(images, prompts)
        with torch.autocast(self._towers.weight.device.type, enabled=False):
            return expect_finite(self.name, self._head(self.image_embeddings(images))[:, 0])


def expect_a_prompt_each(images: Tensor, prompts: Sequence[str]) -> None:
    """ValueError unless there are as many prompts as images."""
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)}"
        raise ValueError(f"prompts are {given} for {len(images)} images; expected a list with one for each image.")
