"""LoRA files of every trainer, read into one form: layers by name, each with tensors under LyCORIS's names.

Layouts: kohya (`lora_unet_<layer>.lora_down.weight`, `alpha`), LyCORIS in the same naming (`hada_*`, `lokr_*`,
`dora_scale`, `diff`), diffusers and peft (`unet.<layer>.lora_A.weight`, alpha in the metadata), OneTrainer (kohya's
names, or `unet.input_blocks.<...>`), ComfyUI's own (`diffusion_model.<layer>`). Without alpha in a file, alpha = rank.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..common.foreign import is_file, read_json, read_pickle, read_tensors, reading
from ..common.text import first_few
from .lora_foreign import foreign_adapter, foreign_content
from .lora_keys import DOWN, GLORA, LOHA, LOKR, MID, PEFT, SCALES, SINGULAR, UP, is_text_layer, rank_of, split_key
from .lora_peft import read_settings, settle

LONGEST_KEY = 1000
MOST_NUMBERS = 1 << 27
"""Numbers in the difference of one layer; the largest known one is as large as T5-XXL's vocabulary, 132 million."""


@dataclass(frozen=True)
class LoraModule:
    """One layer of a LoRA.

    Args:
        name: The layer's name as in the file.
        tensors: LyCORIS's name -> tensor.
        keys: LyCORIS's name -> the tensor's key in the file.
    """

    name: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]

    @property
    def kind(self) -> str:
        """LoRA, LoCon, LoHa, LoKr, GLoRA, OFT, BOFT or full diff; DoRA or "... with DoRA" if it has a magnitude."""
        magnitude = "dora_scale" in self.tensors
        if DOWN in self.tensors:
            kernel = self.tensors.get(MID, self.tensors[DOWN]).shape[2:]
            plain = "LoCon" if math.prod(kernel) > 1 else "LoRA"
            return "DoRA" if magnitude and plain == "LoRA" else plain + " with DoRA" * magnitude
        kinds = {"hada_w1_a": "LoHa", "a1.weight": "GLoRA"} | dict.fromkeys(LOKR, "LoKr")
        kind = next((kind for name, kind in kinds.items() if name in self.tensors), "full diff")
        if "oft_blocks" in self.tensors:
            kind = "BOFT" if self.tensors["oft_blocks"].ndim == 4 else "OFT"
        return kind + " with DoRA" * magnitude

    @property
    def rank(self) -> int | None:
        """Rank r of the decomposition; None for kinds without one."""
        return rank_of(self.tensors)

    @property
    def alpha(self) -> float | None:
        """alpha of the scale alpha / rank; None if the file has none, which means alpha = rank."""
        return self.tensors["alpha"].item() if "alpha" in self.tensors else None

    @property
    def is_text(self) -> bool:
        """Whether it is a layer of a text encoder."""
        return is_text_layer(self.name)

    @cached_property
    def shape(self) -> tuple[int, int | None] | None:
        """(out, in) of the weight it changes, with a convolution's kernel folded into `in`; None if unknown.

        Raises:
            ValueError: A tensor is missing, or shapes do not match.
        """
        try:
            return _weight_shape(self.tensors)
        except KeyError as missing:
            raise ValueError(f"layer {self.name} lacks {missing.args[0]}") from missing
        except (ValueError, IndexError) as error:
            raise ValueError(f"layer {self.name}: {error}") from error


@dataclass(frozen=True)
class Lora:
    """The content of a LoRA file.

    Args:
        name: File name, for messages.
        modules: Layer name as in the file -> the layer's tensors.
        other_keys: Keys that do not belong to a LoRA, such as those of embeddings bundled by OneTrainer.
        metadata: The safetensors header's entries.
    """

    name: str
    modules: dict[str, LoraModule]
    other_keys: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def key_count(self) -> int:
        """Number of tensors in the file."""
        return sum(len(module.keys) for module in self.modules.values()) + len(self.other_keys)


def read_lora(path: str | Path, name: str | None = None) -> Lora:
    """Reads a LoRA file; messages call it `name`, by default its file name. Errors: as the two functions it calls."""
    return parse_lora(name or Path(path).name, *read_lora_tensors(path))


def read_lora_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata of a safetensors file, or of a pickle that holds tensors only.

    For peft's adapter_model.*, the adapter_config.json next to it goes into the metadata, as diffusers stores it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file, or the settings next to it, are damaged.
    """
    path = Path(path)
    if path.suffix.lower() in (".safetensors", ".sft"):
        tensors, metadata = read_tensors(path)
    else:
        tensors, metadata = _read_pickle(path), {}
    config = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and is_file(config):
        metadata = metadata | {PEFT: json.dumps(read_json(config, dict))}
        with reading(config, "no settings of peft"):
            read_settings(metadata)  # damage in them is this file's, not the tensors'
    return tensors, metadata


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, or of its entry `state_dict`."""
    state = read_pickle(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = state if isinstance(state, dict) else {}
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}


def parse_lora(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Lora:
    """Groups the tensors of a file, or of ComfyUI's LORA_MODEL, by layer.

    peft's settings (`lora_alpha`, `alpha`, patterns, `use_rslora` in the metadata) become an alpha of each layer or a
    factor of its tensors, as in the other layouts; see `lora_peft`.

    Args:
        name: File name, for messages.
        tensors: Key -> tensor.
        metadata: The safetensors header's entries.

    Raises:
        ValueError: There is no LoRA, or a layer is incomplete, not finite, or of two kinds; the message names keys.
    """
    metadata = dict(metadata or {})
    with reading(name):
        layers, keys, others = _group(tensors)
        settings = read_settings(metadata)
        for layer, parts in layers.items():
            settle(layer, parts, settings)
        modules = {n: LoraModule(n, parts, keys[n]) for n, parts in layers.items() if parts.keys() - set(SCALES)}
        others += [key for n in layers if n not in modules for key in keys[n].values()]
        _expect_lora(modules, others)
        lora = Lora(name, modules, tuple(others), metadata)
        _check_layers(lora)
    return lora


def _group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict], dict[str, dict], list[str]]:
    """(layer -> role -> tensor, layer -> role -> key, keys that belong to no LoRA)."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    others = []
    for key, tensor in tensors.items():
        if len(key) > LONGEST_KEY:
            raise ValueError(f"it has a key of {len(key)} characters; expected at most {LONGEST_KEY}")
        layer, role = split_key(key)
        if role is None:
            others.append(key)
            continue
        if role in layers[layer]:
            raise ValueError(
                f"{keys[layer][role]} and {key} are the same part of one layer; expected one adapter. Save each "
                "as a file of its own"
            )
        layers[layer][role], keys[layer][role] = _reshape_magnitude(_numbers(key, tensor), key), key
    pruned = [n for n, parts in layers.items() if SINGULAR in parts and not parts[SINGULAR].numel()]
    for layer in pruned:  # AdaLoRA has given these layers rank 0: no change
        del layers[layer], keys[layer]
    return layers, keys, others


def _numbers(key: str, tensor: Tensor) -> Tensor:
    """The tensor without gradient; ValueError for one that holds no numbers a weight can be changed by."""
    if tensor.is_complex() or not (tensor.is_floating_point() or key.endswith((".alpha", ".reshape_weight"))):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{key} is of {kind}; expected floating-point numbers. Is it quantised? Use the original file")
    return tensor.detach()


def _expect_lora(modules: Mapping[str, LoraModule], others: list[str]) -> None:
    """Raises ValueError if there is no layer, or an adapter of a kind that is not read."""
    if adapter := foreign_adapter(others):
        key, what, advice = adapter
        raise ValueError(f"it holds {what}, in keys such as {key}; expected LoRA, LoHa, LoKr, OFT or GLoRA. {advice}")
    if not modules:
        content = f", but {first_few(others)}" if others else " and no tensors at all"
        advice = foreign_content(others) or " Is it a LoRA?"
        raise ValueError(f"it holds no LoRA{content}; expected keys such as <layer>.lora_down.weight.{advice}")


def dora_axis(scale: Tensor, shape: tuple[int, ...]) -> int:
    """The axis of the weight along which a DoRA magnitude varies: 0 (outputs) or 1 (inputs).

    LyCORIS and OneTrainer write (out, 1, ...) or (1, in, ...), peft (out,).

    Args:
        scale: The magnitude.
        shape: Shape of the weight.

    Raises:
        ValueError: The magnitude fits neither axis.
    """
    count = scale.numel()
    if count == shape[0] and (scale.shape[0] == count or len(shape) < 2 or count != shape[1]):
        return 0
    if len(shape) > 1 and count == shape[1]:
        return 1
    raise ValueError(f"dora_scale has {count} numbers; expected {shape[0]} outputs or {tuple(shape[1:2])} inputs")


def magnitude_axis(module: LoraModule, kernel: tuple[int, ...] = ()) -> int | None:
    """`dora_axis` of a layer; None without DoRA.

    Args:
        module: The layer.
        kernel: Kernel of the convolution, used where the layer's tensors are flat.
    """
    if "dora_scale" not in module.tensors:
        return None
    scale, (rows, columns) = module.tensors["dora_scale"], module.shape
    down_kernel = module.tensors[DOWN].shape[2:] if DOWN in module.tensors and MID not in module.tensors else ()
    return dora_axis(scale, (rows, columns // math.prod(down_kernel or kernel) if columns else scale.numel()))


def _reshape_magnitude(tensor: Tensor, key: str) -> Tensor:
    """Reshapes peft's DoRA magnitude, (out,) or (1, out, 1, 1), to LyCORIS's (out, 1); other tensors stay."""
    is_flat = key.endswith(".dora_scale") and tensor.ndim == 1
    return tensor.reshape(-1, 1) if is_flat or ".lora_magnitude_vector" in key else tensor


def _check_layers(lora: Lora) -> None:
    """Raises ValueError if a layer is incomplete, empty, not finite, or of two kinds at once; the message names it."""
    for module in lora.modules.values():
        empty = [name for name, value in module.tensors.items() if not value.numel()]
        if empty:
            raise ValueError(f"{first_few(empty)} of {module.name} is empty. The file is damaged; save it again.")
        try:
            size = module.shape
        except ValueError as error:
            raise ValueError(f"{error}. The file is damaged; download or save it again.") from error
        if size and size[0] * (size[1] or 1) > MOST_NUMBERS:
            raise ValueError(f"layer {module.name} is {size[0]} x {size[1]}; expected at most {MOST_NUMBERS} numbers.")
        if "alpha" in module.tensors and module.tensors["alpha"].numel() != 1:
            shape = tuple(module.tensors["alpha"].shape)
            raise ValueError(f"alpha of {module.name} has the shape {shape}; expected one number.")
    bad = [
        module.keys.get(role, f"{role} of {module.name}")
        for module in lora.modules.values()
        for role, value in module.tensors.items()
        if not is_finite(value)
    ]
    if bad:
        raise ValueError(
            f"it holds NaN or infinity in {first_few(bad)}; expected numbers that fp32 has. Use an earlier save."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite in fp32, in which differences are computed."""
    return bool(torch.isfinite(tensor.float()).all())


def _weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int | None] | None:
    """(out, in) of the difference; KeyError for a missing tensor, ValueError for shapes that do not match."""
    shapes = [shape(tensors) for names, shape in _SHAPES if not tensors.keys().isdisjoint(names)]
    if len(shapes) > 1:
        raise ValueError("it holds two kinds of LoRA at once")
    return shapes[0] if shapes else None


def _lora_shape(t: Mapping[str, Tensor]) -> tuple[int, int]:
    if MID in t:
        return _tucker_shape(t[MID], t[UP].flatten(1).T, t[DOWN].flatten(1))
    return _product_shape(t[UP], t[DOWN])


def _loha_shape(t: Mapping[str, Tensor]) -> tuple[int, int]:
    """Shape of the Hadamard product of two matrices, each a product of low rank."""
    pairs = (("hada_t1", *LOHA[:2]), ("hada_t2", *LOHA[2:]))
    tucker = "hada_t1" in t or "hada_t2" in t
    first, second = (
        _tucker_shape(t[core], t[a], t[b]) if tucker else _product_shape(t[a], t[b]) for core, a, b in pairs
    )
    if first != second:
        raise ValueError(f"its factors make {first} and {second}")
    return first


def _lokr_shape(t: Mapping[str, Tensor]) -> tuple[int, int]:
    """Shape of the Kronecker product of two factors, each whole or a product of low rank."""
    first = _flat_shape(t["lokr_w1"]) if "lokr_w1" in t else _product_shape(t["lokr_w1_a"], t["lokr_w1_b"])
    if "lokr_w2" in t:
        second = _flat_shape(t["lokr_w2"])
    elif "lokr_t2" in t:
        second = _tucker_shape(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        second = _product_shape(t["lokr_w2_a"], t["lokr_w2_b"])
    return first[0] * second[0], first[1] * second[1]


def _glora_shape(t: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Shape of a GLoRA's part that does not depend on the weight, in either of its layouts; None if both fit."""
    a1, a2, b1, b2 = (_flat_shape(t[name]) for name in GLORA)
    shapes = []
    if b2[1] == b1[0] == a1[0] == a2[1]:
        shapes.append((b2[0], b1[1]))
    if b2[0] == b1[1] == a1[1] == a2[0]:
        shapes.append((b1[0], b2[1]))
    if not shapes:
        raise ValueError(f"its factors are {a1}, {a2}, {b1} and {b2}, whose ranks differ")
    return shapes[0] if len(shapes) == 1 else None


def _oft_shape(t: Mapping[str, Tensor]) -> tuple[int, None]:
    """Number of outputs; an OFT rotates outputs and has no inputs."""
    blocks = t["oft_blocks"]
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"its oft_blocks are {tuple(blocks.shape)}; expected square blocks")
    return math.prod(blocks.shape[-3:-1]), None


def _full_shape(t: Mapping[str, Tensor]) -> tuple[int, int]:
    return _flat_shape(next(t[name] for name in ("diff", "set_weight", "w_norm") if name in t))


_SHAPES = (
    ((DOWN, UP, MID), _lora_shape),
    ((*LOHA, "hada_t1", "hada_t2"), _loha_shape),
    (LOKR, _lokr_shape),
    (GLORA, _glora_shape),
    (("oft_blocks",), _oft_shape),
    (("diff", "set_weight", "w_norm"), _full_shape),
)


def _flat_shape(tensor: Tensor) -> tuple[int, int]:
    """Shape of the tensor flattened to a matrix; (1, 1) for a scalar."""
    return (tensor.shape[0], tensor.shape[1:].numel()) if tensor.ndim else (1, 1)


def _product_shape(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Shape of the matrix product a b, with kernels folded into the columns."""
    (rows, inner), (rank, columns) = _flat_shape(a), _flat_shape(b)
    if inner != rank or not rank or min(a.ndim, b.ndim) < 2:
        raise ValueError(f"its factors are {tuple(a.shape)} and {tuple(b.shape)}, whose ranks differ")
    return rows, columns


def _tucker_shape(core: Tensor, a: Tensor, b: Tensor) -> tuple[int, int]:
    """Shape of the product of a Tucker core (r, r, *kernel), a (r, rows) and b (r, columns)."""
    if core.ndim < 2 or not core.shape[0] == core.shape[1] == a.shape[0] == b.shape[0]:
        raise ValueError(f"its core is {tuple(core.shape)}; its factors are {tuple(a.shape)} and {tuple(b.shape)}")
    return a.shape[1], b.shape[1] * core.shape[2:].numel()
