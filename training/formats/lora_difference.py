"""The difference dW that a LoRA's layer adds to a weight, and its approximation by matrices of low rank.

An SVD truncated to r singular values is the nearest matrix of rank r in the Frobenius norm (Eckart & Young 1936).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora import LoraModule
from .lora_keys import DOWN, LOHA, LOKR, MID, UP

LINEAR_KINDS = ("LoRA", "LoCon", "LoHa", "LoKr", "full diff")
"""Kinds whose dW does not depend on the weight it is added to."""


@dataclass(frozen=True)
class LowRankFactors:
    """Factors whose product up @ down is the best approximation of a matrix at their rank.

    Args:
        up: (out, r).
        down: (r, in).
        energy: Energy of the matrix: the sum of its squared singular values, which is its squared Frobenius norm.
        kept_energy: Energy of up @ down.
    """

    up: Tensor
    down: Tensor
    energy: float
    kept_energy: float


def delta_weight(module: LoraModule) -> Tensor:
    """dW of a layer as (out, in k k), fp32.

    Raises:
        ValueError: The kind is unknown, or its dW depends on the weight (DoRA, OFT).
    """
    _check_has_delta(module)
    t = {name: value.detach().float().cpu() for name, value in module.tensors.items()}
    if "diff" in t:
        return t["diff"].flatten(1)
    if DOWN in t:
        return _scale(module) * _lora_delta(t)
    if "hada_w1_a" in t:
        return _scale(module) * _loha_factor(t, "1") * _loha_factor(t, "2")
    return _lokr_delta(module, t)


def _check_has_delta(module: LoraModule) -> None:
    roles = module.tensors.keys()
    if module.kind not in LINEAR_KINDS or "set_weight" in roles or not (roles & {DOWN, "diff", *LOHA, *LOKR}):
        raise ValueError(
            f"layer {module.name} is {module.kind}, which is no difference by itself: what it does depends on the "
            "weight it is put on. Expected LoRA, LoCon, LoHa, LoKr or a full difference."
        )


def kernel_of(module: LoraModule) -> tuple[int, ...] | None:
    """Kernel of a layer's convolution by its tensors, () for a linear layer; None if all of them are flat."""
    t = module.tensors
    for name in (MID, DOWN, "diff", "hada_t1", "lokr_t2", "lokr_w2"):
        if name in t and t[name].ndim != 2:
            return tuple(t[name].shape[2:])
    return None


def truncated_svd(matrix: Tensor, rank: int | None = None, energy: float = 1.0) -> LowRankFactors:
    """Approximates a (rows, columns) matrix by two factors; each takes the square roots of the singular values.

    Signs are fixed: the largest entry of a left singular vector is positive.

    Args:
        matrix: The matrix.
        rank: Largest rank; None for no limit.
        energy: Share of the energy to keep, 0 to 1, with as few singular values as possible (at least one).
    """
    return _truncate(*torch.linalg.svd(matrix.float(), full_matrices=False), rank, energy)


def low_rank_delta(module: LoraModule, rank: int | None = None, energy: float = 1.0) -> LowRankFactors:
    """`truncated_svd` of a layer's dW; for LoRA computed from its factors, without forming dW."""
    t = module.tensors
    if module.kind not in ("LoRA", "LoCon") or MID in t or t[DOWN].shape[0] >= min(module.shape):
        return truncated_svd(delta_weight(module), rank, energy)
    up, down = (t[name].detach().float().cpu().flatten(1) for name in (UP, DOWN))
    (left, a), (right, b) = torch.linalg.qr(_scale(module) * up), torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(a @ b.T)
    return _truncate(left @ u, s, vh @ right.T, rank, energy)


def _truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int | None, energy: float) -> LowRankFactors:
    """The factors left of an SVD u diag(s) vh at this rank and share of the energy."""
    squares = s.double().square()
    total = squares.sum().item()
    enough = int((squares.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1 if energy < 1 else len(s)
    count = max(1, min(enough, rank or len(s), len(s)))
    u, s, vh = u[:, :count], s[:count], vh[:count]
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    root = s.sqrt()
    return LowRankFactors(u * signs * root, vh * signs.T * root[:, None], total, squares[:count].sum().item())


def lora_tensors(factors: LowRankFactors, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    """A LoRA layer's tensors for these factors, with alpha = rank, so that dW = up @ down."""
    rank = len(factors.down)
    down = factors.down.reshape(rank, -1, *kernel)
    up = factors.up.reshape(-1, rank, *(1 for _ in kernel))
    return {DOWN: down.contiguous(), UP: up.contiguous(), "alpha": torch.tensor(float(rank))}


def _scale(module: LoraModule) -> float:
    """alpha / rank; 1 without alpha."""
    return 1.0 if module.alpha is None else module.alpha / module.rank


def _lora_delta(t: dict[str, Tensor]) -> Tensor:
    """up @ down, with a Tucker core between them if there is one; (out, in k k)."""
    if MID not in t:
        return t[UP].flatten(1) @ t[DOWN].flatten(1)
    return torch.einsum("om,mn...,ni->oi...", t[UP].flatten(1), t[MID], t[DOWN].flatten(1)).flatten(1)


def _loha_factor(t: dict[str, Tensor], number: str) -> Tensor:
    """One of the two matrices whose Hadamard product is a LoHa's dW; (out, in k k)."""
    a, b, core = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"], t.get(f"hada_t{number}")
    return a @ b if core is None else torch.einsum("rs...,ro,si->oi...", core, a, b).flatten(1)


def _lokr_delta(module: LoraModule, t: dict[str, Tensor]) -> Tensor:
    """kron(w1, w2), scaled by alpha / rank only if a factor is low-rank, as in LyCORIS and ComfyUI."""
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second, rank = t.get("lokr_w2"), t["lokr_w1_b"].shape[0] if "lokr_w1_b" in t else None
    if second is None:
        a, b, core = t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2")
        second, rank = a @ b if core is None else torch.einsum("rs...,ro,si->oi...", core, a, b), b.shape[0]
    columns = first.shape[1] * second.shape[1]
    kernel = second.shape[2:]
    product = torch.kron(first, second.flatten(1)) if not kernel else _kron(first, second, columns)
    return product * (module.alpha / rank if rank and module.alpha is not None else 1.0)


def _kron(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """Kronecker product over the first two axes; (rows, columns k k)."""
    product = torch.einsum("pq,rsk->prqsk", first, second.flatten(2))
    return product.reshape(first.shape[0] * second.shape[0], columns * math.prod(second.shape[2:]))
