"""Where weights are while a model trains: on its device, patches applied, until something else is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..common.weights import without_inference_tensors

WHOLE = 1e32
"""Bytes that no model has: ComfyUI's own number for loading all of it."""


@contextmanager
def training_mode() -> Iterator[None]:
    """While entered, autograd works: ComfyUI's inference mode is off, and its kernels are told to support gradients."""
    import comfy.model_management

    previous = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = previous


class Loaded:
    """ModelPatchers that are loaded whole, and loaded again only when something else was loaded in between.

    Loading makes ComfyUI wait for the device and empty the allocator's cache even where nothing has to move.
    """

    def __init__(self) -> None:
        self._models: list = []
        self._memory, self._residence = 0, []

    def load(self, models: Sequence, memory: int = 0) -> None:
        """As `load_fully`, unless these very models are still where they were then, with as much memory left free."""
        wanted = list(dict.fromkeys(models))
        if wanted == self._models and memory <= self._memory and self._residence == _residence(len(self._residence)):
            return
        load_fully(wanted, memory)
        front = [patcher for patcher, _ in _residence()]
        count = 1 + max(front.index(patcher) for patcher in wanted)
        self._models, self._memory, self._residence = wanted, memory, _residence(count)


def _residence(count: int | None = None) -> list[tuple]:
    """The `count` ModelPatchers that were loaded last, each with the bytes of its weights that are on its device."""
    import comfy.model_management

    loaded = [patcher for patcher in comfy.model_management.loaded_models() if patcher is not None]
    return [(patcher, patcher.loaded_size()) for patcher in loaded[:count]]


def load_fully(patchers: Sequence, memory: int = 0) -> None:
    """Loads ModelPatchers whole, patches applied, on their devices, with `memory` bytes left free for activations.

    With --novram ComfyUI leaves weights in RAM even then. Training reads each in both passes, and what trains has to be
    where the activations are, so the rest is loaded too.
    """
    import comfy.model_management

    comfy.model_management.load_models_gpu([*patchers], memory_required=memory, force_full_load=True)
    for patcher in patchers:
        if patcher.loaded_size() < patcher.model_size():
            patcher.partially_load(patcher.load_device, WHOLE)
        without_inference_tensors(patcher.model)
