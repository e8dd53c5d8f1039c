"""How different images are from each other: the measure of a collapse, which no reward shows."""

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
    """vendi: 1 (all alike) to `count` (all different). distance: mean 1 - cosine of pairs, 0..2. lpips: mean over
    pairs, or None where its package or weights are not installed."""

    count: int
    vendi: float
    distance: float
    lpips: float | None = None

    @classmethod
    def of(cls, embeddings: Tensor, lpips: float | None = None) -> Diversity:
        """Of (n, D) embeddings of length 1, n >= 2."""
        return cls(len(embeddings), vendi_score(embeddings), mean_pairwise_distance(embeddings), lpips)

    @property
    def spread(self) -> float:
        """(vendi - 1) / (count - 1): 0 (all alike) to 1, in which a loss shows where vendi itself stays near 1."""
        return (self.vendi - 1) / (self.count - 1)

    def text(self) -> str:
        lpips = "left out (package or weights not installed)" if self.lpips is None else f"{self.lpips:.4f}"
        return (
            f"{self.count} images\nVendi score: {self.vendi:.3f} (1: all alike, {self.count}: all different)\n"
            f"mean pairwise distance (1 - cosine): {self.distance:.4f}\nmean pairwise LPIPS: {lpips}"
        )


@torch.no_grad()
def diversity(images: Tensor, reward: Reward, lpips: bool = True) -> Diversity:
    """Of (N, 3, H, W) images in 0..1, on the reward's image tower; lpips: also that, where it can be.

    One prompt's images tell how varied the model is; those of many prompts, mostly how varied the prompts are. Errors:
    ValueError for fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"images are {len(images)}; expected two or more to compare.")
    embeddings = torch.cat([reward.image_embeddings(batch) for batch in images.split(BATCH)])
    return Diversity.of(embeddings, lpips_distance(images) if lpips else None)


def vendi_score(embeddings: Tensor) -> float:
    """exp(-sum l log l) over the eigenvalues l of K / n, K the cosines of (n, D) embeddings of length 1, in float64.

    Friedman & Dieng 2022, arXiv 2210.02410: the effective number of different items, 1 to n.
    """
    vectors = embeddings.detach().double().cpu()
    values = torch.linalg.eigvalsh(vectors @ vectors.T / len(vectors)).clamp(min=0)
    return torch.special.entr(values).sum().exp().item()


def mean_pairwise_distance(embeddings: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of (n, D) embeddings of length 1, n >= 2."""
    vectors = embeddings.detach().double().cpu()
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
