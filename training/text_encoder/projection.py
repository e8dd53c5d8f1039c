"""Projections from a text encoder's width to the width that a denoiser's cross-attention reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import write_tensors
from ..common.foreign import count_numbered, metadata_json, read_tensors, reading, whole_number
from ..common.rng import generator
from ..common.transfer import upload
from ..models.protocols import Conditioning
from .resampler import Resampler, hidden_width

RESAMPLERS = ("resampler", "timestep resampler")
KINDS = ("orthogonal", "truncate", "mlp", *RESAMPLERS)
BANDS = 23
"""Number of timestep ranges of a timestep resampler; ComfyUI gets one conditioning for each. It is a prime, so that
evenly spaced sampler steps rarely fall on a border, where ComfyUI would average two ranges."""
METADATA = "retune.projection"
"""Metadata entry with the config, as JSON."""
PROJECTION_PREFIX = "projection."
"""Of the names of a projection's tensors in the result of a training."""


class Projection(nn.Module):
    """Projects text encoder states: `scale * (linear(x) + mlp(x))`, (..., in_width) -> (..., width).

    Kinds:
        "orthogonal": only `linear`, a random semi-orthogonal matrix, which preserves lengths (for a narrower output in
            expectation, up to the factor sqrt(width / in_width)) and angles.
        "truncate": only `linear`, the identity, cut or padded with zeros.
        "mlp": "orthogonal" plus an MLP with GELU whose output layer starts at zero.
        "resampler": `scale * linear(resampler(x))`, (B, L, in_width) -> (B, tokens, width), see `Resampler`.
        "timestep resampler": a resampler conditioned on the training timestep, in `bands` equal ranges.

    `scale` is a buffer, initially 1.

    Args:
        in_width: Width of the text encoder.
        width: Width that the denoiser reads.
        kind: One of KINDS.
        bias: Whether the linear maps have a bias.
        seed: Seed of the initial weights.
        pooled_width: If above 0, adds a linear map for the pooled output (see `pool`).
        tokens: Number of output tokens of a resampler.
        layers: Number of blocks of a resampler.
        bands: Number of timestep ranges of a timestep resampler.

    Raises:
        ValueError: The kind is unknown or a width is not positive.
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
            self.resampler = Resampler(in_width, hidden, tokens=tokens, layers=layers, has_time=self.bands > 0)
        if pooled_width:
            self.pooled = nn.Linear(in_width, pooled_width, bias=bias)
        self._initialise(seed)

    @property
    def tokens(self) -> int | None:
        """Fixed number of output tokens (of a resampler); None if there are as many as input tokens."""
        return len(self.resampler.queries) if self.kind in RESAMPLERS else None

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Draws all weights from generator(seed, "projection"); the pooled map has a generator of its own."""
        if self.linear.weight.is_meta:  # weights follow from a file
            return
        random = generator(seed, "projection")
        self._initialise_linear(self.linear, random)
        if self.kind == "mlp":
            nn.init.normal_(self.hidden.weight, std=self.in_width**-0.5, generator=random)
            nn.init.zeros_(self.hidden.bias)
            nn.init.zeros_(self.output.weight)
        elif self.kind in RESAMPLERS:
            self.resampler.initialise(random)
        if self.pooled_width:
            self._initialise_linear(self.pooled, generator(seed, "pooled projection"))

    def _initialise_linear(self, linear: nn.Linear, random: torch.Generator) -> None:
        if self.kind == "truncate":
            nn.init.eye_(linear.weight)
        else:
            nn.init.orthogonal_(linear.weight, generator=random)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, mask: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Projects states, see the class.

        Args:
            states: (..., in_width); for a resampler (B, L, in_width).
            mask: (B, L) bool, the states that a resampler attends to; other kinds map each state on its own.
            time: See `project`.
        """
        if self.kind in RESAMPLERS:
            band_center = self._band_center(time, states) if self.bands else None
            return self.linear(self.resampler(states, mask, band_center)) * self.scale
        projected = self.linear(states)
        if self.kind == "mlp":
            projected = projected + self.output(nn.functional.gelu(self.hidden(states)))
        return projected * self.scale

    def pool(self, mean: Tensor | None) -> Tensor | None:
        """Pooled output (B, pooled_width), unscaled, from the states' mean (B, in_width); None without such a map."""
        return self.pooled(mean) if self.pooled_width and mean is not None else None

    def _band_center(self, time: Tensor | None, states: Tensor) -> Tensor:
        """(B,) center of the timestep range that each time is in; without a time, of the range around 1/2."""
        if time is None:
            time = torch.full((len(states),), 0.5)
        bands = (upload(time.float(), states.device) * self.bands).ceil().sub(1).clamp(0, self.bands - 1)
        return (bands + 0.5) / self.bands

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        """The conditioning for a denoiser from a text encoder's states.

        Args:
            states: The backbone's output; its `pooled` is the mean of the prompt's states. `states.prefix` precedes the
                result, unscaled, with its pooled output.
            time: (B,) training timestep from 0 (clean) to 1 (pure noise) for a timestep resampler; default 1/2.

        Returns:
            The conditioning, without a mask for a resampler.
        """
        mask = None if self.tokens else states.mask
        projected = Conditioning(self(states.context, states.mask, time), self.pool(states.pooled), mask)
        return projected if states.prefix is None else projected.append_to(states.prefix)

    def scaled(self, factor: float) -> Projection:
        """A copy with its output multiplied by `factor`."""
        with torch.inference_mode(False):
            result = detached_copy(self)
            result.scale.copy_(self.scale.detach().clone() * factor)
        return result

    def config(self) -> dict:
        """The arguments that `from_state` needs in addition to the state dict."""
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
        """Rebuilds a projection from its `config()` and state dict.

        Raises ValueError if they do not match, and for weights that are NaN or infinite.
        """
        try:
            with torch.device("meta"):  # nothing of the described size is made before the shapes are compared
                result = Projection(**_arguments(config, state))
            _expect_shapes(result, state)
        except (KeyError, ValueError) as error:
            about = f"{dict(config)}"[:300]
            raise ValueError(f"the projection's tensors do not fit its description {about}: {error}") from error
        result.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)
        return result


def _arguments(config: Mapping, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `Projection` in a description. KeyError or ValueError for a wrong one, or too many layers."""
    least = {"in_width": 1, "width": 1, "pooled_width": 0, "tokens": 1, "layers": 1, "bands": 0}
    sizes = {name: whole_number(config[name], name, low) for name, low in least.items() if name in config}
    layers = count_numbered(state, "resampler.blocks.")
    if config["kind"] in RESAMPLERS and sizes.get("layers", layers) != layers:
        raise ValueError(f"layers is {sizes['layers']}; expected {layers}, as its tensors have it")
    sizes |= {"in_width": sizes["in_width"], "width": sizes["width"]}
    return sizes | {"kind": config["kind"], "bias": bool(config["bias"])}


def _expect_shapes(projection: Projection, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a state dict has the names and shapes of a projection, and finite numbers."""
    for name in sorted(projection.state_dict().keys() ^ state.keys()):
        raise ValueError(f"{name} is {'not described' if name in state else 'missing'}; expected equal names")
    for name, value in projection.state_dict().items():
        if value.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}; expected {tuple(value.shape)}")
        if not state[name].is_floating_point() or not state[name].isfinite().all():
            raise ValueError(f"{name} holds NaN, infinity or whole numbers; expected finite numbers. Train it again")


def masked_mean(states: Tensor, real: Tensor) -> Tensor:
    """Mean (B, D) of states (B, L, D) over the tokens where `real` (B, L) is True."""
    weights = real.to(states)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


def detached_copy(projection: Projection) -> Projection:
    """A deep copy with ordinary tensors, even of a projection made under `torch.inference_mode()`."""
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
    """Writes a projection as safetensors, with its config in the metadata."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in projection.state_dict().items()}
    write_tensors(path, tensors, {METADATA: json.dumps(projection.config())})


def read_projection(path: str | Path) -> Projection:
    """Reads a file written by `save_projection`. Raises ValueError for a damaged file or one of another kind."""
    tensors, metadata = read_tensors(path)
    if METADATA not in metadata:
        raise ValueError(f"{Path(path).name} is no saved projection; expected the metadata entry {METADATA}")
    with reading(path, advice="Save the projection again."):
        return Projection.from_state(metadata_json(metadata, METADATA), tensors)
