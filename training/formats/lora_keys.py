"""Keys of LoRA files: the names of a layer's tensors in each tool, and the names of the layers in kohya's scheme."""

from __future__ import annotations

import re
from collections.abc import Iterator

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

_LYCORIS = (DOWN, UP, MID, *LOHA, "hada_t1", "hada_t2", *LOKR, *GLORA, "oft_blocks", "diff", "set_weight", "w_norm")
ENDINGS = {f".{name}": name for name in (*_LYCORIS, *BIAS, *SCALES)} | {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_A": DOWN,
    ".lora_B": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector.default.weight": "dora_scale",
}
"""Suffix of a key -> LyCORIS's name of that tensor."""

_KOHYA_PREFIXES = {
    "unet.": ("lora_unet_",),
    "text_encoder.": ("lora_te_", "lora_te1_"),
    "text_encoder_2.": ("lora_te2_",),
    "text_encoder_3.": ("lora_te3_",),
    "clip_l.": ("lora_te_", "lora_te1_"),
    "clip_g.": ("lora_te2_",),
    "t5.": ("lora_te3_", "lora_te_"),
    "lycoris_": ("lora_unet_", "lora_te_"),
    "base_model.model.": ("lora_unet_", "lora_te_"),
    "unet.base_model.model.": ("lora_unet_",),
}
"""Prefix of other tools' layer names -> the corresponding prefixes in kohya's names."""


def split_key(key: str) -> tuple[str, str | None]:
    """Splits a key into layer name and LyCORIS's name of the tensor; (key, None) if it does not belong to a LoRA."""
    for ending, role in ENDINGS.items():
        if key.endswith(ending) and len(key) > len(ending) and not key.startswith("bundle_emb."):
            return key.removesuffix(ending), role
    return key, None


def kohya_aliases(layer: str) -> Iterator[str]:
    """A layer's own name, then its possible names in kohya's scheme (several for text encoders)."""
    yield layer
    for prefix in sorted(_KOHYA_PREFIXES, key=len, reverse=True):
        if layer.startswith(prefix):
            path = _diffusers_path(layer.removeprefix(prefix), text=prefix.startswith("text"))
            for kohya_prefix in _KOHYA_PREFIXES[prefix]:
                yield kohya_prefix + path.replace(".", "_")
                if kohya_prefix != "lora_unet_" and path.startswith("encoder.layers."):  # transformers 5 names
                    yield f"{kohya_prefix}text_model_" + path.replace(".", "_")


def _diffusers_path(path: str, text: bool) -> str:
    """A layer path of diffusers, with the names of its attention processors (before peft) replaced by today's."""
    path = path.replace(".processor.", ".")
    if text:
        path = re.sub(r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj", path)
        return re.sub(r"\.self_attn\.to_out$", ".self_attn.out_proj", path)
    return re.sub(r"(\.attn\d\.to_out)$", r"\1.0", path)
