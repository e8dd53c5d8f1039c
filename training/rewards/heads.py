"""Aesthetic heads: small networks over a CLIP's image embedding, LAION's and the demo model's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

PLAIN_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers of `sac+logos+ava1-l14-linearMSE` in its nn.Sequential, with dropouts between them."""
RELU_LAYERS = (0, 3, 6, 9, 11)
"""Likewise of `sac+logos+ava1-l14-reluMSE`."""
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)")


def read_head(state: Mapping[str, Tensor]) -> nn.Module:
    """A frozen head in fp32 from a file's tensors: (B, D) embeddings of length 1 to (B, 1) scores.

    Reads LAION's V2 (`layers.{0,2,4,6,7}`: five linear layers without activation, folded into one), its variant with
    ReLU (`layers.{0,3,6,9,11}`), and a single linear layer (`weight`, `bias`: V1, the demo). Raises ValueError for
    other tensors.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers and state.keys() >= {"weight", "bias"}:
        layers = {0: {"weight": state["weight"], "bias": state["bias"]}}
    indices = tuple(sorted(layers))
    if indices not in (PLAIN_LAYERS, RELU_LAYERS, (0,)) or any(len(layer) < 2 for layer in layers.values()):
        raise ValueError(
            "it holds no aesthetic head; expected layers.0.weight and on (LAION's V2), or weight and bias alone (V1)."
        )
    linear = [_linear(layers[index]["weight"], layers[index]["bias"]) for index in indices]
    for before, after in itertools.pairwise(linear):
        if before.out_features != after.in_features:
            raise ValueError(f"its layers give {before.out_features} and read {after.in_features}; expected the same.")
    if indices == RELU_LAYERS:
        steps = [step for layer in linear for step in (layer, nn.ReLU())][:-1]
        head: nn.Module = nn.Sequential(*steps)
    else:
        head = folded(linear)
    if linear[-1].out_features != 1:
        raise ValueError(f"its head gives {linear[-1].out_features} values an image; expected 1.")
    return head.float().eval().requires_grad_(False)


def head_width(head: nn.Module) -> int:
    """Width of the embedding that a head reads."""
    return next(layer for layer in head.modules() if isinstance(layer, nn.Linear)).in_features


@torch.no_grad()
def folded(layers: list[nn.Linear]) -> nn.Linear:
    """One linear layer equal to several applied in turn: W = Wn ... W1, b = Wn(... W2 b1 + b2 ...) + bn, in float64."""
    weight, bias = layers[0].weight.double(), layers[0].bias.double()
    for layer in layers[1:]:
        weight = layer.weight.double() @ weight
        bias = layer.weight.double() @ bias + layer.bias.double()
    return _linear(weight, bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of these values. Raises ValueError unless they fit each other and are finite numbers."""
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or not weight.numel():
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(
            f"its weight and bias have shapes {shapes}; expected a matrix and a value for each of its rows."
        )
    if not all(part.is_floating_point() and part.isfinite().all() for part in (weight, bias)):
        raise ValueError("its head holds NaN, infinity or whole numbers; expected finite numbers.")
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer
