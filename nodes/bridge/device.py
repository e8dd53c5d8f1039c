"""Where weights are while a model trains: on its device, patches applied, until something else is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..common.weights import without_inference_tensors


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

    loaded = comfy.model_management.loaded_models()[:count]
    return [(patcher, patcher.loaded_size()) for patcher in loaded if patcher is not None]


def load_fully(patchers: Sequence, memory: int = 0) -> None:
    """Loads ModelPatchers whole, patches applied, on their devices, with `memory` bytes left free for activations.

    With --novram ComfyUI leaves the weights of its own layers in RAM, from where `training_layers` fetches them. Their
    patches are applied there, and weights of other layers, which fetch none, are moved.
    """
    import comfy.model_management

    stays = comfy.model_management.vram_state == comfy.model_management.VRAMState.NO_VRAM
    options = {"memory_required": memory, "force_full_load": True}
    options["force_patch_weights"] = stays and any(patcher.patches for patcher in patchers)
    comfy.model_management.load_models_gpu([*patchers], **options)
    for patcher in patchers:
        if stays:
            _move_others(patcher)
        without_inference_tensors(patcher.model)


def _move_others(patcher) -> None:
    """Moves weights and buffers to a ModelPatcher's device, but for the weights of layers that ComfyUI casts."""
    for owner in patcher.model.modules():
        moved = (owner._buffers,) if hasattr(owner, "comfy_cast_weights") else (owner._parameters, owner._buffers)
        for tensors in moved:
            for name, value in tensors.items():
                if value is not None and value.device != patcher.load_device:
                    on_device = value.detach().to(patcher.load_device)
                    is_parameter = tensors is owner._parameters
                    tensors[name] = nn.Parameter(on_device, requires_grad=False) if is_parameter else on_device
