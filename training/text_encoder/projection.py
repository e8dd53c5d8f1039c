"""The map from a text encoder's width to the width a denoiser reads, and the scale of what comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.files import read_tensors, write_tensors
from ..common.rng import generator
from ..models.protocols import Conditioning
from .resampler import Resampler, hidden_width

RESAMPLERS = ("resampler", "timestep resampler")
KINDS = ("orthogonal", "truncate", "mlp", *RESAMPLERS)
BANDS = 23
"""Ranges of noise levels that a timestep resampler tells apart; ComfyUI gets one conditioning for each. A prime, so
that evenly spaced sampler steps hardly fall on a border, where ComfyUI would average two ranges."""
METADATA = "retune.projection"
PROJECTION_PREFIX = "projection."
"""Of the names of a projection's tensors in the result of a training."""


class Projection(nn.Module):
    """`scale * (linear(x) + mlp(x))`, (..., in_width) -> (..., width); the mlp part only for kind "mlp".

    kind "orthogonal": a semi-orthogonal matrix from generator(seed, "projection"), so that lengths (a narrower
    output: their expectation up to sqrt(width / in_width)) and angles survive. "truncate": the identity, cut or padded
    with zeros. "mlp": "orthogonal" plus a GELU layer whose output starts at zero. "resampler":
    `scale * linear(resampler(x))`, (B, L, in_width) -> (B, tokens, width), with `layers` blocks (see `Resampler`).
    "timestep resampler": one that knows in which of `bands` equal ranges the training timestep lies. `scale` is a
    buffer, 1.0 at first. pooled_width above 0 adds a second linear map for the pooled output (see `pool`).
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        kind: str = "orthogonal",
        *,
        bias: bool = False,
        seed: int = 0,
        pooled_width: int = 0,
        tokens: int = 64,
        layers: int = 6,
        bands: int = BANDS,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"projection is {kind!r}; expected one of {', '.join(KINDS)}")
        if in_width < 1 or width < 1 or pooled_width < 0:
            raise ValueError(f"projection is {in_width} -> {width} and {pooled_width}; expected positive widths")
        self.in_width, self.width, self.kind, self.pooled_width = in_width, width, kind, pooled_width
        hidden = hidden_width(width) if kind in RESAMPLERS else in_width
        self.bands = bands if kind == "timestep resampler" else 0
        self.linear = nn.Linear(hidden, width, bias=bias)
        self.register_buffer("scale", torch.tensor(1.0))
        if kind == "mlp":
            self.hidden = nn.Linear(in_width, in_width)
            self.output = nn.Linear(in_width, width, bias=False)
        elif kind in RESAMPLERS:
            self.resampler = Resampler(in_width, hidden, tokens=tokens, layers=layers, timed=self.bands > 0)
        if pooled_width:
            self.pooled = nn.Linear(in_width, pooled_width, bias=bias)
        self._initialise(seed)

    @property
    def tokens(self) -> int | None:
        """How many tokens come out whatever goes in; None when it is as many as go in."""
        return len(self.resampler.queries) if self.kind in RESAMPLERS else None

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        source = generator(seed, "projection")
        self._initialise_linear(self.linear, source)
        if self.kind == "mlp":
            nn.init.normal_(self.hidden.weight, std=self.in_width**-0.5, generator=source)
            nn.init.zeros_(self.hidden.bias)
            nn.init.zeros_(self.output.weight)
        elif self.kind in RESAMPLERS:
            self.resampler.initialise(source)
        if self.pooled_width:
            self._initialise_linear(self.pooled, generator(seed, "pooled projection"))

    def _initialise_linear(self, linear: nn.Linear, source: torch.Generator) -> None:
        if self.kind == "truncate":
            nn.init.eye_(linear.weight)
        else:
            nn.init.orthogonal_(linear.weight, generator=source)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, mask: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """mask: (B, L) bool, which states a resampler may read; the other kinds map every state by itself.

        time: see `project`.
        """
        if self.kind in RESAMPLERS:
            middle = self._middle(time, states) if self.bands else None
            return self.linear(self.resampler(states, mask, middle)) * self.scale
        projected = self.linear(states)
        if self.kind == "mlp":
            projected = projected + self.output(nn.functional.gelu(self.hidden(states)))
        return projected * self.scale

    def pool(self, mean: Tensor | None) -> Tensor | None:
        """(B, in_width) mean of the real tokens' states -> (B, pooled_width), not scaled; None without that map."""
        return self.pooled(mean) if self.pooled_width and mean is not None else None

    def _middle(self, time: Tensor | None, states: Tensor) -> Tensor:
        """(B,) the middle of the band that each time lies in; of the one at 1/2 without a time."""
        if time is None:
            time = torch.full((len(states),), 0.5)
        bands = (time.to(states.device, torch.float32) * self.bands).ceil().sub(1).clamp(0, self.bands - 1)
        return (bands + 0.5) / self.bands

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        """What a backbone returned (its `pooled` is the mean of the real tokens' states) -> what a denoiser hears.

        time: (B,) training timestep as a share, 0 (clean) to 1 (pure noise), that a timestep resampler hears; the
        middle without one. All tokens of a resampler are attended. `states.before` comes first, not scaled, and so does
        its pooled output.
        """
        mask = None if self.tokens else states.mask
        own = Conditioning(self(states.context, states.mask, time), self.pool(states.pooled), mask)
        return own if states.prefix is None else own.append_to(states.prefix)

    def scaled(self, factor: float) -> Projection:
        """A copy whose output is `factor` times this one's."""
        with torch.inference_mode(False):
            result = detached_copy(self)
            result.scale.copy_(self.scale.detach().clone() * factor)
        return result

    def config(self) -> dict:
        """What `from_state` needs beside the tensors."""
        bias = self.linear.bias is not None
        config = {"kind": self.kind, "in_width": self.in_width, "width": self.width, "bias": bias}
        if self.pooled_width:
            config["pooled_width"] = self.pooled_width
        if self.kind in RESAMPLERS:
            config |= {"tokens": self.tokens, "layers": len(self.resampler.blocks)}
        if self.bands:
            config["bands"] = self.bands
        return config

    @staticmethod
    def from_state(config: Mapping, state: Mapping[str, Tensor]) -> Projection:
        """Rebuilds a projection from `config()` and its tensors. Errors: ValueError naming what does not fit."""
        try:
            more = {name: config[name] for name in ("pooled_width", "tokens", "layers", "bands") if name in config}
            result = Projection(config["in_width"], config["width"], config["kind"], bias=config["bias"], **more)
            result.load_state_dict({name: value.float() for name, value in state.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the projection's tensors do not fit its description {dict(config)}: {error}") from error
        return result


def masked_mean(states: Tensor, real: Tensor) -> Tensor:
    """(B, D) mean of (B, L, D) states over the tokens where `real`, (B, L) bool, is True."""
    weights = real.to(states)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


def detached_copy(projection: Projection) -> Projection:
    """A deep copy of ordinary tensors, even of one made under `torch.inference_mode()`; shares nothing."""
    with torch.inference_mode(False), torch.no_grad():
        result = copy.deepcopy(projection)
        for module in result.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            for name, value in list(module._buffers.items()):
                module._buffers[name] = value.detach().clone()
    return result


def save_projection(path: str | Path, projection: Projection) -> None:
    """Writes a projection as safetensors; its description goes into the metadata."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in projection.state_dict().items()}
    write_tensors(path, tensors, {METADATA: json.dumps(projection.config())})


def read_projection(path: str | Path) -> Projection:
    """Reads what `save_projection` wrote. Errors: ValueError for a damaged file or one of another kind."""
    tensors, metadata = read_tensors(path)
    if METADATA not in metadata:
        raise ValueError(f"{Path(path).name} is no saved projection; expected the metadata entry {METADATA}")
    return Projection.from_state(json.loads(metadata[METADATA]), tensors)
