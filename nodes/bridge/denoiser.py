"""The UNet of a MODEL as a `Denoiser`.

The UNet is called directly, since ComfyUI's conditioning code would average the captions of a batch. ComfyUI loads and
offloads it; its weights are never changed, only replaced by fp32 masters for the time of a step.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from ...training.common.fingerprint import tensors_fingerprint
from ...training.common.transfer import upload_as
from ...training.models.blocks import recomputed
from ...training.models.noise_levels import OWN_SIGMAS
from ...training.models.protocols import Conditioning
from .device import Loaded
from .static import static_clone

ACTIVATION_FACTOR = 6
"""Memory of a training step as a multiple of ComfyUI's estimate for inference: backward needs the activations."""


class ComfyDenoiser:
    """Implements `Denoiser` with a MODEL whose UNet has cross-attention to text (SD1.x, SD2, SDXL, the demo model)."""

    keep_loaded: list
    """ModelPatchers that `load` loads together with the UNet, such as that of a text encoder that trains."""

    def __init__(self, patcher):
        self.keep_loaded, self._loaded = [], Loaded()
        self.patcher = static_clone(patcher)
        self.sampling = self.patcher.get_model_object("model_sampling")
        self.prediction_type = prediction_type_of(self.sampling)
        self.network = self.patcher.model.diffusion_model
        self.context_width = _context_width(self.network)
        self.load()
        self.sigmas = self.sampling.sigmas.detach().float().cpu().clone()
        self.latent_channels = self.patcher.model.latent_format.latent_channels
        self.pooled_width = pooled_width_of(self.patcher)
        self.input_channels = self.network.in_channels
        weights = [*self.network.named_parameters(), ("sigmas", self.sigmas)]
        self.fingerprint = tensors_fingerprint(weights, self.prediction_type)
        self.device = self.patcher.load_device

    def load(self, memory: int = 0) -> None:
        """Loads the UNet and `keep_loaded` whole, patches applied, with `memory` bytes left free for activations.

        Nothing happens where they are loaded, and nothing else was since.
        """
        self._loaded.load([self.patcher, *self.keep_loaded], memory)

    def activation_memory(self, batch_size: int, height: int, width: int) -> int:
        """Bytes that a training step requires for latents of this size, in addition to the weights."""
        return int(ACTIVATION_FACTOR * self.patcher.memory_required([batch_size, self.latent_channels, height, width]))

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        sigma = _column(sigma)
        return (1 - sigma) * latent + sigma * noise if self.prediction_type == "flow" else latent + sigma * noise

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        scaled = self.sampling.calculate_input(sigma, noisy)
        times = self.sampling.timestep(sigma).float()
        options = attention_options(conditioning.mask)
        y = self._size_conditioning(noisy, conditioning)
        y_input = {} if y is None else {"y": y}
        return self.network(scaled, times, context=conditioning.context, transformer_options=options, **y_input)

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "flow":
            return noise - latent
        return (noise - _column(sigma) * latent) / (1 + _column(sigma) ** 2).sqrt()

    def denoised(self, noisy: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return self.sampling.calculate_denoised(sigma, output, noisy)

    def with_sigmas(self, sigmas: Tensor) -> ComfyDenoiser:
        from comfy.model_sampling import ModelSamplingDiscrete

        if not isinstance(self.sampling, ModelSamplingDiscrete) or self.prediction_type == "flow":
            raise ValueError(OWN_SIGMAS)
        other = copy.copy(self)
        other.sampling = copy.deepcopy(self.sampling)
        other.sampling.set_sigmas(sigmas.to(self.sampling.sigmas.device))
        other.sigmas = sigmas
        return other

    def checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return recomputed(self.network, enabled)

    def canonical_name(self, name: str) -> str:
        return name

    def _size_conditioning(self, noisy: Tensor, conditioning: Conditioning) -> Tensor | None:
        """SDXL's vector `y` of pooled text and picture size, computed by ComfyUI; None for models without it."""
        if self.network.num_classes is None:
            return None
        pooled = conditioning.pooled
        if pooled is None:
            raise ValueError("text encoder gives no pooled output; expected one for this model (SDXL).")
        if not self.pooled_width:
            return self._vector(pooled, noisy).to(noisy)
        # ComfyUI joins both on the CPU; so it gets no pooled text of the device, which would have to be waited for.
        sizes = self._vector(torch.zeros(pooled.shape), noisy)[:, pooled.shape[1] :]
        return torch.cat([pooled.to(noisy), upload_as(sizes, noisy)], dim=1)

    def _vector(self, pooled: Tensor, noisy: Tensor) -> Tensor:
        """`y` of ComfyUI for pooled text and the size of latents."""
        height, width = (side * 8 for side in noisy.shape[-2:])
        given = {"pooled_output": pooled, "device": noisy.device, "noise": noisy, "width": width, "height": height}
        return self.patcher.model.extra_conds(**given)["y"].cond


def attention_options(mask: Tensor | None) -> dict:
    """transformer_options that apply a text mask, (B, L) bool, in cross-attention; ComfyUI's UNet passes none.

    The patches of attn1 and attn2 (self- and cross-attention) record which of the two calls the attention function. All
    attention is PyTorch's, which unlike ComfyUI's sub-quadratic one does not depend on free memory.
    """
    from comfy.ldm.modules.attention import attention_pytorch

    in_cross_attention = [False]

    def record(is_cross: bool, n, context, value, extra):
        in_cross_attention[0] = is_cross
        return n, context, value

    def attend(_function, q, k, v, heads, mask_given=None, **kwargs):
        kwargs.pop("mask", None)
        chosen = mask[:, None, :] if mask is not None and in_cross_attention[0] else mask_given
        return attention_pytorch(q, k, v, heads, mask=chosen, **kwargs)

    patches = {"attn1_patch": [partial(record, False)], "attn2_patch": [partial(record, True)]}
    return {"patches": patches, "optimized_attention_override": attend}


def context_width_of(model) -> int:
    """Width of the context of a MODEL's cross-attention. Raises ValueError without a MODEL or cross-attention."""
    if model is None:
        raise ValueError("model is not connected; expected a MODEL for context_width auto, or choose a number.")
    return _context_width(model.model.diffusion_model)


def _context_width(network: nn.Module) -> int:
    for name, parameter in network.named_parameters():
        if name.endswith("attn2.to_k.weight"):
            return parameter.shape[1]
    raise ValueError("MODEL has no cross-attention (attn2); expected an SD1.x, SD2 or SDXL model.")


def pooled_width_of(model) -> int:
    """Width of the pooled text that a MODEL reads (SDXL: 1280); 0 when it reads none."""
    import comfy.model_base

    # Of `y`'s adm_channels, each picture size, crop or aesthetic score takes an embedding of 256.
    sizes = {comfy.model_base.SDXL: 6, comfy.model_base.SDXLRefiner: 5}
    counts = [count for kind, count in sizes.items() if isinstance(model.model, kind)]
    return model.model.adm_channels - 256 * counts[0] if counts else 0


def prediction_type_of(sampling) -> str:
    """ "eps", "v" or "flow" of a model_sampling object, or ValueError.

    The functions are compared, not the classes: ComfyUI has subclasses of these that predict something else.
    """
    import comfy.model_sampling

    names = {"EPS": "eps", "V_PREDICTION": "v", "CONST": "flow"}
    for name, prediction in names.items():
        reference = getattr(comfy.model_sampling, name)
        functions = ("calculate_input", "calculate_denoised", "noise_scaling")
        if all(getattr(type(sampling), f) is getattr(reference, f) for f in functions):
            return prediction
    bases = ", ".join(base.__name__ for base in type(sampling).__bases__)
    raise ValueError(f"MODEL's sampling is {bases}; expected eps, v or flow prediction.")


def _column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
