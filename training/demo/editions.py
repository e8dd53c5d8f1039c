"""The demo models that versions of this package shipped: which of them a model, a LoRA or a word belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..common.fingerprint import tensors_fingerprint

BASE = "retune.base"
"""Metadata key of saved files: the fingerprint of the UNet that they were made with."""


@dataclass(frozen=True)
class Edition:
    """A demo model as one or more versions shipped it.

    Args:
        name: What messages call it.
        unet: Fingerprint of its UNet, as runs record it (`Denoiser.fingerprint`).
        tokens: `tensors_fingerprint` of the token embeddings of its CLIP and of its T5.
    """

    name: str
    unet: str
    tokens: tuple[str, str]


EDITIONS = (
    Edition(
        "the demo model of versions 0.1 to 0.3",
        unet="ee2e97ad86ce5e00b1c5de4bcd4e2f78",
        tokens=("b51296b2fed44f193458ac2f44715893", "22bad7b0086ec8669010d3c11cc91e78"),
    ),
)
"""The oldest first; the last one is shipped."""
UNETS = {edition.unet: edition.name for edition in EDITIONS}
"""Fingerprint of a UNet -> the demo model's name."""


def edition_of_tokens(table: Tensor) -> str:
    """The name of the demo model whose CLIP or T5 has these token embeddings (V, D); "" for other models."""
    if table.shape[0] > 2000:  # a real text encoder's, whose numbers need not be read
        return ""
    found = tensors_fingerprint([("", table)])
    return next((edition.name for edition in EDITIONS if found in edition.tokens), "")


def made_for_another(base: str, edition: str) -> str:
    """Says that a file was made for another model than the demo model that it is used with.

    Args:
        base: Fingerprint of the UNet that it was made with (`BASE`); "" for a file that names none.
        edition: The name of the demo model in use; "" for any other model, about which nothing is said.

    Returns:
        A sentence without its subject, the file; "" where it was made for this model.
    """
    if not edition or UNETS.get(base) == edition:
        return ""
    if base:
        return f"was made for {UNETS.get(base, 'another model')}; this is {edition}, on which its effect is another."
    return f"does not say which model it was made for, as files of {EDITIONS[0].name}; this is {edition}."
