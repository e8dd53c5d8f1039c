"""A run in ComfyUI's interface: progress bar, preview pictures, text under the node, websocket events, cancel."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from ..training.callbacks import Callbacks, StepInfo
from ..training.data.examples import Dataset
from ..training.model import TextToImage
from .bridge import ComfyDenoiser
from .heartbeat import Heartbeat
from .running import running

TEXT_INTERVAL = 0.5
"""Seconds between two texts under the node in phases that report often."""


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

    def __enter__(self) -> NodeCallbacks:
        self._finish = self._while_entered.enter_context(running(self._run))
        self._while_entered.enter_context(self._beat)
        self._say("loading")
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
        largest = max(dataset.examples, key=lambda example: example.width * example.height)
        self.keep_ready(model, batch_size, largest.height, largest.width, more)

    def keep_ready(self, model: TextToImage, batch_size: int, height: int, width: int, more: int = 0) -> None:
        """The same for pictures of one size in pixels; more: bytes to keep free besides."""
        cells = model.autoencoder.downscale
        self._denoiser = model.denoiser
        self._memory = more + self._denoiser.activation_memory(batch_size, height // cells, width // cells)

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

    def on_end(self, text: str) -> None:
        self._check()
        self._say(text)

    def on_step(self, info: StepInfo) -> None:
        self._step = info.step
        self._bar.update_absolute(info.step, info.steps)
        left = (info.steps - info.step) * info.seconds_per_step
        self._say(f"step {info.step} of {info.steps}, loss {info.loss:.4f}, about {_duration(left)} left")
        self._send("retune.step", {"step": info.step, "steps": info.steps, "loss": info.loss})
        self._check()

    def on_samples(self, step: int, images: list[Tensor]) -> None:
        from ..training.data.images import contact_sheet, to_pil

        self._bar.update_absolute(self._step, self._steps, ("PNG", to_pil(contact_sheet(images)), 512))
        self._send("retune.sample", {"step": step, "count": len(images)})
        self._check()

    def _say(self, text: str) -> None:
        server = _server()
        if server is not None and self._node is not None:
            server.send_progress_text(text, self._node)
        self._beat.said()

    def _send(self, event: str, values: dict) -> None:
        server = _server()
        if server is not None:
            server.send_sync(event, {"node": self._node, "run": self._run, **values})


def telling(node: type, phase: str) -> Heartbeat:
    """Signs of life of a node that may take long and tells nothing else, while entered; node: its class."""
    node_id, server = node.hidden.unique_id if node.hidden else None, _server()

    def say(text: str) -> None:
        if server is not None and node_id is not None:
            server.send_progress_text(text, node_id)

    return Heartbeat(say, phase=phase)


def _server():
    """The running PromptServer, or None in tests and scripts without a server."""
    import server

    return getattr(server.PromptServer, "instance", None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
