"""Runs workflows through a real ComfyUI without a browser: starts it, queues API-format prompts, records its events.

Standard library only, apart from aiohttp (one of ComfyUI's own requirements) for the event stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
NOT_PACKAGED = (".*", "*.egg-info", "__pycache__", "build", "dist", "output", "tests", "benchmarks", "tools")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on 127.0.0.1
COPY_MARK = ".copied-for-tests-and-demo"
TEXT_EVENT = 3  # ComfyUI's BinaryEventTypes.TEXT; every other binary message is a preview image


class WorkflowFailed(RuntimeError):
    """A node failed or was interrupted, or ComfyUI itself ended."""


class Server:
    """A running ComfyUI: its `url`, `process`, `base_directory`, `log` file and the `events` it has sent so far."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log
        self.base_directory = log.parent
        self.client_id = uuid.uuid4().hex
        self.events: list[dict] = []
        self.on_event: Callable[[dict], None] | None = None

    def request(self, path: str, body: dict | None = None) -> bytes:
        """GET `path`, or POST `body` as JSON; raises urllib.error.HTTPError and ConnectionError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with DIRECT.open(request, timeout=300) as response:
            return response.read()

    def queue(self, prompt: dict) -> str:
        """Queue an API-format prompt and return its id; raises ValueError with ComfyUI's reasons for refusing it."""
        try:
            answer = self.request("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise ValueError(refusal(json.loads(error.read()))) from error
        return json.loads(answer)["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600) -> dict:
        """The history entry of a finished prompt; raises WorkflowFailed when it failed or was interrupted."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                entry = json.loads(self.request(f"/history/{prompt_id}")).get(prompt_id)
            except (urllib.error.URLError, ConnectionError) as error:
                self.process.wait(30)  # it stopped answering because it is ending
                raise WorkflowFailed(f"ComfyUI ended; its log ends:\n{tail(self.log)}") from error
            if entry:
                raise_if_failed(entry["status"])
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} was not done after {timeout:g} s; the log is {self.log}")

    def run(self, prompt: dict, timeout: float = 600) -> dict:
        """Queue a prompt, wait for it, return its outputs by node id."""
        return self.wait(self.queue(prompt), timeout)["outputs"]

    def object_info(self, node_id: str = "") -> dict:
        """ComfyUI's description of every node, or of one, as its frontend reads it."""
        return json.loads(self.request(f"/object_info/{node_id}" if node_id else "/object_info"))

    def interrupt(self) -> None:
        """Interrupt the running prompt."""
        self.request("/interrupt", {})

    def check_alive(self) -> None:
        """Raises WorkflowFailed when ComfyUI has ended."""
        if self.process.poll() is not None:
            raise WorkflowFailed(f"ComfyUI ended with code {self.process.returncode}; its log ends:\n{tail(self.log)}")

    def kill(self) -> None:
        """End ComfyUI at once, as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End ComfyUI and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def record(self, event: dict) -> None:
        """Append an event and call `on_event`."""
        self.events.append(event)
        if self.on_event:
            self.on_event(event)

    async def listen(self, connected: threading.Event) -> None:
        """Record ComfyUI's events until it ends; sets `connected` once the stream is open."""
        import aiohttp

        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            connected.set()
            async for message in socket:
                self.record(read_event(message.data))


def read_event(message: str | bytes) -> dict:
    """An event as {"type", "data"}; binary ones become "progress_text" and "preview"."""
    if isinstance(message, str):
        return json.loads(message)
    (kind,) = struct.unpack_from(">I", message)
    if kind != TEXT_EVENT:
        return {"type": "preview", "data": {"bytes": len(message) - 8}}
    (length,) = struct.unpack_from(">I", message, 4)
    node, text = message[8 : 8 + length], message[8 + length :]
    return {"type": "progress_text", "data": {"node": node.decode(), "text": text.decode()}}


def refusal(answer: dict) -> str:
    """ComfyUI's reasons for refusing a prompt, a line each, from its answer."""
    lines = [f"ComfyUI refused the prompt: {answer['error']['message']} {answer['error'].get('details', '')}".rstrip()]
    for node, refused in (answer.get("node_errors") or {}).items():
        for error in refused["errors"]:
            lines.append(f"node {node} ({refused['class_type']}): {error['message']}: {error.get('details', '')}")
    return "\n".join(lines)


def raise_if_failed(status: dict) -> None:
    """Raises WorkflowFailed when the status of a history entry holds an error or an interruption."""
    for kind, data in status["messages"]:
        if kind == "execution_error":
            where = f"node {data['node_id']} ({data['node_type']})"
            raise WorkflowFailed(f"{where}: {data['exception_type']}: {data['exception_message']}".rstrip())
        if kind == "execution_interrupted":
            raise WorkflowFailed(f"interrupted in node {data['node_id']} ({data['node_type']})")


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a file."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def prepare(base_directory: Path) -> None:
    """Make `base_directory` a ComfyUI base directory whose only custom node is this package."""
    for name in ("custom_nodes", "input", "output", "models", "user/default"):
        (base_directory / name).mkdir(parents=True, exist_ok=True)
    settings = base_directory / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
    link_package(base_directory / "custom_nodes" / "retune")


def link_package(link: Path) -> None:
    """Put this package at `link`: a symbolic link, or a fresh copy where the system does not permit one (Windows).

    Raises ValueError when `link` is a folder that no earlier call made: it may be a clone of the user's.
    """
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        if link.resolve() == PACKAGE:
            return
        if not (link / COPY_MARK).is_file():
            raise ValueError(f"{link} is a folder of its own; expected none there. Give another base directory.")
        shutil.rmtree(link)
    try:
        link.symlink_to(PACKAGE, target_is_directory=True)
    except OSError:
        shutil.copytree(PACKAGE, link, ignore=shutil.ignore_patterns(*NOT_PACKAGED))
        (link / COPY_MARK).touch()


def free_port() -> int:
    """A local port that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(comfyui: Path, base_directory: Path, extra_args: tuple[str, ...] = ("--cpu",)) -> Server:
    """Start ComfyUI's process on a free local port; it may not answer yet (`wait_until_up`)."""
    base_directory = Path(base_directory).resolve()
    prepare(base_directory)
    port, log = free_port(), base_directory / "comfyui.log"
    command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
    command += ["--base-directory", str(base_directory), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *extra_args], cwd=comfyui, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    return Server(process, f"http://127.0.0.1:{port}", log)


def wait_until_up(server: Server, timeout: float) -> None:
    """Returns once ComfyUI answers; raises WorkflowFailed with the end of its log when it ends or times out."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        server.check_alive()
        try:
            server.request("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise WorkflowFailed(f"ComfyUI was not up after {timeout:g} s; its log ends:\n{tail(server.log)}")


@contextmanager
def server(
    comfyui: Path, base_directory: Path, extra_args: tuple[str, ...] = ("--cpu",), timeout: float = 300
) -> Iterator[Server]:
    """A running ComfyUI whose only custom node is this package; stopped on leaving.

    Args:
        comfyui: The ComfyUI checkout.
        base_directory: Folder of everything it reads and writes.
        extra_args: Further arguments of ComfyUI's main.py.
        timeout: Seconds until it must answer.

    Raises:
        WorkflowFailed: When it does not start.
    """
    running = start(comfyui, base_directory, extra_args)
    try:
        wait_until_up(running, timeout)
        connected = threading.Event()
        threading.Thread(target=listen_until_closed, args=(running, connected), daemon=True).start()
        if not connected.wait(30):
            raise WorkflowFailed(f"ComfyUI's event stream did not open; the log is {running.log}")
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def listen_until_closed(running: Server, connected: threading.Event) -> None:
    """`Server.listen` for a thread; a broken connection is an error only while ComfyUI still runs."""
    import aiohttp

    try:
        asyncio.run(running.listen(connected))
    except (aiohttp.ClientError, ConnectionError):
        if running.process.poll() is None:
            raise


def show_progress(event: dict) -> None:
    """Write an event's progress text to standard error."""
    if event["type"] == "progress_text":
        sys.stderr.write(event["data"]["text"] + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run one API-format workflow and write its outputs as one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True, help="the ComfyUI checkout")
    parser.add_argument("--base", type=Path, required=True, help="folder for ComfyUI's input, output and models")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds the workflow may take")
    options = parser.parse_args(arguments)
    prompt = json.loads(options.workflow.read_text(encoding="utf-8"))
    with server(options.comfyui, options.base) as running:
        running.on_event = show_progress
        sys.stdout.write(json.dumps(running.run(prompt, options.timeout)) + "\n")


if __name__ == "__main__":
    main()
