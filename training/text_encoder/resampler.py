"""A fixed number of tokens out of any number of states, as ELLA's connector makes them; it may know the timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

HEAD_WIDTH = 64
FEATURES = 320
"""Of a point in time, as in Stable Diffusion's UNet and in ELLA."""


class Resampler(nn.Module):
    """(B, L, in_width) states -> (B, tokens, hidden): learned queries that read the states, layer by layer.

    The perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 3.1.1) as ELLA uses it (Hu et
    al. 2024, arXiv 2403.05135, section 3.1): blocks of pre-norm cross-attention over states and queries, and a
    feed-forward layer; a LayerNorm at the end. timed: what the LayerNorms of the blocks give is shifted and scaled by
    a function of the time, as in ELLA; it begins as the same resampler without.
    """

    def __init__(self, in_width: int, hidden: int, *, tokens: int, layers: int, timed: bool = False):
        super().__init__()
        if tokens < 1 or layers < 1:
            raise ValueError(f"resampler has {tokens} tokens and {layers} layers; expected at least 1 of each")
        self.queries = nn.Parameter(torch.zeros(tokens, hidden))
        self.input = nn.Linear(in_width, hidden)
        self.blocks = nn.ModuleList(ResamplerBlock(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.time = TimeEmbedding(hidden, layers) if timed else None

    @torch.no_grad()
    def initialise(self, source: torch.Generator) -> None:
        """Linear maps keep the size of what enters (std 1/sqrt(fan in)); queries begin small, so that text decides."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5, generator=source)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=source)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.time is not None:
            nn.init.zeros_(self.time.modulation.weight)

    def forward(self, states: Tensor, mask: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """mask: (B, L) bool, True for states that may be read; None means all. time: (B,) in 0..1, for a timed one."""
        states = self.input(states)
        queries = self.queries.expand(len(states), -1, -1)
        modulations = [None] * len(self.blocks) if self.time is None else self.time(time)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            queries = block(queries, states, mask, modulation)
        return self.norm(queries)


class TimeEmbedding(nn.Module):
    """(B,) time in 0..1 -> for each block a shift and a scale of its three LayerNorms, (B, 3, 2, width).

    Sinusoidal features of 1000 t (Vaswani et al. 2017, arXiv 1706.03762, section 3.5; cosines first, as in Stable
    Diffusion), a hidden layer, and one linear map for all blocks: DiT's adaLN-zero (arXiv 2212.09748) without gates.
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks, self.width = blocks, width
        self.hidden, self.output = nn.Linear(FEATURES, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, blocks * 3 * 2 * width)

    def forward(self, time: Tensor) -> list[Tensor]:
        rates = torch.exp(-math.log(10000) * torch.arange(FEATURES // 2, device=time.device) / (FEATURES // 2))
        angles = 1000 * time.float()[:, None] * rates
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.hidden.weight.dtype)
        embedded = self.output(silu(self.hidden(features)))
        return list(self.modulation(silu(embedded)).unflatten(-1, (self.blocks, 3, 2, self.width)).unbind(1))


class ResamplerBlock(nn.Module):
    """Cross-attention and a feed-forward layer of four times the width, each behind a LayerNorm, added to its input."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm_states, self.norm_queries, self.norm_hidden = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """modulation: (B, 3, 2, width), shift and scale of the normed states, queries and hidden values."""
        of_states, of_queries, of_hidden = [None] * 3 if modulation is None else modulation.unbind(1)
        states, own = _moved(self.norm_states(states), of_states), _moved(self.norm_queries(queries), of_queries)
        queries = queries + self._attention(own, states, mask)
        return queries + self.narrow(gelu(self.widen(_moved(self.norm_hidden(queries), of_hidden))))

    def _attention(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        read = torch.cat([states, queries], dim=1)
        q, k, v = self._split(self.to_q(queries)), self._split(self.to_k(read)), self._split(self.to_v(read))
        if mask is not None:
            mask = nn.functional.pad(mask, (0, queries.shape[1]), value=True)[:, None, None]
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(found.transpose(1, 2).flatten(2))

    def _split(self, values: Tensor) -> Tensor:
        """(B, L, width) -> (B, heads, L, width / heads)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _moved(values: Tensor, modulation: Tensor | None) -> Tensor:
    """(B, L, width) values, shifted and scaled by (B, 2, width)."""
    if modulation is None:
        return values
    shift, scale = modulation.unbind(1)
    return values * (1 + scale[:, None]) + shift[:, None]


def hidden_width(width: int) -> int:
    """Inner width for an output width: the same, at most ELLA's 768, a multiple of the heads' width where it can."""
    hidden = min(width, 768)
    return hidden - hidden % HEAD_WIDTH if hidden > HEAD_WIDTH else hidden
