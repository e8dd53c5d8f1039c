"""Files of a run's state: tensors with a digest of all that the file holds, so that a changed byte is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..common.files import write_tensors
from ..common.foreign import TensorFile, metadata_json, open_tensors, reading, whole_number
from ..common.tensor_writer import tensor_bytes

DIGEST = "retune.digest"
STATE = "retune.state"
"""Metadata of a state's step and all else that is no tensor, as JSON."""
_NO_DIGEST = "0" * hashlib.sha256().digest_size * 2
"""Stands for the digest until all tensors are hashed."""
_THREADS = 4
_MOST_STEPS = 10**12


def write_state_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata with their digest, one tensor after the other; each is hashed while it is written."""
    digests: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as pool:

        def visit(name: str, tensor: Tensor) -> None:
            if digests:
                next(reversed(digests.values())).result()  # no more than two tensors are in RAM
            digests[name] = pool.submit(_tensor_digest, tensor)

        def late() -> dict[str, str]:
            return {DIGEST: _digest({name: digest.result() for name, digest in digests.items()}, metadata)}

        write_tensors(path, tensors, {**metadata, DIGEST: _NO_DIGEST}, visit, late)


def read_state_file(path: Path, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Tensors, metadata, and whether a digest vouches for them: files of version 0.2 have none.

    copy: whether tensors are copied into RAM; without it they stay in the file, which must not be written meanwhile.
    Raises ValueError for a file that is damaged or whose content has changed since it was written.
    """
    with reading_state(path), open_tensors(path) as file:
        metadata = dict(file.metadata)
        digest = metadata.pop(DIGEST, None)
        if digest is not None and digest != _digest(_file_digests(file), metadata):
            raise ValueError("it has changed since it was written; expected the content of its digest")
        tensors = {name: file.read(name).clone() if copy else file.read(name) for name in file.shapes}
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


def _file_digests(file: TensorFile) -> dict[str, str]:
    """The digest of each tensor of a file, which is read without being copied."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(file.shapes, pool.map(lambda name: _tensor_digest(file.read(name)), file.shapes), strict=True))


def _digest(digests: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, and the metadata; digests: by tensor."""
    return hashlib.sha256(json.dumps([sorted(metadata.items()), *sorted(digests.items())]).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
