"""The UNet of a MODEL as a Denoiser.

It is called directly, since ComfyUI's conditioning machinery would average the captions of a batch, under
comfy.model_management: loaded through `load_models_gpu`, never edited; masters are swapped in for a step only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from ...training.common.fingerprint import tensors_fingerprint
from ...training.models.protocols import Conditioning
from .device import load_fully, static_clone, without_inference_tensors


class ComfyDenoiser:
    """Denoiser over a ModelPatcher of a UNet that reads text by cross-attention (SD1.x, SD2, SDXL, the demo model).

    beside: ModelPatchers that `load` keeps loaded together with the UNet, such as a text encoder that trains.
    """

    def __init__(self, patcher):
        self.keep_loaded: list = []
        self.patcher = static_clone(patcher)
        self.sampling = self.patcher.get_model_object("model_sampling")
        self.prediction_type = prediction_type_of(self.sampling)
        self.network = self.patcher.model.diffusion_model
        if not any(name.endswith("attn2.to_k.weight") for name, _ in self.network.named_parameters()):
            raise ValueError("MODEL has no cross-attention (attn2); expected an SD1.x, SD2 or SDXL model.")
        self.load()
        self.sigmas = self.sampling.sigmas.detach().float().cpu().clone()
        self.latent_channels = self.patcher.model.latent_format.latent_channels
        self.context_width = next(p for n, p in self.network.named_parameters() if "attn2.to_k." in n).shape[1]
        self.pooled_width = pooled_width_of(self.patcher)
        self.input_channels = self.network.in_channels
        weights = [*self.network.named_parameters(), ("sigmas", self.sigmas)]
        self.fingerprint = tensors_fingerprint(weights, self.prediction_type)
        self.device = self.patcher.load_device

    def load(self, memory: int = 0) -> None:
        """Brings the whole UNet, patches applied, to its device; `memory` bytes are kept free for activations."""
        patchers = [self.patcher, *self.keep_loaded]
        load_fully(patchers, memory)
        for patcher in patchers:
            without_inference_tensors(patcher.model)

    def activation_memory(self, batch_size: int, height: int, width: int) -> int:
        """Bytes to keep free for a training step: ComfyUI's estimate for inference, times six for kept activations."""
        return int(6 * self.patcher.memory_required([batch_size, self.latent_channels, height, width]))

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        sigma = _column(sigma)
        return (1 - sigma) * latent + sigma * noise if self.prediction_type == "flow" else latent + sigma * noise

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        scaled = self.sampling.calculate_input(sigma, noisy)
        times = self.sampling.timestep(sigma).float()
        options = attention_options(conditioning.mask)
        y = self._size_conditioning(noisy, conditioning)
        more = {} if y is None else {"y": y}
        return self.network(scaled, times, context=conditioning.context, transformer_options=options, **more)

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "flow":
            return noise - latent
        return (noise - _column(sigma) * latent) / (1 + _column(sigma) ** 2).sqrt()

    def denoised(self, noisy: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return self.sampling.calculate_denoised(sigma, output, noisy)

    def with_sigmas(self, sigmas: Tensor) -> ComfyDenoiser:
        other = copy.copy(self)
        other.sampling = copy.deepcopy(self.sampling)
        other.sampling.set_sigmas(sigmas.to(self.sampling.sigmas.device))
        other.sigmas = sigmas
        return other

    @contextmanager
    def checkpointing(self, enabled: bool) -> Iterator[None]:
        """Recomputes ResBlocks and SpatialTransformers; ComfyUI's own `use_checkpoint` breaks with frozen weights."""
        blocks = [m for m in self.network.modules() if type(m).__name__ in ("ResBlock", "SpatialTransformer")]
        if enabled:
            from torch.utils.checkpoint import checkpoint

            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def canonical_name(self, name: str) -> str:
        return name

    def _size_conditioning(self, noisy: Tensor, conditioning: Conditioning) -> Tensor | None:
        """SDXL's vector of pooled text and picture size, from the model's own code; None for models without it."""
        if self.network.num_classes is None:
            return None
        if conditioning.pooled is None:
            raise ValueError("text encoder gives no pooled output; expected one for this model (SDXL).")
        extra = self.patcher.model.extra_conds(
            pooled_output=conditioning.pooled,
            device=noisy.device,
            noise=noisy,
            width=noisy.shape[-1] * 8,
            height=noisy.shape[-2] * 8,
        )
        return extra["y"].cond.to(noisy)


def attention_options(mask: Tensor | None) -> dict:
    """transformer_options that make every attention PyTorch's own, with the text mask on cross-attention only.

    ComfyUI's UNet passes no text mask. The patches called before attn1 and attn2 tell the attention function which of
    the two it serves. PyTorch's attention is also the one whose chunking does not depend on free memory.
    """
    from comfy.ldm.modules.attention import attention_pytorch

    reading_text = [False]

    def before(reads_text: bool, n, context, value, extra):
        reading_text[0] = reads_text
        return n, context, value

    def attend(_function, q, k, v, heads, mask_given=None, **kwargs):
        kwargs.pop("mask", None)
        own = mask[:, None, :] if mask is not None and reading_text[0] else mask_given
        return attention_pytorch(q, k, v, heads, mask=own, **kwargs)

    patches = {"attn1_patch": [partial(before, False)], "attn2_patch": [partial(before, True)]}
    return {"patches": patches, "optimized_attention_override": attend}


def context_width_of(model) -> int:
    """The width that a MODEL's cross-attention reads; ValueError when there is no MODEL or no cross-attention."""
    if model is None:
        raise ValueError("model is not connected; expected a MODEL for context_width auto, or choose a number.")
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.endswith("attn2.to_k.weight"):
            return parameter.shape[1]
    raise ValueError("MODEL has no cross-attention (attn2); expected an SD1.x, SD2 or SDXL model.")


def pooled_width_of(model) -> int:
    """The width of the pooled text that a MODEL reads beside its picture sizes (SDXL: 1280); 0 when it reads none."""
    import comfy.model_base

    sizes = {comfy.model_base.SDXL: 6, comfy.model_base.SDXLRefiner: 5}  # numbers in embeddings of 256
    counts = [count for kind, count in sizes.items() if isinstance(model.model, kind)]
    return model.model.adm_channels - 256 * counts[0] if counts else 0


def prediction_type_of(sampling) -> str:
    """ "eps", "v" or "flow", told by the very functions in use: subclasses of these in ComfyUI mean other things."""
    import comfy.model_sampling

    names = {"EPS": "eps", "V_PREDICTION": "v", "CONST": "flow"}
    for name, prediction in names.items():
        reference = getattr(comfy.model_sampling, name)
        functions = ("calculate_input", "calculate_denoised", "noise_scaling")
        if all(getattr(type(sampling), f) is getattr(reference, f) for f in functions):
            return prediction
    found = ", ".join(base.__name__ for base in type(sampling).__bases__)
    raise ValueError(f"MODEL's sampling is {found}; expected eps, v or flow prediction.")


def _column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
