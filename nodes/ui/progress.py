"""A run in ComfyUI's interface: progress bar, text under the node, websocket events, cancel.

retune.step    after a step: step, steps, every figure of its row in metrics.jsonl, seconds_per_step, memory ({"used",
               "total"}, bytes of the device), and `validation`: rows since the previous step
retune.sample  after samples were drawn: their row, with the names of the files
retune.state   when the state (preparing, running, interrupted, failed, finished) or the message changes: state, step,
               message

Each has `node` and `run` too, and is sent to every client, so that a page resumes after it was reloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...training.common.callbacks import Callbacks, StepInfo
from ...training.data.examples import Dataset
from ...training.models.protocols import TextToImage
from ...training.runs.index import finite
from ..bridge.denoiser import ComfyDenoiser
from .errors import last_states
from .heartbeat import Heartbeat
from .running import running

TEXT_INTERVAL = 0.5
"""Seconds between two texts under the node in phases that report more often."""

last_steps: dict[str, dict[str, Any]] = {}
"""The last retune.step of each run in progress, for a page that opens during the run."""


class NodeCallbacks(Callbacks):
    """Callbacks of a training node: progress in the interface, cancel, finish, memory.

    Every call raises ComfyUI's interrupt if the user cancelled. While entered, the run can be asked to finish (see
    `running`), and long phases send texts.

    Args:
        node_id: of the node that shows the progress, or None.
        run: name of the run.
        steps: optimizer steps in all.
    """

    def __init__(self, node_id: str | None, run: str, steps: int):
        import comfy.model_management
        import comfy.utils

        self.interrupts = (KeyboardInterrupt, comfy.model_management.InterruptProcessingException)
        self._raise_if_cancelled = comfy.model_management.throw_exception_if_processing_interrupted
        self._bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self._node, self._run, self._steps, self._step = node_id, run, steps, 0
        self._denoiser: ComfyDenoiser | None = None
        self._reserved = 0
        self._heartbeat, self._while_entered = Heartbeat(self._send_text), ExitStack()
        self._state, self._validation = "preparing", []

    def __enter__(self) -> NodeCallbacks:
        self._finish = self._while_entered.enter_context(running(self._run))
        self._while_entered.enter_context(self._heartbeat)
        self._send_text("loading")
        self._send_event("retune.state", {"state": self._state, "step": self._step, "message": "loading"})
        return self

    def __exit__(self, *error) -> None:
        self._while_entered.__exit__(*error)

    def is_out_of_memory(self, error: BaseException) -> bool:
        import comfy.model_management

        return comfy.model_management.is_oom(error)

    def wants_finish(self) -> bool:
        return self._finish.is_set()

    def reserve_for_dataset(self, model: TextToImage, dataset: Dataset, batch_size: int, extra: int = 0) -> None:
        """As `reserve`, for the largest pictures of a dataset."""
        width, height = dataset.largest
        self.reserve(model, batch_size, height, width, extra)

    def reserve(self, model: TextToImage, batch_size: int, height: int, width: int, extra: int = 0) -> None:
        """Has the UNet loaded again, and memory freed for a step, whenever samples or caches may have displaced it.

        Of several calls the largest memory counts.

        Args:
            model: the model that trains.
            batch_size: pictures in a batch.
            height, width: of the pictures, in pixels.
            extra: further bytes to leave free.
        """
        downscale = model.autoencoder.downscale
        self._denoiser = model.denoiser
        memory = extra + self._denoiser.activation_memory(batch_size, height // downscale, width // downscale)
        self._reserved = max(self._reserved, memory)

    def pulse(self) -> None:
        self._raise_if_cancelled()

    def before_step(self, step: int) -> None:
        self._raise_if_cancelled()
        self._heartbeat.set_phase(f"step {step} of {self._steps}")

    def after_load(self) -> None:
        self._raise_if_cancelled()
        if self._denoiser is not None:
            self._denoiser.load(self._reserved)

    def on_text(self, text: str) -> None:
        self._raise_if_cancelled()
        self._heartbeat.set_phase(text)
        if self._heartbeat.silence > TEXT_INTERVAL:
            self._send_text(text)
            self._send_event("retune.state", {"state": self._state, "step": self._step, "message": text})

    def on_memory(self, text: str, needed: int) -> None:
        self._raise_if_cancelled()
        self._reserved = max(self._reserved, needed)  # ComfyUI's own figure is a guess
        self._send_text(text)
        self._send_event("retune.state", {"state": self._state, "step": self._step, "message": text})

    def managed_bytes(self, device: torch.device) -> int:
        return sum(int(m.model_loaded_memory()) for m in self._idle_models() if m.device == device)

    def idle_networks(self) -> Sequence[nn.Module]:
        return [m.model.model for m in self._idle_models()]

    def _idle_models(self) -> list:
        """What ComfyUI has loaded besides the models that every step computes with."""
        import comfy.model_management

        needed = [] if self._denoiser is None else [self._denoiser.patcher, *self._denoiser.keep_loaded]
        own = {id(patcher.model) for patcher in needed}
        loaded = [m for m in comfy.model_management.current_loaded_models if m.model is not None]
        return [m for m in loaded if id(m.model.model) not in own]

    def versions(self) -> Mapping[str, str]:
        from comfyui_version import __version__

        return {"ComfyUI": __version__}

    def on_end(self, text: str) -> None:
        self._raise_if_cancelled()
        self._send_text(text)

    def on_step(self, info: StepInfo) -> None:
        self._step = info.step
        self._bar.update_absolute(info.step, info.steps)
        left = (info.steps - info.step) * info.seconds_per_step
        self._send_text(f"step {info.step} of {info.steps}, loss {info.loss:.4f}, about {_duration(left)} left")
        pace = {"steps": info.steps, "seconds_per_step": info.seconds_per_step, "memory": _memory()}
        last_steps[self._run] = {**info.row, **pace}
        self._send_event("retune.step", {**last_steps[self._run], "validation": self._validation})
        self._validation = []
        self._raise_if_cancelled()

    def on_row(self, row: Mapping[str, Any]) -> None:
        if row["event"] == "sample":
            self._send_event("retune.sample", dict(row))
        elif row["event"] == "validation":
            self._validation.append(dict(row))
        self._raise_if_cancelled()

    def on_state(self, state: str, step: int, message: str = "") -> None:
        self._state, self._step = state, step
        last_states[self._run] = state
        if state != "running":
            last_steps.pop(self._run, None)
        self._send_event("retune.state", {"state": state, "step": step, "message": message})

    def _send_text(self, text: str) -> None:
        server = _server()
        if server is not None and self._node is not None:
            server.send_progress_text(text, self._node)
        self._heartbeat.reset()

    def _send_event(self, event: str, values: dict) -> None:
        server = _server()
        if server is not None:
            server.send_sync(event, finite({"node": self._node, "run": self._run, **values}))


@contextmanager
def reporting(node: type, phase: str) -> Iterator[None]:
    """While entered, sends regular texts for a node without other progress, and at the end the seconds it took.

    Args:
        node: the node's class, as `execute` gets it.
        phase: what the node does.
    """
    node_id, server = node.hidden.unique_id if node.hidden else None, _server()

    def send(text: str) -> None:
        if server is not None and node_id is not None:
            server.send_progress_text(text, node_id)

    with Heartbeat(send, phase=phase) as heartbeat:
        yield
    if heartbeat.sent:
        send(f"{phase}: done in {heartbeat.phase_seconds:.0f} s")


def _server():
    """The running PromptServer, or None in tests and scripts without a server."""
    import server

    return getattr(server.PromptServer, "instance", None)


def _memory() -> dict[str, int]:
    """Bytes used and in total on the device that trains; of the machine where that is a CPU."""
    import comfy.model_management as management

    device = management.get_torch_device()
    total = management.get_total_memory(device)
    return {"used": int(total - management.get_free_memory(device)), "total": int(total)}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
