"""Files of a run's state: tensors with a digest of all that the file holds, so that a changed byte is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import write_tensors
from ..common.foreign import metadata_json, open_tensors, read_tensors, reading, whole_number

DIGEST = "retune.digest"
STATE = "retune.state"
"""Metadata of a state's step and all else that is no tensor, as JSON."""
_THREADS = 4
_MOST_STEPS = 10**12


def write_state_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata with their digest."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, ready, {**metadata, DIGEST: _digest(ready, metadata)})


def read_state_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Tensors, metadata, and whether a digest vouches for them: files of version 0.2 have none.

    Raises ValueError for a file that is damaged or whose content has changed since it was written.
    """
    with reading_state(path):
        tensors, metadata = read_tensors(path)
        digest = metadata.pop(DIGEST, None)
        if digest is not None and digest != _digest(tensors, metadata):
            raise ValueError("it has changed since it was written; expected the content of its digest")
        return tensors, metadata, digest is not None


@contextmanager
def reading_state(path: Path) -> Iterator[None]:
    """Turns whatever fails inside into ValueError that names the state's file."""
    try:
        with reading(path, "no state of a run"):
            yield
    except (ValueError, OSError) as error:
        raise ValueError(
            f"state file {path} cannot be read ({error}). Choose resume = restart to begin again."
        ) from error


def saved_step(path: Path) -> int:
    """The step of a saved state; 0 without one. Raises ValueError for a damaged file."""
    if not path.exists():
        return 0
    with reading_state(path), open_tensors(path) as file:
        return whole_number(metadata_json(file.metadata, STATE).get("step"), "its step", 0, _MOST_STEPS)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, and the metadata."""
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _tensor_digest(tensors[name]), names))
    return hashlib.sha256(
        json.dumps([sorted(metadata.items()), *zip(names, digests, strict=True)]).encode()
    ).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
