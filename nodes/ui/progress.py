"""A run in ComfyUI's interface: progress bar, text under the node, websocket events, cancel.

retune.step    after a step: step, steps, every figure of its row in metrics.jsonl, seconds_per_step, memory ({"used",
               "total"}, bytes of the device), and `validation`: rows since the step before
retune.sample  samples were drawn: their row, with the names of the files
retune.state   the run is preparing, running, interrupted, failed or finished, or says what it is doing: state, step,
               message

Each has `node` and `run` too, and goes to every client, so that a page that was reloaded goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from ...training.common.callbacks import Callbacks, StepInfo
from ...training.data.examples import Dataset
from ...training.models.protocols import TextToImage
from ..bridge.denoiser import ComfyDenoiser
from .heartbeat import Heartbeat
from .running import running

TEXT_INTERVAL = 0.5
"""Seconds between two texts under the node in phases that report often."""

last_steps: dict[str, dict[str, Any]] = {}
"""The last retune.step of each run that is in progress here, for a page that asks for a run in its midst."""


class NodeCallbacks(Callbacks):
    """Callbacks for a training node, entered while it works. Every call looks for ComfyUI's cancel and raises its
    interrupt; while entered, the run can be asked to finish (see `running`), and no phase is silent for long."""

    def __init__(self, node_id: str | None, run: str, steps: int):
        import comfy.model_management
        import comfy.utils

        self.interrupts = (KeyboardInterrupt, comfy.model_management.InterruptProcessingException)
        self._check = comfy.model_management.throw_exception_if_processing_interrupted
        self._bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self._node, self._run, self._steps, self._step = node_id, run, steps, 0
        self._denoiser: ComfyDenoiser | None = None
        self._memory = 0
        self._beat, self._while_entered = Heartbeat(self._say), ExitStack()
        self._state, self._validation = "preparing", []

    def __enter__(self) -> NodeCallbacks:
        self._finish = self._while_entered.enter_context(running(self._run))
        self._while_entered.enter_context(self._beat)
        self._say("loading")
        self._send("retune.state", {"state": self._state, "step": self._step, "message": "loading"})
        return self

    def __exit__(self, *error) -> None:
        self._while_entered.__exit__(*error)

    def is_out_of_memory(self, error: BaseException) -> bool:
        import comfy.model_management

        return comfy.model_management.is_oom(error)

    def wants_finish(self) -> bool:
        return self._finish.is_set()

    def keep_loaded(self, model: TextToImage, dataset: Dataset, batch_size: int, more: int = 0) -> None:
        """The UNet to bring back before a step when samples or caches have pushed it out, with room for a batch."""
        width, height = dataset.largest
        self.keep_ready(model, batch_size, height, width, more)

    def keep_ready(self, model: TextToImage, batch_size: int, height: int, width: int, more: int = 0) -> None:
        """The same for pictures of one size in pixels; more: bytes to keep free besides."""
        cells = model.autoencoder.downscale
        self._denoiser = model.denoiser
        needed = more + self._denoiser.activation_memory(batch_size, height // cells, width // cells)
        self._memory = max(self._memory, needed)

    def pulse(self) -> None:
        self._check()

    def before_step(self, step: int) -> None:
        self._check()
        self._beat.phase(f"step {step} of {self._steps}")

    def after_load(self) -> None:
        self._check()
        if self._denoiser is not None:
            self._denoiser.load(self._memory)

    def on_text(self, text: str) -> None:
        self._check()
        self._beat.phase(text)
        if self._beat.silence > TEXT_INTERVAL:
            self._say(text)
            self._send("retune.state", {"state": self._state, "step": self._step, "message": text})

    def on_end(self, text: str) -> None:
        self._check()
        self._say(text)

    def on_step(self, info: StepInfo) -> None:
        self._step = info.step
        self._bar.update_absolute(info.step, info.steps)
        left = (info.steps - info.step) * info.seconds_per_step
        self._say(f"step {info.step} of {info.steps}, loss {info.loss:.4f}, about {_duration(left)} left")
        pace = {"steps": info.steps, "seconds_per_step": info.seconds_per_step, "memory": _memory()}
        last_steps[self._run] = {**info.row, **pace}
        self._send("retune.step", {**last_steps[self._run], "validation": self._validation})
        self._validation = []
        self._check()

    def on_row(self, row: Mapping[str, Any]) -> None:
        if row["event"] == "sample":
            self._send("retune.sample", dict(row))
        elif row["event"] == "validation":
            self._validation.append(dict(row))
        self._check()

    def on_state(self, state: str, step: int, message: str = "") -> None:
        self._state, self._step = state, step
        if state != "running":
            last_steps.pop(self._run, None)
        self._send("retune.state", {"state": state, "step": step, "message": message})

    def _say(self, text: str) -> None:
        server = _server()
        if server is not None and self._node is not None:
            server.send_progress_text(text, self._node)
        self._beat.said()

    def _send(self, event: str, values: dict) -> None:
        server = _server()
        if server is not None:
            server.send_sync(event, {"node": self._node, "run": self._run, **values})


@contextmanager
def telling(node: type, phase: str) -> Iterator[None]:
    """Signs of life of a node that may take long and tells nothing else, and how long it took; node: its class."""
    node_id, server = node.hidden.unique_id if node.hidden else None, _server()

    def say(text: str) -> None:
        if server is not None and node_id is not None:
            server.send_progress_text(text, node_id)

    with Heartbeat(say, phase=phase) as beat:
        yield
    if beat.spoke:
        say(f"{phase}: done in {beat.seconds:.0f} s")


def _server():
    """The running PromptServer, or None in tests and scripts without a server."""
    import server

    return getattr(server.PromptServer, "instance", None)


def _memory() -> dict[str, int]:
    """Bytes in use, and of all, on the device that trains; of the machine where that is a CPU."""
    import comfy.model_management as management

    device = management.get_torch_device()
    total = management.get_total_memory(device)
    return {"used": int(total - management.get_free_memory(device)), "total": int(total)}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
