"""A T5 with a projection as ComfyUI's own CLIP object: it encodes, offloads, clones and takes LoRA like any other.

The projection is not an nn.Module child of the managed model but a plain object on it, and a clone's projection is an
object patch. Under dynamic VRAM ComfyUI restores parameters by name after it has put object patches in, which would
write the original's projection into the clone's; and it leaves key patches off modules that are not its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ...training.common.fingerprint import tensors_fingerprint
from ...training.demo.files import WEIGHTS, weights_path
from ...training.models.concepts import with_fingerprints
from ...training.models.protocols import Conditioning
from ...training.text_encoder.file import SavedTextEncoder
from ...training.text_encoder.projection import Projection, detached_copy, masked_mean
from ...training.text_encoder.t5 import Padding, T5TextEncoder, t5_model
from ...training.text_encoder.t5_file import T5Weights, read_t5
from ...training.text_encoder.tokenizers import find_tokenizer
from .concept_tokens import concepts_of
from .kept_clip import KeptClip
from .t5_tokens import T5Source, real_tokens, t5_tokenizer, warn_of_second_text
from .timed_clip import timed

DEMO = "demo"
DTYPES = {"default": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMFYUI_BUCKETS = 32


@dataclass(frozen=True)
class T5Parts:
    """A T5 CLIP taken apart. patched: the T5 weights carry patches (a LoRA), which a saved text encoder leaves out.

    target_std: what the projection's output was scaled to, before any training; None when it was not. keeps_clip: the
    context of a kept CLIP comes before the T5's.
    """

    source: T5Source
    projection: Projection
    patched: bool
    target_std: float | None
    keeps_clip: bool


class HeldProjection:
    """A projection kept out of nn.Module's bookkeeping; ordinary fp32 tensors, copied to the device that encodes."""

    def __init__(self, projection: Projection, target_std: float | None = None):
        self.target_std = target_std
        self.projection = detached_copy(projection).float().cpu().eval().requires_grad_(False)
        self._elsewhere: tuple[torch.device, Projection] | None = None

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        """Where `states` are, in fp32; time as `Projection.project`."""
        return self._on(states.context.device).project(states.to(torch.float32), time)

    @property
    def nbytes(self) -> int:
        """Size of the copy on the device that encodes."""
        return sum(tensor.nbytes for tensor in self.projection.state_dict().values())

    def _on(self, device: torch.device) -> Projection:
        if device.type == "cpu":
            return self.projection
        if self.projection.tokens:  # a resampler is large (0.2 GB for SDXL): its copy goes again after each prompt
            return detached_copy(self.projection).to(device)
        if self._elsewhere is None or self._elsewhere[0] != device:
            self._elsewhere = (device, detached_copy(self.projection).to(device))
        return self._elsewhere[1]


def load_t5_clip(
    t5: str | Path,
    projection: Projection,
    *,
    max_tokens: int = 256,
    pad: str = "none",
    dtype: str = "default",
    tokenizer: str | Path | None = None,
    target_std: float | None = None,
    keep_clip=None,
    embedding_directory: Sequence[str] | None = None,
    disable_dynamic: bool = False,
):
    """A comfy.sd.CLIP of a T5 file, folder or "demo", followed by `projection`.

    Its pooled output is the projection's, if that has a map for it; else None. keep_clip: another CLIP, whose context
    comes before the T5's in every encoding and whose pooled output, if any, is taken instead.
    dtype: how T5's weights are stored ("default": ComfyUI's choice, fp32 for the demo); it always computes in fp32.
    target_std: what the projection was scaled to; only remembered.
    Prompts longer than `max_tokens` are cut with a warning. Errors: ValueError or FileNotFoundError as `read_t5` and
    `find_tokenizer`; ValueError for a projection or kept CLIP of another width or an unknown dtype.
    """
    import comfy.model_management
    import comfy.sd
    import folder_paths

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    padding = Padding(max_tokens=max_tokens, pad=pad)
    path = weights_path("t5.safetensors") if str(t5) == DEMO else Path(t5)
    is_demo = path.resolve() == (WEIGHTS / "t5.safetensors").resolve()
    storage = torch.float32 if is_demo and dtype == "default" else DTYPES[dtype]
    storage = storage or comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())
    kept = None if keep_clip is None else KeptClip.of(keep_clip, projection.width)
    weights = read_t5(path, storage)
    _check_fit(weights.config, projection, path)
    comfyui = Path(comfy.sd.__file__).parents[1]
    found = find_tokenizer(path, weights.config, path=tokenizer, comfyui=comfyui)
    source = T5Source(
        path=path, file_hash=weights.file_hash, config=weights.config, tokenizer=found, padding=padding, dtype=dtype
    )
    clip = comfy.sd.CLIP(
        _target(source, HeldProjection(projection, target_std), kept),
        embedding_directory=embedding_directory or folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weight.numel() for weight in weights.state_dict.values()),
        state_dict=[weights.state_dict],
        model_options={"dtype": storage},
        disable_dynamic=disable_dynamic,
    )
    rebuild = {"max_tokens": max_tokens, "pad": pad, "dtype": dtype, "tokenizer": tokenizer, "target_std": target_std}
    rebuild["keep_clip"] = keep_clip
    clip.patcher.cached_patcher_init = (_rebuilt_patcher, (t5, projection, rebuild, embedding_directory))
    return timed(clip) if projection.bands else clip


def _rebuilt_patcher(t5, projection: Projection, options: dict, embedding_directory, disable_dynamic: bool = False):
    """What ComfyUI calls for an independent copy of the patcher (another GPU, a deep copy)."""
    options = options | {"embedding_directory": embedding_directory, "disable_dynamic": disable_dynamic}
    return load_t5_clip(t5, projection, **options).patcher


def _check_fit(config: dict, projection: Projection, path: Path) -> None:
    if projection.in_width != config["d_model"]:
        raise ValueError(
            f"the projection reads a width of {projection.in_width}; expected {config['d_model']}, the width of "
            f"{path.name}. Use the T5 that the projection was made for, or a new projection."
        )
    if config["relative_attention_num_buckets"] != COMFYUI_BUCKETS:
        raise ValueError(
            f"{path.name} has {config['relative_attention_num_buckets']} relative position buckets; ComfyUI's T5 "
            f"has {COMFYUI_BUCKETS}. Use another T5."
        )


def _target(source: T5Source, held: HeldProjection, kept: KeptClip | None) -> SimpleNamespace:
    """The model and tokenizer classes as comfy.sd.CLIP wants them."""
    from comfy import sd1_clip
    from comfy.text_encoders.t5 import T5

    config, name = source.config, source.name
    end, pad = config["eos_token_id"], config["pad_token_id"]

    class Backbone(sd1_clip.SDClipModel):
        def __init__(self, device, dtype, model_options):
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(config),
                model_class=T5,
                special_tokens={"end": end, "pad": pad},
                enable_attention_masks=True,
                model_options=model_options,
            )

    class T5WithProjection(sd1_clip.SD1ClipModel):
        def __init__(self, device, dtype, model_options):
            super().__init__(device=device, dtype=dtype, model_options=model_options, name=name, clip_model=Backbone)
            self.retune_source, self.retune_kept = source, kept
            self.projection = held
            self.retune_time: Tensor | None = None
            self._remembered: Conditioning | None = None
            self._remembers = False

        @contextmanager
        def remembering(self, remembers: bool) -> Iterator[None]:
            """While entered, one prompt is encoded once and projected as often as it is asked for, at `retune_time`.

            remembers: False runs T5 each time, as weights that hooks change need it.
            """
            self._remembers = remembers
            try:
                yield
            finally:
                self._remembers, self._remembered, self.retune_time = False, None, None

        def backbone(self, tokens) -> Conditioning:
            """Before the projection, prompt weights applied, on the device that T5 ran on; see the core's encoder."""
            states = super().encode_token_weights(tokens)[0]
            states = states.to(getattr(self, name).execution_device or states.device)
            real = real_tokens(tokens[name], source).to(states.device)[None]
            mean = masked_mean(states, real) if self.projection.projection.pooled_width else None
            before = None if kept is None else kept.encode(tokens, besides=name).to(states.device, torch.float32)
            return Conditioning(states, mean, None, before)

        def memory_estimation_function(self, tokens, device=None) -> int:
            """Bytes that ComfyUI keeps free beside T5's weights: the copy of the projection."""
            return self.projection.nbytes

        def encode_token_weights(self, tokens):
            from comfy.model_management import intermediate_device

            if kept is None:
                warn_of_second_text(tokens, source)
            states = self._remembered or self.backbone(tokens)
            if self._remembers:
                self._remembered = states
            result = self.projection.project(states, self.retune_time).to(intermediate_device())
            return result.context, result.pooled

    def tokenizer(embedding_directory=None, tokenizer_data=None):
        sdxl, other = held.projection.pooled_width > 0, None if kept is None else kept.clip
        return t5_tokenizer(source, embedding_directory, sdxl=sdxl, keep_clip=other)

    return SimpleNamespace(clip=T5WithProjection, tokenizer=tokenizer, params={})


def is_t5_clip(clip) -> bool:
    """Whether a CLIP was made by `load_t5_clip` (or is a clone of one)."""
    return clip is not None and hasattr(clip.cond_stage_model, "retune_source")


def t5_parts(clip) -> T5Parts:
    """Source and projection of a T5 CLIP as this clone has them, a copy that may train. ValueError for other CLIPs."""
    expect_t5(clip)
    held = clip.patcher.get_model_object("projection")
    projection = detached_copy(held.projection).requires_grad_(True)
    model = clip.cond_stage_model
    keeps_clip = model.retune_kept is not None
    return T5Parts(model.retune_source, projection, bool(clip.patcher.patches), held.target_std, keeps_clip)


def widths_of(clip) -> tuple[int, int]:
    """Widths of a T5 CLIP's context and pooled output (0: none); a kept CLIP's pooled output wins."""
    expect_t5(clip)
    projection, kept = clip.patcher.get_model_object("projection").projection, clip.cond_stage_model.retune_kept
    return projection.width, (kept.pooled_width if kept is not None else 0) or projection.pooled_width


def t5_state(clip) -> dict[str, Tensor]:
    """T5's weights in fp32 under `T5EncoderModel` names, this clone's patches applied; independent copies."""
    import comfy.lora

    expect_t5(clip)
    prefix = f"{clip.cond_stage_model.retune_source.name}.transformer."
    state = {}
    with torch.inference_mode(False), torch.no_grad():
        for key, ((weight, _), *patches) in clip.patcher.get_key_patches(prefix).items():
            own = weight.detach().to("cpu", torch.float32, copy=True)
            state[key.removeprefix(prefix)] = comfy.lora.calculate_weight(patches, own, key) if patches else own
    return state


def core_text_encoder(clip) -> T5TextEncoder:
    """The core's own encoder (transformers, fp32, CPU) with this CLIP's weights, tokenizer, projection and padding.

    Raises ValueError for a T5 beside a kept CLIP, which the core's encoder does not have.
    """
    parts = t5_parts(clip)
    if parts.keeps_clip:
        raise ValueError("the T5 stands beside a kept CLIP; expected a T5 alone. Load it without keep_clip.")
    source = parts.source
    model = t5_model(T5Weights(t5_state(clip), source.config, source.file_hash))
    return T5TextEncoder(model, source.tokenizer, parts.projection, source.padding, source.file_hash)


def clone_with_projection(clip, projection: Projection, target_std: float | None = None):
    """A clone that shares T5's weights and patches but projects with a copy of `projection`; `clip` is untouched.

    target_std: what `projection` was scaled to, which a saved text encoder records.
    """
    expect_t5(clip)
    source = clip.cond_stage_model.retune_source
    _check_fit(source.config, projection, source.path)
    clone = clip.clone()
    clone.patcher.add_object_patch("projection", HeldProjection(projection, target_std))
    return timed(clone) if projection.bands else clone


def saved_text_encoder(clip) -> SavedTextEncoder:
    """What `save_text_encoder` writes for a T5 CLIP."""
    parts = t5_parts(clip)
    source = parts.source
    return SavedTextEncoder(
        projection=parts.projection,
        padding=source.padding,
        t5_file=source.path.name,
        t5_sha256=source.file_hash,
        t5_config=source.config,
        tokenizer=source.tokenizer.fingerprint,
        target_std=parts.target_std,
        dtype=source.dtype,
        keeps_clip=parts.keeps_clip,
    )


def load_saved_text_encoder(saved: SavedTextEncoder, folders: Iterable[str | Path], keep_clip=None, **options):
    """The CLIP of a saved text encoder; its T5 is looked for in `folders` and in the demo's weights.

    options: as `load_t5_clip`. Errors: ValueError or FileNotFoundError that names the T5 or tokenizer that differs;
    ValueError when it stood beside a kept CLIP and none is given.
    """
    saved.check_keep_clip(keep_clip is not None)
    path = saved.find_t5([*folders, WEIGHTS])
    padding = {"max_tokens": saved.padding.max_tokens, "pad": saved.padding.pad}
    known = padding | {"dtype": saved.dtype, "target_std": saved.target_std}
    clip = load_t5_clip(path, saved.projection, keep_clip=keep_clip, **known, **options)
    saved.check_tokenizer(clip.cond_stage_model.retune_source.tokenizer.fingerprint)
    return clip


def set_options(clip) -> None:
    """The layer and device with which a CLIP's model encodes, as ComfyUI sets them before."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": clip.patcher.load_device})


def encode_states(clip, tokens: dict, *, trains: bool = False) -> Conditioning:
    """T5 states before the projection, (1, L, d_model), ordinary tensors; tokens as `clip.tokenize` returns them.

    The mask is None where pads are part of the context ("max_tokens"), else all True, as in the core's encoder.
    trains: the T5 is loaded already, and gradients are kept.
    """
    expect_t5(clip)
    model = clip.cond_stage_model
    set_options(clip)
    if not trains:
        clip.load_model(tokens)
    with torch.inference_mode(False), nullcontext() if trains else torch.no_grad():
        found = Conditioning.cat([model.backbone(tokens)])  # cat copies, so that nothing is an inference tensor
        real = torch.ones(found.context.shape[:2], dtype=torch.bool, device=found.context.device)
    return replace(found, mask=real if model.retune_source.padding.pad == "none" else None)


def own_context(clip, context: Tensor, tokens: dict) -> Tensor:
    """The T5's part of what a CLIP encoded: behind a kept CLIP's."""
    model = clip.cond_stage_model
    if model.retune_kept is None:
        return context
    resampled = clip.patcher.get_model_object("projection").projection.tokens
    return context[:, -(resampled or sum(map(len, tokens[model.retune_source.name]))) :]


def backbone_fingerprint(clip) -> str:
    """Changes with whatever `encode_states` depends on: weights file, dtype, tokenizer, padding, layer, patches,
    concepts.

    So it does with whether there is a pooled output, and with a kept CLIP.
    """
    expect_t5(clip)
    model = clip.cond_stage_model
    source, projection = model.retune_source, clip.patcher.get_model_object("projection").projection
    identity = (source.file_hash, source.dtype, source.tokenizer.fingerprint, source.padding, clip.layer_idx)
    patched = tensors_fingerprint(_patched_weights(clip)) if clip.patcher.patches else ""
    options = sorted(clip.tokenizer_options.items())
    more = ("pooled",) if projection.pooled_width else ()
    more += () if model.retune_kept is None else (model.retune_kept.fingerprint(),)
    plain = hashlib.sha256(repr((*identity, patched, options, *more)).encode()).hexdigest()
    return with_fingerprints(plain, concepts_of(clip))


def _patched_weights(clip) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value of each weight that carries patches, the same after a restart."""
    import comfy.lora

    with torch.inference_mode(False), torch.no_grad():
        for key, ((weight, _), *patches) in clip.patcher.get_key_patches().items():
            if patches:
                yield key, comfy.lora.calculate_weight(patches, weight.to("cpu", torch.float32, copy=True), key)


def expect_t5(clip) -> None:
    if clip is None:
        raise ValueError("clip is empty; expected a T5 from Load T5 or Load Text Encoder.")
    if not is_t5_clip(clip):
        raise ValueError(
            f"the CLIP is {type(clip.cond_stage_model).__name__}; expected a T5 from Load T5 or Load Text Encoder"
        )
