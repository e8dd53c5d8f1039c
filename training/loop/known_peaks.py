"""The peaks of a step's parts that were computed before, on disk by what they depend on: for SDXL computing them takes
a CPU 20 seconds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import write_json
from ..common.foreign import read_json
from ..config.run import RunConfig

log = logging.getLogger(__name__)

KEPT = 64
"""Entries of a file; the oldest are forgotten."""
FILE = "memory.json"
_OTHER = ("run_name", "steps", "learning_rate", "seed", "resume")
"""Settings that no tensor's size depends on."""
_LIBRARIES = ("diffusers", "transformers", "lycoris-lora")
"""Those that compute in a step besides torch."""
Peaks = dict[str, tuple[int, int]]


class KnownPeaks:
    """One entry of a file of peaks.

    Args:
        folder: the file's.
        key: of what the peaks depend on, such as `key_of` gives it.
    """

    def __init__(self, folder: Path, key: str):
        self._path, self._key = folder / FILE, key

    def read(self) -> Peaks | None:
        """Part -> its peaks; None where they were not computed before."""
        found = self._entries().get(self._key)
        return None if found is None else {name: (int(peak), int(less)) for name, (peak, less) in found.items()}

    def write(self, peaks: Peaks) -> None:
        """Keeps the peaks."""
        entries = self._entries()
        entries.pop(self._key, None)
        kept = dict(list(entries.items())[1 - KEPT :])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {**kept, self._key: peaks})

    def _entries(self) -> dict[str, Any]:
        try:
            return read_json(self._path, dict)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            log.warning("%s; it is written anew", error)
            return {}


def key_of(
    config: RunConfig,
    networks: Iterable[nn.Module],
    tensors: Mapping[str, Any],
    *more: Any,
    versions: Mapping[str, str] | None = None,
) -> str:
    """A key of all that the size of a step's tensors depends on, with this package's code and the libraries' versions.

    Args:
        config: the run's.
        networks: the module trees that compute.
        tensors: others that are in memory, by name: what trains, the weights of the text encoder.
        more: such as the loaded sample and the batch size.
        versions: of other programs that compute, such as ComfyUI, by name.
    """
    used = {"torch": torch.__version__, **{name: version(name) for name in _LIBRARIES}, **(versions or {})}
    settings = {name: value for name, value in asdict(config).items() if name not in _OTHER}
    parts = [used, _code(), settings, [_about_network(n) for n in networks], _about(tensors), _about(more)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _code() -> str:
    """Hash of the source files of `training/`."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _about_network(network: nn.Module) -> list:
    modules = [(name, type(m).__module__, type(m).__qualname__, m.training) for name, m in network.named_modules()]
    return [
        modules,
        [(name, _about(tensor)) for name, tensor in (*network.named_parameters(), *network.named_buffers())],
    ]


def _about(value: Any) -> Any:
    """What a value has to do with the size of tensors: shapes in place of numbers."""
    if isinstance(value, Tensor):
        return (type(value).__name__, tuple(value.shape), str(value.dtype), value.device.type, value.nbytes)
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, [_about(getattr(value, field.name)) for field in fields(value)])
    if isinstance(value, Mapping):
        return [(str(name), _about(entry)) for name, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_about(entry) for entry in value]
    return repr(value)
