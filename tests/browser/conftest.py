"""A real Chromium on a real ComfyUI. Screenshots go to output/browser, which git ignores."""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from retune.training.config.lora import LoraConfig
from retune.training.data.images import contact_sheet, save_png
from retune.training.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows"
SHOTS = ROOT / "output" / "browser"
READY = "!!window.comfyAPI?.app?.app?.extensionManager && !!window.LiteGraph?.registered_node_types?.RetuneTrainLora"
SETTINGS = """async (settings) => {
  for (const [key, value] of Object.entries(settings))
    await window.comfyAPI.app.app.extensionManager.setting.set(key, value);
}"""
EDIT = """(edits) => {
  for (const node of window.comfyAPI.app.app.graph.nodes)
    for (const [name, value] of Object.entries(edits[node.type] ?? {})) {
      const widget = node.widgets.find((found) => found.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
}"""
FOCUS = """(kind) => {
  const { graph, canvas } = window.comfyAPI.app.app, node = graph.nodes.find((found) => found.type === kind);
  canvas.ds.scale = 0.75;
  canvas.ds.offset = [420 - node.pos[0], 90 - node.pos[1]];
  canvas.setDirty(true, true);
}"""
SEEN = """([state, words]) => [...document.querySelectorAll(".retune-view")].some((view) =>
  (!state || view.querySelector(".retune-state").textContent === state) && view.innerText.includes(words))"""
PICTURE = """() => {
  const canvas = document.querySelector(".retune-view canvas");
  return canvas?.checkVisibility() ? canvas.toDataURL() : null;
}"""


POLLING = 0.1
"""Seconds between two looks, from outside: a page that hangs is told apart from a condition that does not come."""


class Editor:
    """ComfyUI's graph editor in a page of its own; `complaints` are console messages that involve this package."""

    def __init__(self, page, server):
        self.page, self.server, self.complaints = page, server, []
        self.devtools = page.context.new_cdp_session(page)
        self.devtools.on("Runtime.consoleAPICalled", self._console)
        self.devtools.on("Runtime.exceptionThrown", lambda event: self._note(event["exceptionDetails"]))
        self.devtools.on("Log.entryAdded", lambda event: self._note(event["entry"]))
        for domain in ("Runtime", "Log"):
            self.devtools.send(f"{domain}.enable")

    def _console(self, event) -> None:
        if event["type"] in ("error", "warning", "assert"):
            self._note(event)

    def _note(self, event) -> None:
        """Keeps what names our files or routes, in its text or its stack."""
        if "retune" in json.dumps(event).lower():
            self.complaints.append(event)

    def open(self, **settings) -> None:
        """Opens the editor, or opens it again; settings of ComfyUI by name, with _ for the dots."""
        self.page.goto(self.server.url)
        self._wait_until_ready()
        if settings:
            self.page.evaluate(SETTINGS, {key.replace("_", "."): value for key, value in settings.items()})
            self.open()

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(READY, timeout=120_000)
        self.page.wait_for_selector("#splash-loader", state="detached", timeout=120_000)
        self.page.wait_for_timeout(1500)  # the default workflow comes late

    def load(self, title: str, **edits: dict) -> None:
        """An example workflow from its file; edits: node type -> {widget: value}."""
        graph = json.loads((EXAMPLES / f"{title}.json").read_text(encoding="utf-8"))
        self.page.evaluate("(graph) => window.comfyAPI.app.app.loadGraphData(graph, true, true, null)", graph)
        self.page.evaluate(EDIT, edits)

    def load_template(self, title: str, **edits: dict) -> None:
        """The same by the template browser, as a user opens it."""
        self.execute("Comfy.BrowseTemplates")
        self.page.get_by_text("retune", exact=True).last.click()
        start = title[:24]  # long titles are cut
        self.page.get_by_text(start).last.click()
        loaded = "(kind) => window.comfyAPI.app.app.graph.nodes.some((node) => node.type === kind)"
        self.page.wait_for_function(loaded, arg="RetuneLoadDemoModel", timeout=30_000)
        self.page.wait_for_timeout(1000)
        self.page.evaluate(EDIT, edits)

    def execute(self, command: str) -> None:
        self.page.evaluate("(id) => window.comfyAPI.app.app.extensionManager.command.execute(id)", command)

    def queue(self) -> None:
        self.page.evaluate("() => window.comfyAPI.app.app.queuePrompt(0)")

    def focus(self, kind: str) -> None:
        """Brings a node of this type into the picture."""
        self.page.evaluate(FOCUS, kind)

    def until(self, script: str, argument=None, timeout: float = 30):
        """What a script gives, once that is something; TimeoutError naming what the views say after so many seconds."""
        deadline = time.monotonic() + timeout
        while not (found := self.page.evaluate(script, argument)):
            if time.monotonic() > deadline:
                said = self.page.evaluate(
                    "() => [...document.querySelectorAll('.retune-view')].map((v) => v.innerText)"
                )
                raise TimeoutError(f"{argument or script} was not seen in {timeout:g} s; the views say {said}")
            time.sleep(POLLING)
        return found

    def see(self, state: str = "", words: str = "", timeout: float = 30) -> None:
        """Waits until a node shows its run in this state and with these words."""
        self.until(SEEN, [state, words], timeout)

    def press(self, name: str) -> None:
        """A click on a button of ours that is in the picture; playwright's own also waits for quiet frames, which a
        busy run on a machine without a GPU does not leave."""
        box = self.page.get_by_role("button", name=name).bounding_box()
        self.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def chart(self) -> str:
        """The picture in the node's canvas as a data: URL, once it is in sight."""
        return self.until(PICTURE)

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def chromium():
    """A running Chromium: the system's, PLAYWRIGHT_CHROMIUM, or the one that playwright has installed.

    Not for the whole session: while playwright is up, asyncio.run refuses to work in any other test.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
    found = os.environ.get("PLAYWRIGHT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        if not found and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium found (set PLAYWRIGHT_CHROMIUM): no browser tests")
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def editor(chromium, comfyui_server):
    context = chromium.new_context(viewport={"width": 1500, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=comfyui_server.url)
    page = context.new_page()
    yield Editor(page, comfyui_server)
    context.close()


@pytest.fixture
def written_run(comfyui_server):
    """`written_run(name, steps, loss)`: a finished run's folder as a training leaves it, a picture every ten steps.

    loss: the loss of a step by its number.
    """
    root = comfyui_server.base_directory / "output" / "retune"
    return lambda name, steps=40, loss=_falling: _written_run(root, name, steps, loss)


def _falling(step: int) -> float:
    return 0.3 / step**0.5 + 0.02 * (step % 3)


def _written_run(root: Path, name: str, steps: int, loss) -> RunFolder:
    graph = json.loads((EXAMPLES / "Apply several LoRAs.json").read_text(encoding="utf-8"))
    with RunFolder.open(root, name, resume="restart") as folder:
        about = {"config": asdict(LoraConfig(run_name=name, steps=steps)), "environment": {"torch": "2", "threads": 1}}
        folder.claim({"kind": "lora"}, {**about, "prompt": {}, "workflow": graph})
        for step in range(1, steps + 1):
            row = {"step": step, "loss": loss(step), "learning_rate": 1e-3 * (1 - step / steps)}
            folder.add_row(row | {"grad_norm": 0.1})
            if step % 10 == 0:
                folder.add_row({"event": "validation", "step": step, "loss": loss(step)})
                folder.add_row(_samples(folder, step))
        folder.set_status("finished", steps)
    return folder


def _samples(folder: RunFolder, step: int) -> dict:
    images = [torch.full((3, 64, 64), fill) for fill in (step / 100, 0.9)]
    files = [f"{step:06d}_{index:02d}.png" for index in range(2)]
    for file, image in zip(files, images, strict=True):
        save_png(image, folder.samples / file)
    save_png(contact_sheet(images), folder.samples / f"{step:06d}_grid.png")
    about = {"event": "sample", "step": step, "epoch": step / 10, "alignment": step / 80}
    return about | {"files": files, "grid": f"{step:06d}_grid.png", "prompts": ["a red circle", "a blue square"]}
