"""Derives the configuration of a T5 encoder from the names and shapes of its tensors.

Supports v1.0 (ReLU), v1.1 / flan / lm-adapt (gated GELU), mT5, ByT5, and UMT5 / Pile-T5 (a position bias in every
layer). Raffel et al. 2020, arXiv 1910.10683; Xue et al. 2021, arXiv 2010.11934; Chung et al. 2023, arXiv 2304.09151.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..common.foreign import count_numbered
from ..common.text import first_few

FIRST_QUERY = "block.0.layer.0.SelfAttention.q.weight"
FP8_SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant")
PILE_VOCABULARY = 32128
BYT5_VOCABULARY = 384
FEWEST_BUCKETS = 4
"""Of the relative positions: half of them for each direction, half of those for single distances."""
_BLOCK = re.compile(r"(?:^|\.)(decoder\.)?block\.(\d+)\.layer\.")


def t5_names(keys: Iterable[str]) -> dict[str, str]:
    """Maps `T5EncoderModel` names to a file's keys, with any prefix; the decoder is left out.

    Raises:
        ValueError: The file has no T5 encoder; the message says what it has.
    """
    keys = list(keys)
    prefix = _encoder_prefix(keys)
    root = prefix.removesuffix("encoder.")
    names = {}
    for key in keys:
        if key.startswith(prefix) and not key.startswith(prefix + "embed_tokens."):
            names["encoder." + key[len(prefix) :]] = key
    for embedding in (root + "shared", prefix + "embed_tokens"):
        for ending in ("weight", *FP8_SCALES):
            if f"{embedding}.{ending}" in keys:
                names.setdefault(f"shared.{ending}", f"{embedding}.{ending}")
    return {name: key for name, key in names.items() if name.startswith(("shared.", "encoder.block.", "encoder.final"))}


def t5_config(shapes: Mapping[str, Sequence[int]]) -> dict:
    """A T5 encoder's configuration from its tensors' shapes, for transformers' T5Config and ComfyUI's T5.

    Args:
        shapes: Tensor name, with any prefix -> shape.

    Raises:
        ValueError: The file has no T5 encoder, lacks tensors, or has layers or shapes that T5 does not have.
    """
    names = t5_names(shapes)
    by_name = {name: tuple(shapes[key]) for name, key in names.items()}
    layers = count_numbered(by_name, "encoder.block.", gaps=True)
    gated = any(".wi_0." in name for name in by_name)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    bias_per_layer = layers > 1 and bias.format(1) in by_name
    _check_complete(by_name, layers, gated, bias_per_layer)
    vocabulary, d_model = _matrix(by_name, "shared.weight")
    buckets, heads = _matrix(by_name, bias.format(0))
    inner = _matrix(by_name, "encoder." + FIRST_QUERY)[0]
    if inner % heads or buckets < FEWEST_BUCKETS:
        raise ValueError(
            f"the query width of the T5 file is {inner}, with {heads} heads and {buckets} buckets; expected a multiple "
            f"of its heads, and at least {FEWEST_BUCKETS} buckets"
        )
    d_ff = _matrix(by_name, f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0]
    _check_shapes(by_name, (vocabulary, d_model, inner, d_ff, buckets, heads))
    pile = bias_per_layer and vocabulary == PILE_VOCABULARY
    return {
        "model_type": "umt5" if bias_per_layer else "t5",
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


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    """The shape of a matrix. Raises ValueError for another number of dimensions, and for an empty one."""
    shape = shapes[name]
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} has shape {shape}; expected two sizes of at least 1. Download the file again")
    return shape


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], sizes: tuple[int, int, int, int, int, int]) -> None:
    """Raises ValueError for the first weight whose shape does not follow from a T5's sizes; others are left out."""
    vocabulary, d_model, inner, d_ff, buckets, heads = sizes
    endings = {
        "shared.weight": (vocabulary, d_model),
        "norm.weight": (d_model,),
        "relative_attention_bias.weight": (buckets, heads),
        "SelfAttention.o.weight": (d_model, inner),
        "DenseReluDense.wo.weight": (d_model, d_ff),
        **{f"SelfAttention.{part}.weight": (inner, d_model) for part in "qkv"},
        **{f"DenseReluDense.{part}.weight": (d_ff, d_model) for part in ("wi", "wi_0", "wi_1")},
    }
    for name, shape in shapes.items():
        expected = next((sizes for ending, sizes in endings.items() if name.endswith(ending)), shape)
        if shape != expected:
            raise ValueError(f"{name} has shape {shape}; expected {expected}. Download the file again")


def expected_names(layers: int, gated: bool, bias_per_layer: bool) -> list[str]:
    """All tensor names of a T5 encoder.

    Args:
        layers: Number of blocks.
        gated: Whether its feed-forward layers are gated (v1.1 and later).
        bias_per_layer: Whether every block has a relative position bias (UMT5), not only the first.
    """
    names = ["shared.weight", "encoder.final_layer_norm.weight"]
    feed_forward = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        names += [f"{block}.0.SelfAttention.{part}.weight" for part in "qkvo"]
        names += [f"{block}.{part}.layer_norm.weight" for part in (0, 1)]
        names += [f"{block}.1.DenseReluDense.{part}.weight" for part in feed_forward]
        if bias_per_layer or layer == 0:
            names.append(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    return names


def _check_complete(names: Iterable[str], layers: int, gated: bool, bias_per_layer: bool) -> None:
    """Raises ValueError if a file lacks tensors of such a T5 encoder, or has others; see `expected_names`."""
    expected = expected_names(layers, gated, bias_per_layer)
    missing = [name for name in expected if name not in names]
    if missing:
        raise ValueError(
            f"the T5 file lacks {first_few(missing)}; expected all tensors of {layers} encoder blocks. "
            "Download the file again or use a complete one."
        )
    allowed = set(expected)
    unexpected = [name for name in names if name not in allowed and name.rsplit(".", 1)[1] not in FP8_SCALES]
    if unexpected:
        raise ValueError(
            f"the file has {unexpected[0]}, which no T5 encoder has; expected a dense T5 (v1.0, v1.1, flan, mT5, UMT5, "
            "ByT5). Variants such as LongT5 or Switch are not supported."
        )


def _encoder_prefix(keys: Sequence[str]) -> str:
    """The prefix of the encoder's `block.0`, for example "text_encoders.t5xxl.transformer.encoder."."""
    encoder = [key for key in keys if not _is_decoder(key)]
    prefixes = [key.removesuffix(FIRST_QUERY) for key in encoder if key.endswith(FIRST_QUERY)]
    if not prefixes:  # tensors of the first block may be missing
        blocks = [key[: match.start()] for key in encoder if (match := _BLOCK.search(key))]
        prefixes = [f"{prefix}." if prefix else "" for prefix in blocks[:1]]
    if not prefixes:
        raise ValueError(f"no T5 encoder is in the file: {_model_kind(keys)}. Choose a T5 encoder or a full T5 model.")
    if len(prefixes) > 1:
        raise ValueError(f"the file has {len(prefixes)} T5 encoders ({', '.join(prefixes)}); expected one")
    return prefixes[0]


def _is_decoder(key: str) -> bool:
    return key.startswith("decoder.") or ".decoder." in key


def _model_kind(keys: Sequence[str]) -> str:
    """What kind of model a file without a T5 encoder has, for messages."""

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
