"""How different images are from each other: measures of a collapse, which no reward detects."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .reward import Reward

BATCH = 16
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
"""torchvision's file of the network that LPIPS compares features of."""


@dataclass(frozen=True)
class Diversity:
    """Measures of the diversity of a set of images."""

    count: int
    """Number of images."""
    vendi: float
    """Vendi score: 1 (all equal) to `count` (all different)."""
    distance: float
    """Mean of 1 - cosine over pairs, 0..2."""
    lpips: float | None = None
    """Mean LPIPS over pairs; None where its package or weights are not installed."""

    @classmethod
    def of(cls, embeddings: Tensor, lpips: float | None = None) -> Diversity:
        """The diversity of (n, D) embeddings of length 1, n >= 2."""
        return cls(len(embeddings), vendi_score(embeddings), mean_pairwise_distance(embeddings), lpips)

    @property
    def spread(self) -> float:
        """(vendi - 1) / (count - 1), 0 (all equal) to 1; unlike vendi it falls to 0 however few images there are."""
        return (self.vendi - 1) / (self.count - 1)

    def text(self) -> str:
        """The measures for people, one a line."""
        lpips = "left out (package or weights not installed)" if self.lpips is None else f"{self.lpips:.4f}"
        return (
            f"{self.count} images\nVendi score: {self.vendi:.3f} (1: all alike, {self.count}: all different)\n"
            f"mean pairwise distance (1 - cosine): {self.distance:.4f}\nmean pairwise LPIPS: {lpips}"
        )


@torch.no_grad()
def diversity(images: Tensor, reward: Reward, lpips: bool = True) -> Diversity:
    """The diversity of images, by the embeddings of a reward's image tower.

    Images of one prompt measure the model's variety; images of many prompts mostly that of the prompts.

    Args:
        images: (N, 3, H, W) in 0..1.
        reward: has the image tower.
        lpips: whether LPIPS is measured too, where it is installed.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"images are {len(images)}; expected two or more to compare.")
    embeddings = torch.cat([reward.image_embeddings(batch) for batch in images.split(BATCH)])
    return Diversity.of(embeddings, lpips_distance(images) if lpips else None)


def vendi_score(embeddings: Tensor) -> float:
    """Effective number of different items, 1 to n, of (n, D) embeddings of length 1 (Friedman & Dieng 2022, arXiv
    2210.02410): exp(-sum l log l) over the eigenvalues l of K / n, with K their cosines; in float64."""
    vectors = embeddings.detach().cpu().double()
    values = torch.linalg.eigvalsh(vectors @ vectors.T / len(vectors)).clamp(min=0)
    return torch.special.entr(values).sum().exp().item()


def mean_pairwise_distance(embeddings: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of (n, D) embeddings of length 1, n >= 2."""
    vectors = embeddings.detach().cpu().double()
    count = len(vectors)
    others = (vectors @ vectors.T).sum() - vectors.square().sum()
    return 1 - (others / (count * (count - 1))).item()


@torch.no_grad()
def lpips_distance(images: Tensor) -> float | None:
    """Mean LPIPS (Zhang et al. 2018, arXiv 1801.03924; AlexNet) over all pairs of images in 0..1; None where its
    package or weights are not installed: nothing is downloaded."""
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    if importlib.util.find_spec("lpips") is None or not backbone.is_file():
        return None
    network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    images = images.detach().float().cpu() * 2 - 1
    pairs = torch.combinations(torch.arange(len(images)), 2).split(BATCH)
    total = sum(network(images[a], images[b]).sum().item() for a, b in (pair.T for pair in pairs))
    return total / (len(images) * (len(images) - 1) / 2)
