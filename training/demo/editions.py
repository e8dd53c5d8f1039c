"""The demo models that versions of this package shipped: which of them a model, a LoRA, a word or a run belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..common.fingerprint import tensors_fingerprint, tensors_sketch

BASE = "retune.base"
"""Metadata key of saved files: the fingerprint of the UNet that they were made with."""
CONV_IN = "input_blocks.0.0.weight"
"""The weight of a UNet, by its original name, that tells the demo models apart."""
_NEAR = 0.5
"""Largest distance from a demo model's sketch, relative to its largest value: training moves the weight by less."""


@dataclass(frozen=True)
class Edition:
    """A demo model as one or more versions shipped it.

    Args:
        name: What messages call it.
        unet: Fingerprint of its UNet, as runs record it (`Denoiser.fingerprint`).
        vaes: Fingerprints of its autoencoder, as runs on the command line and in ComfyUI record them.
        tokens: `tensors_fingerprint` of the token embeddings of its CLIP and of its T5s.
        conv_in: Values of `tensors_sketch` of the UNet's `CONV_IN`.
    """

    name: str
    unet: str
    vaes: tuple[str, str]
    tokens: tuple[str, ...]
    conv_in: tuple[float, ...]


EDITIONS = (
    Edition(
        "the demo model of versions 0.1 to 0.3",
        unet="ee2e97ad86ce5e00b1c5de4bcd4e2f78",
        vaes=("2b99b99bc7d79abe6673f838b3b7492f", "35b363a9464f0946eb3e5a645fd499f6"),
        tokens=("b51296b2fed44f193458ac2f44715893", "22bad7b0086ec8669010d3c11cc91e78"),
        conv_in=(-0.0403, 0.1177, -0.0355, -0.0094, -0.124, 0.0788, -0.092, -0.0415),
    ),
    Edition(
        "the demo model of version 0.4",
        unet="60a27d9cad72b6af17e4e5c2b42929f1",
        vaes=("1318c81e04847e1c5ac05382edf8fde8", "949eff25956983638adf6553053ab9d6"),
        tokens=(
            "8df7c9b6881523eea9f09de584cc287d",
            "8b371a749838c8623d8102b090dcf8bf",  # T5 of 0.4.0
            "ce137293370d64c19f0ee44bf47d03db",
        ),
        conv_in=(-0.0379, 0.0748, -0.0668, -0.0801, -0.1471, 0.0453, -0.1356, -0.0631),
    ),
)
"""The oldest first; the last one is shipped."""


def edition_of_tokens(table: Tensor) -> str:
    """The name of the demo model whose CLIP or T5 has these token embeddings (V, D); "" for other models."""
    if table.shape[0] > 2000:  # a real text encoder's, whose numbers need not be read
        return ""
    found = tensors_fingerprint([("", table)])
    return next((edition.name for edition in EDITIONS if found in edition.tokens), "")


def edition_of_unet(conv_in: Tensor | None) -> str:
    """The name of the demo model whose UNet this is, trained further or not; "" for others. conv_in: its `CONV_IN`."""
    if conv_in is None or tuple(conv_in.shape) != (64, 4, 3, 3):
        return ""
    values = tensors_sketch([("", conv_in)])[""][1]

    def distance(edition: Edition) -> float:
        largest = max(map(abs, edition.conv_in))
        return max(abs(a - b) for a, b in zip(values, edition.conv_in, strict=True)) / largest

    nearest = min(EDITIONS, key=distance)
    return nearest.name if distance(nearest) < _NEAR else ""


def edition_of_run(identity: Mapping[str, Any]) -> str:
    """The name of the demo model that a run of this identity trains; "" for other models."""
    unet, vae = identity.get("model"), identity.get("vae")
    return next((edition.name for edition in EDITIONS if unet == edition.unet or vae in edition.vaes), "")


def made_for_another(base: str, edition: str) -> str:
    """Says that a file was made for another model than the demo model that it is used with.

    Args:
        base: Fingerprint of the UNet that it was made with (`BASE`); "" for a file that names none.
        edition: The name of the demo model in use; "" for any other model, about which nothing is said.

    Returns:
        A sentence without its subject, the file; "" where it was made for this model, or one trained from it.
    """
    made_with = next((other.name for other in EDITIONS if other.unet == base), "")
    if not edition or made_with == edition or (base and not made_with):
        return ""
    if made_with:
        return f"was made for {made_with}; this is {edition}, on which its effect is another."
    return f"does not say which model it was made for; files of {EDITIONS[0].name} do not. This is {edition}."
