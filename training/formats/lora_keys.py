"""Keys of LoRA files: the names of a layer's tensors in each tool, and the names of the layers in kohya's scheme."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
BIAS = ("diff_b", "b_norm")
"""Differences of biases and norms."""
SCALES = ("alpha", "dora_scale", "rescale", "reshape_weight")
"""Tensors that scale or reshape a layer's difference; on their own they do not make a layer."""
PEFT = "lora_adapter_metadata"
"""Metadata entry in which diffusers stores peft's LoraConfig, as JSON."""

EXTRA_BIAS, SINGULAR = "lora_B.bias", "lora_E"
"""Tensors that only peft has, a bias behind lora_B and AdaLoRA's singular values; reading turns them into LyCORIS's."""

_LYCORIS = (DOWN, UP, MID, *LOHA, "hada_t1", "hada_t2", *LOKR, *GLORA, "oft_blocks", "diff", "set_weight", "w_norm")
_PEFT_PARTS = {"lora_A": DOWN, "lora_B": UP, SINGULAR: SINGULAR, "lora_magnitude_vector": "dora_scale"}
"""peft's name of a tensor -> LyCORIS's."""
ENDINGS = (
    {f".{name}": name for name in (*_LYCORIS, *BIAS, *SCALES, EXTRA_BIAS)}
    | {f".{part}{end}": role for part, role in _PEFT_PARTS.items() for end in ("", ".weight")}
    | {
        ".lora.down.weight": DOWN,
        ".lora.up.weight": UP,
        "_lora.down.weight": DOWN,
        "_lora.up.weight": UP,
        ".lora_linear_layer.down.weight": DOWN,
        ".lora_linear_layer.up.weight": UP,
    }
)
"""Suffix of a key -> LyCORIS's name of that tensor."""

_NAMED_PARTS = _PEFT_PARTS | {name: name for name in (*LOHA, "hada_t1", "hada_t2", *LOKR)}
_NAMED = re.compile(rf"(.+)\.({'|'.join(_NAMED_PARTS)})\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?")
"""Keys of a peft model's own state dict, which has the adapter's name (default, default_0, ...) in each of them."""

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What parallel training, torch.compile and gradient checkpointing put into names."""
_PEFT_MODEL = "base_model.model."
_PART = re.compile(
    rf"(?:{re.escape(_PEFT_MODEL)})?(unet|text_encoder(?:_[23])?|clip_[lgh]|t5\w*)\.(?:{re.escape(_PEFT_MODEL)})?"
    r"(?:transformer\.(?=text_model\.|encoder\.|text_projection))?(.+)"
)
_UNET = re.compile(
    r"((down|up|mid|input|output|middle)_blocks?|time_embed(ding)?|label_emb|add_embedding)\.|conv_(in|out)$|out\.[02]$"
)
_CLIP = re.compile(r"text_model\.|encoder\.layers\.|text_projection$")
_T5 = re.compile(r"encoder\.block\.")
_IMPLIED = (("unet", _UNET), ("text_encoder", _CLIP), ("t5", _T5))
"""Component of the pipeline -> how its layers' names begin, for files that do not name it."""

_KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
    "clip_l": ("lora_te_", "lora_te1_"),
    "clip_h": ("lora_te_",),
    "clip_g": ("lora_te2_",),
    "t5": ("lora_te3_", "lora_te_"),
    "unknown": ("lora_unet_", "lora_te_"),
}
"""Component -> the corresponding prefixes in kohya's names."""

_TEXT_NAME = re.compile(r"lora_(prior_)?te\d?_|text_encoders\.")


def split_key(key: str) -> tuple[str, str | None]:
    """Splits a key into layer name and LyCORIS's name of the tensor; (key, None) if it does not belong to a LoRA."""
    if key.startswith("bundle_emb."):
        return key, None
    for ending, role in ENDINGS.items():
        if key.endswith(ending) and len(key) > len(ending):
            return key.removesuffix(ending), role
    if match := _NAMED.fullmatch(key):
        return match[1], EXTRA_BIAS if match[3] == ".bias" else _NAMED_PARTS[match[2]]
    return key, None


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Rank r of a layer's decomposition by LyCORIS's names of its tensors; None for kinds without one."""
    names = (name for name in (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in tensors and tensors[name].ndim)
    return next((tensors[name].shape[0] for name in names), None)


def unwrapped(layer: str) -> str:
    """A layer's name without what parallel training and torch.compile put into it."""
    return _WRAPPERS.sub("", layer)


def split_layer(layer: str) -> tuple[str, str]:
    """(component of the pipeline, path in it) for a layer named with dots by diffusers, peft or OneTrainer.

    Wrappers such as `base_model.model.` are left out. A name without a component gets the one whose layers begin so;
    else the component is "unknown" for a name in a wrapper, which tells that the path is a module's, and "" for others.
    """
    name = unwrapped(layer)
    if match := _PART.fullmatch(name):
        return "t5" if match[1].startswith("t5") else match[1], match[2]
    path = name.removeprefix(_PEFT_MODEL)
    component = next((component for component, pattern in _IMPLIED if pattern.match(path)), "")
    if path.startswith("lycoris_"):
        return "unknown", path.removeprefix("lycoris_")
    return component or ("unknown" if path != layer else ""), path


def is_text_layer(layer: str) -> bool:
    """Whether a layer, named by any tool, is one of a text encoder."""
    return _TEXT_NAME.match(layer) is not None or split_layer(layer)[0].startswith(("text_encoder", "clip_", "t5"))


def kohya_aliases(layer: str) -> Iterator[str]:
    """A layer's own name, then its names without wrappers, then in kohya's scheme (several for text encoders)."""
    yield layer
    component, path = split_layer(layer)
    if path.startswith("model.diffusion_model."):
        yield path.removeprefix("model.")
    if component == "unknown" and not layer.startswith("lycoris_"):
        yield path
    path = _diffusers_path(path, text=component.startswith("text"))
    for prefix in _KOHYA_PREFIXES.get(component, ()):
        yield prefix + path.replace(".", "_")
        if prefix != "lora_unet_" and path.startswith("encoder.layers."):  # transformers 5 names
            yield f"{prefix}text_model_" + path.replace(".", "_")


def _diffusers_path(path: str, text: bool) -> str:
    """A layer path of diffusers, with the names of its attention processors (before peft) replaced by today's."""
    path = path.replace(".processor.", ".")
    if text:
        path = re.sub(r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj", path)
        return re.sub(r"\.self_attn\.to_out$", ".self_attn.out_proj", path)
    return re.sub(r"(\.attn\d\.to_out)$", r"\1.0", path)
