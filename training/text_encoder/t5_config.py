"""The configuration of a T5 encoder, read from the shapes of its tensors alone.

Covers v1.0 (ReLU), v1.1 / flan / lm-adapt (gated GELU), mT5, ByT5, and UMT5 / Pile-T5 (a position bias in every
layer). Raffel et al. 2020, arXiv 1910.10683; Xue et al. 2021, arXiv 2010.11934; Chung et al. 2023, arXiv 2304.09151.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..common.text import first_few

FIRST_QUERY = "block.0.layer.0.SelfAttention.q.weight"
FP8_SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant")
PILE_VOCABULARY = 32128
BYT5_VOCABULARY = 384
_BLOCK = re.compile(r"(?:^|\.)(decoder\.)?block\.(\d+)\.layer\.")


def t5_names(keys: Iterable[str]) -> dict[str, str]:
    """Maps `T5EncoderModel` names to the names found in a file, whatever their prefix; the decoder is left out.

    Errors: ValueError that says what the file is instead, when no T5 encoder is in it.
    """
    keys = list(keys)
    stack = _stack_prefix(keys)
    root = stack.removesuffix("encoder.")
    names = {}
    for key in keys:
        if key.startswith(stack) and not key.startswith(stack + "embed_tokens."):
            names["encoder." + key[len(stack) :]] = key
    for embedding in (root + "shared", stack + "embed_tokens"):
        for ending in ("weight", *FP8_SCALES):
            if f"{embedding}.{ending}" in keys:
                names.setdefault(f"shared.{ending}", f"{embedding}.{ending}")
    return {name: key for name, key in names.items() if name.startswith(("shared.", "encoder.block.", "encoder.final"))}


def t5_config(shapes: Mapping[str, Sequence[int]]) -> dict:
    """A T5 encoder's configuration from tensor shapes; readable by transformers' T5Config and by ComfyUI's T5.

    shapes: {tensor name: shape} under any of the prefixes found in the wild. Errors: ValueError for a file that is no
    T5 encoder, that lacks tensors (named), or whose layers are of a kind that T5 does not have (named).
    """
    names = t5_names(shapes)
    found = {name: tuple(shapes[key]) for name, key in names.items()}
    layers = 1 + max(int(match[2]) for match in map(_BLOCK.search, found) if match)
    gated = any(".wi_0." in name for name in found)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    own_bias = layers > 1 and bias.format(1) in found
    _check_complete(found, layers, gated, own_bias)
    vocabulary, d_model = found["shared.weight"]
    buckets, heads = found[bias.format(0)]
    inner = found["encoder." + FIRST_QUERY][0]
    if inner % heads:
        raise ValueError(f"the query width of the T5 file is {inner}; expected a multiple of its {heads} heads")
    d_ff = found[f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    pile = own_bias and vocabulary == PILE_VOCABULARY
    return {
        "model_type": "umt5" if own_bias else "t5",
        "vocab_size": vocabulary,
        "d_model": d_model,
        "d_ff": d_ff,
        "d_kv": inner // heads,
        "num_heads": heads,
        "num_layers": layers,
        "is_gated_act": gated,
        "dense_act_fn": "gelu_pytorch_tanh" if gated else "relu",
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "eos_token_id": 2 if pile else 1,
        "pad_token_id": 1 if pile else 0,
    }


def expected_names(layers: int, gated: bool, own_bias: bool) -> list[str]:
    """Every tensor name of a T5 encoder of this depth and kind."""
    names = ["shared.weight", "encoder.final_layer_norm.weight"]
    feed_forward = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        names += [f"{block}.0.SelfAttention.{part}.weight" for part in "qkvo"]
        names += [f"{block}.{part}.layer_norm.weight" for part in (0, 1)]
        names += [f"{block}.1.DenseReluDense.{part}.weight" for part in feed_forward]
        if own_bias or layer == 0:
            names.append(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    return names


def _check_complete(found: Mapping[str, tuple], layers: int, gated: bool, own_bias: bool) -> None:
    expected = expected_names(layers, gated, own_bias)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"the T5 file lacks {first_few(missing)}; expected all tensors of {layers} encoder blocks. "
            "Download the file again or use a complete one."
        )
    known = set(expected)
    odd = [name for name in found if name not in known and name.rsplit(".", 1)[1] not in FP8_SCALES]
    if odd:
        raise ValueError(
            f"the file has {odd[0]}, which no T5 encoder has; expected a dense T5 (v1.0, v1.1, flan, mT5, UMT5, "
            "ByT5). Variants such as LongT5 or Switch are not supported."
        )


def _stack_prefix(keys: Sequence[str]) -> str:
    """What stands before `block.0` of the encoder, for example "text_encoders.t5xxl.transformer.encoder."."""
    encoder = [key for key in keys if not _is_decoder(key)]
    prefixes = [key.removesuffix(FIRST_QUERY) for key in encoder if key.endswith(FIRST_QUERY)]
    if not prefixes:  # the first block itself may be among what is missing
        blocks = [key[: match.start()] for key in encoder if (match := _BLOCK.search(key))]
        prefixes = [f"{prefix}." if prefix else "" for prefix in blocks[:1]]
    if not prefixes:
        raise ValueError(f"no T5 encoder is in the file: {_what_it_is(keys)}. Choose a T5 encoder or a full T5 model.")
    if len(prefixes) > 1:
        raise ValueError(f"the file has {len(prefixes)} T5 encoders ({', '.join(prefixes)}); expected one")
    return prefixes[0]


def _is_decoder(key: str) -> bool:
    return key.startswith("decoder.") or ".decoder." in key


def _what_it_is(keys: Sequence[str]) -> str:
    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if has(r"(^|\.)decoder\.block\.\d"):
        return "it is the decoder half of a T5"
    if has(r"^model\.diffusion_model\.|^diffusion_model\.|^double_blocks\."):
        return "it is an image model's checkpoint without a T5"
    if has(r"(^|\.)(text_model|vision_model|visual)\.|(^|\.)transformer\.resblocks\."):
        return "it is a CLIP (or another image-text) model"
    if has(r"(^|\.)layers\.\d+\.(self_attn|attention|input_layernorm)\b|(^|\.)h\.\d+\.attn\."):
        return "it is a decoder-only language model (Llama-like)"
    if has(r"(^|\.)attention\.self\.query\."):
        return "it is a BERT-like encoder"
    return f"it has {len(keys)} tensors, such as {keys[0]}" if keys else "it has no tensors"
