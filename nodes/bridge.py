"""ComfyUI's MODEL, CLIP and VAE as the core's model view, and results back as patches.

The UNet is called directly (ComfyUI's conditioning machinery would average the captions of a batch), under
comfy.model_management: loaded through `load_models_gpu`, never edited; masters are swapped in for a step only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..training.concepts import Concept, Vocabulary
from ..training.fingerprint import tensors_fingerprint
from ..training.model import Conditioning, TextToImage
from ..training.trainable import Target, targets
from . import t5_clip
from .concept_tokens import concepts_of, vocabularies_of, with_concepts
from .weights import clip_fingerprint, is_dynamic, without_inference_tensors

CLIP_ROOM = 75
"""Tokens in one of a CLIP's windows of 77, its start and end token left out."""
UNREAD = re.compile(r".*(logit_scale|(?<!clip_g\.transformer\.)text_projection(\.weight)?)")
"""What no UNet reads of a CLIP: text projections but for that of SDXL's second one (see `clip_fingerprint`)."""


@contextmanager
def training_mode() -> Iterator[None]:
    """Leaves ComfyUI's inference mode (nodes run in it) and tells its kernels that gradients are wanted."""
    import comfy.model_management

    before = getattr(comfy.model_management, "in_training", False)
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = before


class ComfyDenoiser:
    """Denoiser over a ModelPatcher of a UNet that reads text by cross-attention (SD1.x, SD2, SDXL, the demo model).

    beside: ModelPatchers that `load` keeps loaded together with the UNet, such as a text encoder that trains.
    """

    def __init__(self, patcher):
        self.beside: list = []
        self.patcher = patcher.clone(disable_dynamic=True) if is_dynamic(patcher) else patcher.clone()
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
        import comfy.model_management

        patchers = [self.patcher, *self.beside]
        comfy.model_management.load_models_gpu(patchers, memory_required=memory, force_full_load=True)
        for patcher in patchers:
            without_inference_tensors(patcher.model)

    def activation_memory(self, batch_size: int, height: int, width: int) -> int:
        """Bytes to keep free for a training step: ComfyUI's estimate for inference, times six for kept activations."""
        return int(6 * self.patcher.memory_required([batch_size, self.latent_channels, height, width]))

    @contextmanager
    def casting_weights(self) -> Iterator[None]:
        """While entered, layers cast weights to their input's dtype, so fp16 weights work beside fp32 masters."""
        mixed = {p.dtype for p in self.network.parameters()} != {torch.float32}
        layers = [m for m in self.network.modules() if mixed and getattr(m, "comfy_cast_weights", None) is False]
        try:
            for layer in layers:
                layer.comfy_cast_weights = True
            yield
        finally:
            for layer in layers:
                layer.comfy_cast_weights = False

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


class ComfyAutoencoder:
    """Autoencoder over a VAE; latents in the scale of the MODEL it is used with."""

    def __init__(self, vae, latent_format):
        self.vae, self.latent_format = vae, latent_format
        self.downscale = int(vae.spacial_compression_encode())
        weights = vae.first_stage_model.named_parameters()
        self.fingerprint = tensors_fingerprint(weights, latent_format.scale_factor, str(vae.vae_dtype))

    def encode(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.latent_format.process_in(self.vae.encode(images.movedim(1, -1)).clone())

    def decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vae.decode(self.latent_format.process_out(latents)).movedim(-1, 1).clone()

    def pixels(self, latents: Tensor) -> Tensor:
        network = self.vae.first_stage_model
        inner = self.latent_format.process_out(latents).to(self.vae.device, self.vae.vae_dtype)
        return network.decode(inner).float() / 2 + 0.5


class ComfyTextEncoder:
    """TextEncoder over a CLIP. Captions are plain text: brackets in them are no prompt weights.

    For a T5 CLIP of this package `projection` is a copy that may train; for any other CLIP there is none.
    denoiser: the one it trains beside; needed for `training` alone.
    """

    def __init__(self, clip, denoiser: ComfyDenoiser | None = None):
        self.clip, self._denoiser, self._trains = clip, denoiser, False
        self.concepts = concepts_of(clip)
        self._is_t5 = t5_clip.is_t5_clip(clip)
        self.projection = t5_clip.t5_parts(clip).projection if self._is_t5 else None
        self.fingerprint = fingerprint_of(clip)
        self.width, self.pooled_width = t5_clip.widths_of(clip) if self._is_t5 else self._measured_widths()

    def _measured_widths(self) -> tuple[int, int]:
        empty = self.encode(self.tokenize([""]))
        return empty.context.shape[-1], 0 if empty.pooled is None else empty.pooled.shape[-1]

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return vocabularies_of(self.clip)

    @property
    def room(self) -> int:
        source = self.clip.cond_stage_model.retune_source if self._is_t5 else None
        return source.padding.max_tokens - 1 if source else CLIP_ROOM

    @property
    def splits(self) -> bool:
        return not self._is_t5

    def with_concepts(self, concepts: Iterable[Concept]) -> ComfyTextEncoder:
        """Its `training` is its own; the projection that may train is shared."""
        other = copy.copy(self)
        other.clip = with_concepts(self.clip, concepts)
        other.concepts = concepts_of(other.clip)
        other.fingerprint = fingerprint_of(other.clip)
        return other

    def tokenize(self, texts: list[str]) -> list[str]:
        """The texts themselves: ComfyUI tokenizes and encodes one prompt at a time."""
        return texts

    def backbone(self, tokens: list[str]) -> Conditioning:
        with nullcontext() if self._trains else torch.no_grad():
            return Conditioning.cat(self._one(text) for text in tokens)

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        return states if self.projection is None else self.projection.project(states, time)

    def encode(self, tokens: list[str]) -> Conditioning:
        return self.project(self.backbone(tokens))

    @property
    def layers(self) -> dict[str, nn.Module]:
        found = self._plain_clip().cond_stage_model.named_modules()
        linear = {path: layer for path, layer in found if isinstance(layer, nn.Linear)}
        return {f"text_encoders.{path}": layer for path, layer in linear.items() if not UNREAD.fullmatch(path)}

    @property
    def weights(self) -> dict[str, Target]:
        found = targets(self._plain_clip().cond_stage_model, "text_encoders.")
        return {name: target for name, target in found.items() if not UNREAD.fullmatch(name)}

    @contextmanager
    def training(self) -> Iterator[None]:
        """ComfyUI's residuals are added in place, which would destroy what the norms before them keep for backward."""
        from comfy.text_encoders.t5 import T5LayerNorm

        patcher, modules = self._plain_clip().patcher, self.clip.cond_stage_model.modules()
        norms = [module for module in modules if isinstance(module, (nn.LayerNorm, T5LayerNorm))]
        hooks = [norm.register_forward_pre_hook(_copy_first) for norm in norms]
        self._denoiser.beside.append(patcher)
        self._trains = True
        try:
            self._denoiser.load()
            yield
        finally:
            self._trains = False
            self._denoiser.beside.remove(patcher)
            for hook in hooks:
                hook.remove()

    def _plain_clip(self):
        """The CLIP; under dynamic VRAM a copy of its own, since there weights come and go while a module runs."""
        if is_dynamic(self.clip.patcher):
            self.clip = self.clip.clone(disable_dynamic=True)
            self.clip.cond_stage_model = self.clip.patcher.model
        return self.clip

    def _one(self, text: str) -> Conditioning:
        tokens = self.clip.tokenize(text, disable_weights=True)
        if self._is_t5:
            return t5_clip.encode_states(self.clip, tokens, trains=self._trains)
        if self._trains:
            return _encode_loaded(self.clip, tokens)
        context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return Conditioning(context.float().clone(), None if pooled is None else pooled.float().clone())


def _copy_first(_module, inputs: tuple) -> tuple:
    return inputs[0].clone(), *inputs[1:]


def _encode_loaded(clip, tokens: dict) -> Conditioning:
    """What `clip.encode_from_tokens` gives, of a CLIP that is loaded already, with gradients."""
    model = clip.cond_stage_model
    t5_clip.set_options(clip)
    context, pooled = model.encode_token_weights(tokens)[:2]
    return Conditioning(context.float(), None if pooled is None else pooled.float())


def fingerprint_of(clip) -> str:
    """Changes with whatever a CLIP makes of a prompt, but for the projection behind a T5."""
    return t5_clip.backbone_fingerprint(clip) if t5_clip.is_t5_clip(clip) else clip_fingerprint(clip)


def expect_given(**parts) -> None:
    """Raises ValueError that names the first of some inputs (name=value) that is None."""
    for name, part in parts.items():
        if part is None:
            raise ValueError(f"{name} is empty; expected one. Does the checkpoint, or the loader's choice, hold it?")


@contextmanager
def text_to_image(model, clip, vae) -> Iterator[TextToImage]:
    """The model view of a MODEL, CLIP and VAE, ready to train while entered. Raises ValueError for an empty one."""
    from ..training.demo.judge import judge_samples
    from .demo_model import is_demo

    expect_given(model=model, clip=clip, vae=vae)
    with training_mode():
        denoiser = ComfyDenoiser(model)
        encoder = ComfyTextEncoder(clip, denoiser)
        if encoder.projection is not None:
            encoder.projection.to(denoiser.device)
        with denoiser.casting_weights():
            judge = judge_samples if is_demo(model) else None
            yield TextToImage(denoiser, encoder, ComfyAutoencoder(vae, latent_format_of(model)), judge)


def latent_format_of(model):
    """The latent format that a MODEL samples with: the one RetuneSwapVAE gave it, else the model's own."""
    import comfy.latent_formats

    owner = getattr(model.get_model_object("process_latent_in"), "__self__", None)
    swapped = isinstance(owner, comfy.latent_formats.LatentFormat)
    return owner if swapped else model.get_model_object("latent_format")


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


def with_projection(clip, weights: Mapping[str, Tensor]):
    """A clone of a T5 CLIP whose projection has these weights; the CLIP itself when there are none."""
    if not weights:
        return clip
    parts = t5_clip.t5_parts(clip)
    state = parts.projection.state_dict()
    parts.projection.load_state_dict(state | {name: value.float() for name, value in weights.items()})
    return t5_clip.clone_with_projection(clip, parts.projection, parts.target_std)


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
