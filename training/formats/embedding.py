"""Textual inversion files of every tool, read into one form: vectors by text encoder, and the file's metadata.

Layouts: A1111 (`string_to_param`, also in pictures), kohya and ai-toolkit (`emb_params`; for SDXL `clip_l` and
`clip_g`), OneTrainer (`emp_params`; `bundle_emb.<token>.<encoder>` within LoRAs), diffusers (the token as the key),
Replicate (`text_encoders_0`, `_1`), ComfyUI's list of dictionaries, a bare tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.foreign import existing_file, printable, read_pickle, read_tensors, reading, short
from ..common.text import first_few
from ..models.concepts import Concept
from .embedding_image import read_embedding_image
from .lora_keys import split_key

SAFETENSORS = (".safetensors", ".sft")
IMAGES = (".png", ".webp")
ENCODERS = {name: name for name in ("clip_l", "clip_g", "clip_h", "t5xxl", "t5base")} | {
    "t5": "t5xxl",
    "text_encoders_0": "clip_l",
    "text_encoders_1": "clip_g",
}
"""Key of a text encoder's vectors -> ComfyUI's name of that encoder."""
ONE_ENCODER = {"emp_params": "OneTrainer", "emb_params": "kohya", "*": "other"}
"""Key of the vectors in files for a single, unnamed text encoder -> the tool that writes it."""
MAX_VECTORS = 256
MAX_WIDTH = 1 << 15
"""Numbers in a vector; the widest known text encoder has 12288."""

_BUNDLE = "bundle_emb."
_A1111 = "string_to_param"


@dataclass(frozen=True)
class Embedding:
    """Trained concepts, ready to be saved.

    Args:
        concepts: A token and its vectors each.
        metadata: JSON values about the training; `save_embedding` reads `base` (SD1.x, ...), `steps`, `run` and
            `model` (fingerprint of the UNet).
    """

    concepts: tuple[Concept, ...]
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingFile:
    """The content of an embedding file.

    Args:
        name: File name, for messages.
        layout: The tool that writes such files.
        parts: (text encoder, (n, D) fp32 vectors) pairs. The encoder is "" where the file does not name it; then the
            width D decides.
        token: Token or name stored in the file, or "".
        metadata: All other entries, as text.
    """

    name: str
    layout: str
    parts: tuple[tuple[str, Tensor], ...]
    token: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> str:
        """Training step, or ""."""
        return self._first_entry("step", "steps", "ss_steps")

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint it was trained on, or ""; not the model family."""
        return self._first_entry("sd_checkpoint_name", "ss_sd_model_name")

    def _first_entry(self, *keys: str) -> str:
        """The first non-empty metadata entry among `keys`."""
        return next((value for key in keys if (value := self.metadata.get(key, ""))), "")


def read_embedding(path: str | Path, token: str = "") -> EmbeddingFile:
    """Reads an embedding of any layout: safetensors, a pickle that holds tensors only, or a picture.

    Args:
        token: The embedding to read from a file that holds several.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, has non-finite numbers, holds several embeddings and `token` selects none of
            them, or holds something else, such as a LoRA.
    """
    path = existing_file(path)
    suffix = path.suffix.lower()
    with reading(path, "no embedding"):
        if suffix in IMAGES:
            storage, content = read_embedding_image(path)
            return parse_embedding(path.name, content, token=token, picture=storage)
        content, metadata = _read_container(path, suffix)
        return parse_embedding(path.name, content, metadata, token)


def _read_container(path: Path, suffix: str) -> tuple[Any, dict[str, str]]:
    """Content and metadata of a safetensors file or a pickle."""
    _check_container(path, suffix)
    if suffix in SAFETENSORS:
        return read_tensors(path)
    # old files of the first implementation store their vectors in a ParameterDict; unpickling it runs no code
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        return read_pickle(path), {}


def parse_embedding(
    name: str, content: Any, metadata: Mapping[str, str] | None = None, token: str = "", picture: str = ""
) -> EmbeddingFile:
    """Recognises the layout of a loaded embedding file and extracts its vectors.

    Args:
        name: File name, for messages.
        content: The object stored in the file: a tensor, a list or a dictionary.
        metadata: The safetensors header's entries.
        token: The embedding to read where there are several.
        picture: "text chunk" or "pixels" for an embedding stored in a picture.

    Raises:
        ValueError: As `read_embedding`.
    """
    entries = {key: _unquote(value) for key, value in (metadata or {}).items()}
    if isinstance(content, Tensor):
        return EmbeddingFile(name, "a bare tensor", (("", _vectors(content, name, "it")),), "", entries)
    if isinstance(content, list):
        return EmbeddingFile(name, "ComfyUI list", _parse_list(name, content), "", entries)
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {_type_name(content)}; expected tensors by name. Is it an embedding?")
    if _A1111 in content:
        return _parse_a1111(name, content, picture)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    entries |= {str(k): _unquote(_text(value)) for k, value in content.items() if isinstance(value, str | int | float)}
    if bundled := {key: value for key, value in tensors.items() if key.startswith(_BUNDLE)}:
        return _parse_bundle(name, bundled, entries, token)
    return _parse_tensors(name, tensors, entries, token)


def _parse_tensors(name: str, tensors: dict[str, Tensor], entries: dict[str, str], token: str) -> EmbeddingFile:
    """Tensors named after encoders, or a single one under a fixed key or under its token."""
    _check_is_embedding(name, tensors)
    layout, stored = _tool_name(entries), _stored_token(entries)
    if tensors.keys() <= ENCODERS.keys():
        parts = _parts_by_encoder(name, tensors)
        return EmbeddingFile(name, layout or " + ".join(encoder for encoder, _ in parts), parts, stored, entries)
    if fixed := [key for key in tensors if key in ENCODERS or key in ONE_ENCODER]:
        key = fixed[0]
        if len(tensors) > 1:
            raise ValueError(
                f"{name} holds {first_few(sorted(tensors))}; expected {key} alone, or clip_l and clip_g. Is it whole?"
            )
        parts = (("", _vectors(tensors[key], name, key)),)
        return EmbeddingFile(name, layout or f"{ONE_ENCODER[key]} ({key})", parts, stored, entries)
    key = _select_key(name, tensors, token)
    return EmbeddingFile(name, layout or "diffusers", (("", _vectors(tensors[key], name, key)),), key, entries)


def _parse_a1111(name: str, content: dict, picture: str) -> EmbeddingFile:
    """A1111's dictionary: one tensor in `string_to_param`, further entries next to it."""
    params = content[_A1111]
    if isinstance(params, torch.nn.ParameterDict):
        params = vars(params).get("_parameters")
    if not isinstance(params, dict) or not all(isinstance(value, Tensor) for value in params.values()):
        raise ValueError(f"{name}: {_A1111} is {_type_name(params)}; expected one tensor by name. The file is damaged.")
    if len(params) != 1:
        raise ValueError(f"{name} holds {len(params)} embeddings ({first_few([*map(str, params)])}); expected one.")
    (key, tensor), *_ = params.items()
    entries = {str(k): _text(v) for k, v in content.items() if isinstance(v, str | int | float) and v != ""}
    layout = f"A1111 picture ({picture})" if picture else "A1111"
    return EmbeddingFile(name, layout, (("", _vectors(tensor, name, str(key))),), entries.get("name", ""), entries)


def _parse_bundle(name: str, tensors: dict[str, Tensor], entries: dict[str, str], token: str) -> EmbeddingFile:
    """Embeddings within a LoRA: keys `bundle_emb.<token>.<encoder>`, or `bundle_emb.<token>.string_to_param.*`."""
    by_token: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        path = key.removeprefix(_BUNDLE)
        if path.endswith(f".{_A1111}.*"):
            by_token[path.removesuffix(f".{_A1111}.*")][""] = value
        else:
            bundled_token, _, encoder = path.rpartition(".")
            by_token[bundled_token][encoder] = value
    selected = _select_key(name, by_token, token)
    vectors = by_token[selected]
    _check_no_output_embedding(name, vectors)
    if unknown := sorted(vectors.keys() - ENCODERS.keys() - {""}):
        raise ValueError(f"{name} holds {first_few(unknown)} for {selected}; expected some of {', '.join(ENCODERS)}.")
    return EmbeddingFile(name, "within a LoRA (bundle_emb)", _parts_by_encoder(name, vectors), selected, entries)


def _parts_by_encoder(name: str, tensors: Mapping[str, Tensor]) -> tuple[tuple[str, Tensor], ...]:
    """(encoder, vectors) pairs in the order of `ENCODERS`; the key "" stands for an unnamed encoder."""
    keys = [key for key in ("", *ENCODERS) if key in tensors]
    return tuple((ENCODERS.get(key, ""), _vectors(tensors[key], name, key or "it")) for key in keys)


def _parse_list(name: str, content: list) -> tuple[tuple[str, Tensor], ...]:
    """Joins all vectors of one width, as ComfyUI does for a list of dictionaries."""
    tensors = [value for entry in content if isinstance(entry, dict) for value in entry.values()]
    if not tensors or not all(isinstance(value, Tensor) for value in tensors):
        raise ValueError(
            f"{name} holds a list of {_type_name(next(iter(content), None))}; expected dictionaries of tensors."
        )
    by_width: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_width[tensor.shape[-1] if tensor.ndim else 0].append(_vectors(tensor, name, "the list"))
    return tuple(("", _vectors(torch.cat(vectors), name, "the list")) for vectors in by_width.values())


def _check_is_embedding(name: str, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for an empty file, a LoRA, a checkpoint or a text encoder."""
    if not tensors:
        raise ValueError(f"{name} holds no tensors; expected an embedding. Download or save it again.")
    _check_no_output_embedding(name, tensors)
    if layers := [key for key in tensors if split_key(key)[1] is not None]:
        raise ValueError(
            f"{name} is a LoRA ({first_few(layers, 2)}), no embedding. Move it to models/loras; use Apply LoRA."
        )
    if weights := [key for key in tensors if key.endswith((".weight", ".bias")) or tensors[key].ndim > 2]:
        raise ValueError(
            f"{name} holds {len(tensors)} tensors such as {first_few(weights, 2)}; expected an embedding. "
            "Is it a checkpoint or a text encoder?"
        )


def _check_no_output_embedding(name: str, keys: Mapping[str, Tensor]) -> None:
    """Raises ValueError for OneTrainer's output embeddings: they replace encoder outputs; their inputs are zeros."""
    if out := [key for key in keys if key.endswith("_out") and key.removesuffix("_out") in {*ENCODERS, *ONE_ENCODER}]:
        raise ValueError(
            f"{name} is an output embedding of OneTrainer ({first_few(out)}): its vectors stand in place of what the "
            "text encoder puts out, and no prompt can hold them. Train it again with 'output embedding' off."
        )


def _select_key(name: str, embeddings: Mapping[str, Any], token: str) -> str:
    """The only key, or `token` where there are several."""
    if len(embeddings) == 1:
        return next(iter(embeddings))
    if token in embeddings:
        return token
    raise ValueError(
        f"{name} holds {len(embeddings)} embeddings ({first_few(sorted(embeddings))}); expected one. "
        "Write one as token."
    )


def _vectors(tensor: Tensor, name: str, key: str) -> Tensor:
    """A (D,) or (n, D) tensor as (n, D) fp32; ValueError for another shape, dtype or non-finite numbers.

    Sizes are compared before anything is copied: a tensor in a pickle may repeat one number any number of times.
    """
    key = short(key).strip("'\"")
    if not tensor.is_floating_point() or tensor.ndim not in (1, 2) or not tensor.numel():
        shape = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        raise ValueError(f"{name}: {key} is {shape}; expected vectors (n, width) of floating-point numbers.")
    count, width = (1, *tensor.shape)[-2:]
    if count > MAX_VECTORS:
        raise ValueError(f"{name}: {key} has {count} vectors; expected at most {MAX_VECTORS}. Is it an embedding?")
    if width > MAX_WIDTH:
        raise ValueError(f"{name}: {key} is {width} wide; expected at most {MAX_WIDTH}. Is it an embedding?")
    vectors = tensor.detach().float().reshape(count, width).clone()
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{name} holds NaN or infinity in {key}; expected numbers. Use an earlier save.")
    return vectors


def _check_container(path: Path, suffix: str) -> None:
    """Raises ValueError for an empty file, and for a pickle named .safetensors or the reverse."""
    with path.open("rb") as file:
        start = file.read(10)
    if not start:
        raise ValueError(f"{path.name} is empty; expected an embedding. Download or save it again.")
    is_safetensors = start[5:9] == b"\0\0\0{"  # a length of 8 bytes, which may begin as a pickle does, and JSON
    if suffix in SAFETENSORS and start.startswith((b"PK\x03\x04", b"\x80")) and not is_safetensors:
        raise ValueError(f"{path.name} is a pickle by another name; expected safetensors. Rename it to {path.stem}.pt.")
    if suffix not in SAFETENSORS and is_safetensors:
        raise ValueError(
            f"{path.name} is safetensors by another name; expected a pickle. Rename it to {path.stem}.safetensors."
        )


def _tool_name(entries: Mapping[str, str]) -> str:
    """The tool named in the metadata's `software`, or ""."""
    software = entries.get("software", "")
    return next((tool for tool in ("ai-toolkit", "Retune") if tool in software), "")


def _stored_token(entries: Mapping[str, str]) -> str:
    """The token, else the name, that the file stores for itself."""
    return entries.get("token", "") or entries.get("name", "")


def _unquote(value: str) -> str:
    """A metadata value without the JSON quotation marks of ai-toolkit; null becomes ""."""
    if value.startswith('"') and value.endswith('"'):
        try:
            return printable(str(json.loads(value)))
        except json.JSONDecodeError:
            return value
    return "" if value == "null" else value


def _text(value: str | int | float) -> str:
    """A plain value of a pickle as a text that can be written and printed, of at most 1000 characters."""
    return short(value) if isinstance(value, int) else printable(str(value)[:1000])


def _type_name(value: Any) -> str:
    """ "a dict", "a list", ... for messages; "nothing" for None."""
    return "nothing" if value is None else f"a {type(value).__name__}"
