"""A projection as a T5 CLIP holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...training.models.protocols import Conditioning
from ...training.text_encoder.projection import Projection, detached_copy


class FrozenProjection:
    """A projection for inference that PyTorch and ComfyUI do not see as a module of the model that holds it.

    The fp32 weights stay on the CPU; a copy is made on the device that encodes.

    Args:
        projection: copied, so that later changes to it have no effect here.
        target_std: what its output was scaled to, for the record of a saved text encoder; None when it was not.
    """

    def __init__(self, projection: Projection, target_std: float | None = None):
        self.target_std = target_std
        self.projection = detached_copy(projection).float().cpu().eval().requires_grad_(False)
        self._copied: tuple[torch.device, Projection] | None = None

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        """Projects in fp32 on the device of `states`; time as for `Projection.project`."""
        return self._on(states.context.device).project(states.to(torch.float32), time)

    @property
    def nbytes(self) -> int:
        """Size of the copy on the device that encodes."""
        return sum(tensor.nbytes for tensor in self.projection.state_dict().values())

    def _on(self, device: torch.device) -> Projection:
        if device.type == "cpu":
            return self.projection
        if self.projection.tokens:  # a resampler is large (0.2 GB for SDXL): its copy is freed after each prompt
            return detached_copy(self.projection).to(device)
        if self._copied is None or self._copied[0] != device:
            self._copied = (device, detached_copy(self.projection).to(device))
        return self._copied[1]
