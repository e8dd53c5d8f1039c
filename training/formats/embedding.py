"""Textual inversion files of every tool in one form: vectors by text encoder, and what the file says of itself.

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

from ..common.files import read_pickle, read_tensors
from ..common.text import first_few
from ..models.concepts import Concept
from .embedding_image import read_embedding_image
from .lora import split_key

SAFETENSORS = (".safetensors", ".sft")
IMAGES = (".png", ".webp")
ENCODERS = {name: name for name in ("clip_l", "clip_g", "clip_h", "t5xxl", "t5base")} | {
    "t5": "t5xxl",
    "text_encoders_0": "clip_l",
    "text_encoders_1": "clip_g",
}
"""Key that stands for a text encoder -> ComfyUI's name of it."""
ONE_ENCODER = {"emp_params": "OneTrainer", "emb_params": "kohya", "*": "other"}
"""Key that stands for the only text encoder, whichever it is -> the tool that writes it."""
MOST_VECTORS = 256

_BUNDLE = "bundle_emb."
_A1111 = "string_to_param"


@dataclass(frozen=True)
class Embedding:
    """Concepts that a training gives. metadata: plain JSON; keys read here: `base` (SD1.x, ...), `steps`, `run`."""

    concepts: tuple[Concept, ...]
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingFile:
    """What a file holds.

    name: what messages call it. layout: the tool that writes such files. parts: (text encoder, (n, D) fp32) pairs; an
    empty name where the file says none, so that D has to tell. token: the word or name it gives itself, else empty.
    metadata: whatever else it says, as text.
    """

    name: str
    layout: str
    parts: tuple[tuple[str, Tensor], ...]
    token: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> str:
        return self._said("step", "steps", "ss_steps")

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint it was trained on; no family."""
        return self._said("sd_checkpoint_name", "ss_sd_model_name")

    def _said(self, *keys: str) -> str:
        return next((value for key in keys if (value := self.metadata.get(key, ""))), "")


def read_embedding(path: str | Path, token: str = "") -> EmbeddingFile:
    """Reads an embedding of any layout, as safetensors, as a pickle of tensors only, or from a picture.

    token: which one is meant, where a file holds several. Errors: FileNotFoundError; ValueError for a damaged file,
    numbers that are not finite, several embeddings and none chosen, a LoRA, or anything else that is no embedding.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        place, content = read_embedding_image(path)
        return parse_embedding(path.name, content, token=token, picture=place)
    _check_kind(path, suffix)
    if suffix in SAFETENSORS:
        content, metadata = read_tensors(path)
    else:
        # old files of the first implementation keep their vectors in a ParameterDict, which runs nothing either
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            content, metadata = read_pickle(path), {}
    return parse_embedding(path.name, content, metadata, token)


def parse_embedding(
    name: str, content: Any, metadata: Mapping[str, str] | None = None, token: str = "", picture: str = ""
) -> EmbeddingFile:
    """What the content of a file means; picture: where in a picture it was found. Errors: as `read_embedding`."""
    said = {key: _plain(value) for key, value in (metadata or {}).items()}
    if isinstance(content, Tensor):
        return EmbeddingFile(name, "a bare tensor", (("", _vectors(content, name, "it")),), "", said)
    if isinstance(content, list):
        return EmbeddingFile(name, "ComfyUI list", _listed(name, content), "", said)
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {_kind(content)}; expected tensors by name. Is it an embedding?")
    if _A1111 in content:
        return _a1111(name, content, picture)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    said |= {str(key): _plain(str(value)) for key, value in content.items() if isinstance(value, str | int | float)}
    if bundled := {key: value for key, value in tensors.items() if key.startswith(_BUNDLE)}:
        return _bundled(name, bundled, said, token)
    return _plain_tensors(name, tensors, said, token)


def _plain_tensors(name: str, tensors: dict[str, Tensor], said: dict[str, str], token: str) -> EmbeddingFile:
    """Tensors by encoder, or one under a fixed name or under its token."""
    _refuse_others(name, tensors)
    layout = _tool(said)
    if tensors.keys() <= ENCODERS.keys():
        parts = _by_encoder(name, tensors)
        return EmbeddingFile(name, layout or " + ".join(encoder for encoder, _ in parts), parts, _own_token(said), said)
    if shared := [key for key in tensors if key in ENCODERS or key in ONE_ENCODER]:
        if len(tensors) > 1:
            raise ValueError(
                f"{name} holds {first_few(sorted(tensors))}; expected {shared[0]} alone, or clip_l and clip_g. "
                "Is it whole?"
            )
        key = shared[0]
        parts = (("", _vectors(tensors[key], name, key)),)
        return EmbeddingFile(name, layout or f"{ONE_ENCODER[key]} ({key})", parts, _own_token(said), said)
    key = _chosen(name, tensors, token)
    return EmbeddingFile(name, layout or "diffusers", (("", _vectors(tensors[key], name, key)),), key, said)


def _a1111(name: str, content: dict, picture: str) -> EmbeddingFile:
    params = content[_A1111]
    if isinstance(params, torch.nn.ParameterDict):
        params = vars(params).get("_parameters")
    if not isinstance(params, dict) or not all(isinstance(value, Tensor) for value in params.values()):
        raise ValueError(f"{name}: {_A1111} is {_kind(params)}; expected one tensor by name. The file is damaged.")
    if len(params) != 1:
        raise ValueError(f"{name} holds {len(params)} embeddings ({first_few([*map(str, params)])}); expected one.")
    (key, tensor), *_ = params.items()
    said = {k: str(v) for k, v in content.items() if isinstance(v, str | int | float) and v != ""}
    layout = f"A1111 picture ({picture})" if picture else "A1111"
    return EmbeddingFile(name, layout, (("", _vectors(tensor, name, str(key))),), said.get("name", ""), said)


def _bundled(name: str, tensors: dict[str, Tensor], said: dict[str, str], token: str) -> EmbeddingFile:
    """Embeddings within a LoRA: `bundle_emb.<token>.<encoder>`, or `.string_to_param.*` for the only encoder."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        path = key.removeprefix(_BUNDLE)
        if path.endswith(f".{_A1111}.*"):
            found[path.removesuffix(f".{_A1111}.*")][""] = value
        else:
            word, _, encoder = path.rpartition(".")
            found[word][encoder] = value
    word = _chosen(name, found, token)
    _refuse_outputs(name, found[word])
    if unknown := sorted(found[word].keys() - ENCODERS.keys() - {""}):
        raise ValueError(f"{name} holds {first_few(unknown)} for {word}; expected some of {', '.join(ENCODERS)}.")
    return EmbeddingFile(name, "within a LoRA (bundle_emb)", _by_encoder(name, found[word]), word, said)


def _by_encoder(name: str, tensors: Mapping[str, Tensor]) -> tuple[tuple[str, Tensor], ...]:
    """Parts of tensors by key, in one order whatever that of the file; an empty key says no encoder."""
    keys = [key for key in ("", *ENCODERS) if key in tensors]
    return tuple((ENCODERS.get(key, ""), _vectors(tensors[key], name, key or "it")) for key in keys)


def _listed(name: str, content: list) -> tuple[tuple[str, Tensor], ...]:
    """As ComfyUI reads a list of dictionaries: all vectors of one width make one embedding."""
    tensors = [value for entry in content if isinstance(entry, dict) for value in entry.values()]
    if not tensors or not all(isinstance(value, Tensor) for value in tensors):
        raise ValueError(
            f"{name} holds a list of {_kind(next(iter(content), None))}; expected dictionaries of tensors."
        )
    by_width: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_width[tensor.shape[-1] if tensor.ndim else 0].append(_vectors(tensor, name, "the list"))
    return tuple(("", torch.cat(vectors)) for vectors in by_width.values())


def _refuse_others(name: str, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for what is no embedding at all."""
    if not tensors:
        raise ValueError(f"{name} holds no tensors; expected an embedding. Download or save it again.")
    _refuse_outputs(name, tensors)
    if layers := [key for key in tensors if split_key(key)[1] is not None]:
        raise ValueError(
            f"{name} is a LoRA ({first_few(layers, 2)}), no embedding. Move it to models/loras; use Apply LoRA."
        )
    if weights := [key for key in tensors if key.endswith((".weight", ".bias")) or tensors[key].ndim > 2]:
        raise ValueError(
            f"{name} holds {len(tensors)} tensors such as {first_few(weights, 2)}; expected an embedding. "
            "Is it a checkpoint or a text encoder?"
        )


def _refuse_outputs(name: str, keys: Mapping[str, Tensor]) -> None:
    """OneTrainer's output embeddings take the place of states after the encoder; their inputs are zeros."""
    if out := [key for key in keys if key.endswith("_out") and key.removesuffix("_out") in {*ENCODERS, *ONE_ENCODER}]:
        raise ValueError(
            f"{name} is an output embedding of OneTrainer ({first_few(out)}): its vectors stand in place of what the "
            "text encoder puts out, and no prompt can hold them. Train it again with 'output embedding' off."
        )


def _chosen(name: str, found: Mapping[str, Any], token: str) -> str:
    """The only key, or the one that `token` names."""
    if len(found) == 1:
        return next(iter(found))
    if token in found:
        return token
    raise ValueError(
        f"{name} holds {len(found)} embeddings ({first_few(sorted(found))}); expected one. Write one as token."
    )


def _vectors(tensor: Tensor, name: str, key: str) -> Tensor:
    """(n, D) fp32 of a tensor (D,) or (n, D), checked."""
    if not tensor.is_floating_point() or tensor.ndim not in (1, 2) or not tensor.numel():
        shape = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        raise ValueError(f"{name}: {key} is {shape}; expected vectors (n, width) of floating-point numbers.")
    vectors = tensor.detach().float().reshape(-1, tensor.shape[-1]).clone()
    if len(vectors) > MOST_VECTORS:
        raise ValueError(
            f"{name}: {key} has {len(vectors)} vectors; expected at most {MOST_VECTORS}. Is it an embedding?"
        )
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{name} holds NaN or infinity in {key}; expected numbers. Use an earlier save.")
    return vectors


def _check_kind(path: Path, suffix: str) -> None:
    """Raises ValueError for an empty file, and for a pickle or safetensors under the other's name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(10)
    if not start:
        raise ValueError(f"{path.name} is empty; expected an embedding. Download or save it again.")
    if suffix in SAFETENSORS and start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(f"{path.name} is a pickle by another name; expected safetensors. Rename it to {path.stem}.pt.")
    if suffix not in SAFETENSORS and start[8:9] == b"{" and not start.startswith((b"PK", b"\x80")):
        raise ValueError(
            f"{path.name} is safetensors by another name; expected a pickle. Rename it to {path.stem}.safetensors."
        )


def _tool(said: Mapping[str, str]) -> str:
    """The tool that the metadata names; empty when it names none."""
    software = said.get("software", "")
    return next((tool for tool in ("ai-toolkit", "Retune") if tool in software), "")


def _own_token(said: Mapping[str, str]) -> str:
    return said.get("token", "") or said.get("name", "")


def _plain(value: str) -> str:
    """A metadata text without the quotation marks that ai-toolkit's JSON puts around it."""
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json.loads(value))
        except json.JSONDecodeError:
            return value
    return "" if value == "null" else value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
