"""The map from a text encoder's width to the width a denoiser reads, and the scale of what comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import read_tensors, write_tensors
from ..generators import generator

KINDS = ("orthogonal", "truncate", "mlp")
METADATA = "retune.projection"


class Projection(nn.Module):
    """`scale * (linear(x) + mlp(x))`, (..., in_width) -> (..., width); the mlp part only for kind "mlp".

    kind "orthogonal": a semi-orthogonal matrix from generator(seed, "projection"), so that lengths (a narrower
    output: their expectation up to sqrt(width / in_width)) and angles survive. "truncate": the identity, cut or padded
    with zeros. "mlp": "orthogonal" plus a GELU layer whose output starts at zero. `scale` is a buffer, 1.0 at first.
    """

    def __init__(self, in_width: int, width: int, kind: str = "orthogonal", *, bias: bool = False, seed: int = 0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"projection is {kind!r}; expected one of {', '.join(KINDS)}")
        if in_width < 1 or width < 1:
            raise ValueError(f"projection is {in_width} -> {width}; expected positive widths")
        self.in_width, self.width, self.kind = in_width, width, kind
        self.linear = nn.Linear(in_width, width, bias=bias)
        self.register_buffer("scale", torch.tensor(1.0))
        source = generator(seed, "projection")
        if kind == "mlp":
            self.hidden = nn.Linear(in_width, in_width)
            self.output = nn.Linear(in_width, width, bias=False)
        self._initialise(source)

    @torch.no_grad()
    def _initialise(self, source: torch.Generator) -> None:
        if self.kind == "truncate":
            nn.init.eye_(self.linear.weight)
        else:
            nn.init.orthogonal_(self.linear.weight, generator=source)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
        if self.kind == "mlp":
            nn.init.normal_(self.hidden.weight, std=self.in_width**-0.5, generator=source)
            nn.init.zeros_(self.hidden.bias)
            nn.init.zeros_(self.output.weight)

    def forward(self, states: Tensor) -> Tensor:
        projected = self.linear(states)
        if self.kind == "mlp":
            projected = projected + self.output(nn.functional.gelu(self.hidden(states)))
        return projected * self.scale

    def scaled(self, factor: float) -> Projection:
        """A copy whose output is `factor` times this one's."""
        with torch.inference_mode(False):
            result = detached_copy(self)
            result.scale.copy_(self.scale.detach().clone() * factor)
        return result

    def config(self) -> dict:
        """What `from_state` needs beside the tensors."""
        bias = self.linear.bias is not None
        return {"kind": self.kind, "in_width": self.in_width, "width": self.width, "bias": bias}

    @staticmethod
    def from_state(config: Mapping, state: Mapping[str, Tensor]) -> Projection:
        """Rebuilds a projection from `config()` and its tensors. Errors: ValueError naming what does not fit."""
        try:
            result = Projection(config["in_width"], config["width"], config["kind"], bias=config["bias"])
            result.load_state_dict({name: value.float() for name, value in state.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the projection's tensors do not fit its description {dict(config)}: {error}") from error
        return result


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
