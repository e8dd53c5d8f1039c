"""A fixed number of tokens out of any number of states, as ELLA's connector makes them (without its timestep input)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

HEAD_WIDTH = 64


class Resampler(nn.Module):
    """(B, L, in_width) states -> (B, tokens, hidden): learned queries that read the states, layer by layer.

    The perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 3.1.1) as ELLA uses it (Hu et
    al. 2024, arXiv 2403.05135, section 3.1): blocks of pre-norm cross-attention over states and queries, and a
    feed-forward layer; a LayerNorm at the end.
    """

    def __init__(self, in_width: int, hidden: int, *, tokens: int, layers: int):
        super().__init__()
        if tokens < 1 or layers < 1:
            raise ValueError(f"resampler has {tokens} tokens and {layers} layers; expected at least 1 of each")
        self.queries = nn.Parameter(torch.zeros(tokens, hidden))
        self.input = nn.Linear(in_width, hidden)
        self.blocks = nn.ModuleList(ResamplerBlock(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    @torch.no_grad()
    def initialise(self, source: torch.Generator) -> None:
        """Linear maps keep the size of what enters (std 1/sqrt(fan in)); queries begin small, so that text decides."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5, generator=source)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=source)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, L) bool, True for states that may be read; None means all."""
        states = self.input(states)
        queries = self.queries.expand(len(states), -1, -1)
        for block in self.blocks:
            queries = block(queries, states, mask)
        return self.norm(queries)


class ResamplerBlock(nn.Module):
    """Cross-attention and a feed-forward layer of four times the width, each behind a LayerNorm, added to its input."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm_states, self.norm_queries, self.norm_hidden = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        queries = queries + self._attention(self.norm_queries(queries), self.norm_states(states), mask)
        return queries + self.narrow(gelu(self.widen(self.norm_hidden(queries))))

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


def hidden_width(width: int) -> int:
    """Inner width for an output width: the same, at most ELLA's 768, a multiple of the heads' width where it can."""
    hidden = min(width, 768)
    return hidden - hidden % HEAD_WIDTH if hidden > HEAD_WIDTH else hidden
