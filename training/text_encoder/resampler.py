"""A perceiver resampler: any number of states to a fixed number of tokens, optionally conditioned on the timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

HEAD_WIDTH = 64
TIME_FEATURES = 320
"""Number of sinusoidal features of the timestep, as in Stable Diffusion's UNet and in ELLA."""


class Resampler(nn.Module):
    """Perceiver resampler: learned queries attend to states, (B, L, in_width) -> (B, tokens, hidden).

    Flamingo's (Alayrac et al. 2022, arXiv 2204.14198, section 3.1.1) as ELLA uses it (Hu et al. 2024, arXiv 2403.05135,
    section 3.1): each block has pre-norm cross-attention over states and queries and a feed-forward layer; a LayerNorm
    comes last.

    Args:
        in_width: Width of the states.
        hidden: Width of the output.
        tokens: Number of queries.
        layers: Number of blocks.
        has_time: Shift and scale the outputs of the blocks' LayerNorms by a function of the timestep, as in ELLA. The
            function is initially 0, so that the resampler starts as one without it.
    """

    def __init__(self, in_width: int, hidden: int, *, tokens: int, layers: int, has_time: bool = False):
        super().__init__()
        if tokens < 1 or layers < 1:
            raise ValueError(f"resampler has {tokens} tokens and {layers} layers; expected at least 1 of each")
        self.queries = nn.Parameter(torch.zeros(tokens, hidden))
        self.input = nn.Linear(in_width, hidden)
        self.blocks = nn.ModuleList(ResamplerBlock(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.time = TimeEmbedding(hidden, layers) if has_time else None

    @torch.no_grad()
    def initialise(self, random: torch.Generator) -> None:
        """Draws the weights with std 1/sqrt(fan in), which preserves the std; queries are small next to the states."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5, generator=random)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=random)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.time is not None:
            nn.init.zeros_(self.time.modulation.weight)

    def forward(self, states: Tensor, mask: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Resamples states, see the class.

        Args:
            states: (B, L, in_width).
            mask: (B, L) bool, the states to attend to; None for all.
            time: (B,) timestep in 0..1; required with `has_time`.
        """
        states = self.input(states)
        queries = self.queries.expand(len(states), -1, -1)
        modulations = [None] * len(self.blocks) if self.time is None else self.time(time)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            queries = block(queries, states, mask, modulation)
        return self.norm(queries)


class TimeEmbedding(nn.Module):
    """Timestep embedding: (B,) time in 0..1 -> per block shift and scale of its three LayerNorms, (B, 3, 2, width).

    Sinusoidal features of 1000 t (Vaswani et al. 2017, arXiv 1706.03762, section 3.5; cosines first, as in Stable
    Diffusion), an MLP, and one linear map for all blocks: DiT's adaLN-zero (arXiv 2212.09748) without gates.
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks, self.width = blocks, width
        self.hidden, self.output = nn.Linear(TIME_FEATURES, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, blocks * 3 * 2 * width)

    def forward(self, time: Tensor) -> list[Tensor]:
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time.device) / half)
        angles = 1000 * time.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.hidden.weight.dtype)
        embedded = self.output(silu(self.hidden(features)))
        return list(self.modulation(silu(embedded)).unflatten(-1, (self.blocks, 3, 2, self.width)).unbind(1))


class ResamplerBlock(nn.Module):
    """Pre-norm cross-attention and a feed-forward layer of four times the width, both with residual connections."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm_states, self.norm_queries, self.norm_hidden = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """Updates the queries (B, tokens, width).

        Args:
            queries: (B, tokens, width).
            states: (B, L, width).
            mask: (B, L) bool, the states to attend to; None for all.
            modulation: (B, 3, 2, width), shift and scale after the LayerNorms of states, queries and hidden values.
        """
        for_states, for_queries, for_hidden = [None] * 3 if modulation is None else modulation.unbind(1)
        states = _modulate(self.norm_states(states), for_states)
        normed = _modulate(self.norm_queries(queries), for_queries)
        queries = queries + self._attention(normed, states, mask)
        return queries + self.narrow(gelu(self.widen(_modulate(self.norm_hidden(queries), for_hidden))))

    def _attention(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Multi-head attention of the queries over states and queries."""
        inputs = torch.cat([states, queries], dim=1)
        q, k, v = (self._split_heads(x) for x in (self.to_q(queries), self.to_k(inputs), self.to_v(inputs)))
        if mask is not None:
            mask = nn.functional.pad(mask, (0, queries.shape[1]), value=True)[:, None, None]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, values: Tensor) -> Tensor:
        """(B, L, width) -> (B, heads, L, width / heads)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _modulate(values: Tensor, modulation: Tensor | None) -> Tensor:
    """values * (1 + scale) + shift, (B, L, width); `modulation` (B, 2, width) has shift and scale."""
    if modulation is None:
        return values
    shift, scale = modulation.unbind(1)
    return values * (1 + scale[:, None]) + shift[:, None]


def hidden_width(width: int) -> int:
    """Width of a resampler for an output width: the same up to ELLA's 768, rounded down to whole attention heads."""
    hidden = min(width, 768)
    return hidden - hidden % HEAD_WIDTH if hidden > HEAD_WIDTH else hidden
