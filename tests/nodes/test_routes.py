"""The server's routes for runs: what they answer, and that no name reaches a file which no listing has."""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from retune.training.commands.comfyui_server import DIRECT
from retune.training.config.lora import LoraConfig
from retune.training.runs.folder import RunFolder

RUN = "a run (old 1)"
ENCODED = "a%20run%20(old%201)"
PROMPT = {"1": {"is_changed": [float("nan")]}}
"""As ComfyUI fills it in while a graph runs."""


@pytest.fixture(scope="module")
def root(comfyui_server):
    """ComfyUI's runs folder with one finished run in it."""
    root = comfyui_server.base_directory / "output" / "retune"
    with RunFolder.open(root, RUN, resume="restart") as folder:
        folder.claim({"kind": "lora"}, {"config": {"steps": 2}, "prompt": PROMPT, "workflow": {"nodes": []}})
        for step in (1, 2):
            folder.add_row({"step": step, "loss": 1 / step})
        (folder.samples / "000002_grid.png").write_bytes(b"a picture")
        folder.set_status("finished", 2)
    return root


def answer(server, path: str, method: str = "GET"):
    """Status, headers and body of a route's answer."""
    request = urllib.request.Request(f"{server.url}/retune/runs{path}", method=method)
    try:
        with DIRECT.open(request, timeout=60) as found:
            return found.status, found.headers, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_runs_are_listed_and_told(comfyui_server, root):
    status, _, body = answer(comfyui_server, "")
    (run,) = [run for run in json.loads(body) if run["id"] == RUN]
    assert status == 200 and (run["state"], run["step"], run["loss"], run["workflow"]) == ("finished", 2, 0.5, True)
    run = json.loads(answer(comfyui_server, f"/{ENCODED}")[2])
    assert [row["step"] for row in run["rows"]] == [1, 2] and run["config"] == {"steps": 2} and run["live"] is None
    made = json.loads(answer(comfyui_server, f"/{ENCODED}/workflow")[2])
    assert made == {"workflow": {"nodes": []}, "prompt": {"1": {"is_changed": [None]}}}
    assert answer(comfyui_server, f"/{ENCODED}/samples/000002_grid.png?v=1")[2] == b"a picture"


def test_a_run_keeps_its_prompt_without_what_comfyui_adds():
    from retune.nodes.common.inputs import made_by

    hidden = SimpleNamespace(prompt={"1": {"inputs": {"a": 1}, **PROMPT["1"]}}, extra_pnginfo=None)
    assert made_by(hidden) == {"prompt": {"1": {"inputs": {"a": 1}}}, "workflow": None}
    assert "is_changed" in hidden.prompt["1"] and made_by(SimpleNamespace(prompt=None, extra_pnginfo={}))


FOREIGN = """<!doctype html><title>"foreign" & more</title><meta http-equiv=refresh content="0; url=http://evil">
<script>evil()</script><a href="http://evil" target=_top>x</a></iframe>"""


class Frame(HTMLParser):
    """The start tags of a page, and what its frames hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.frames = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "iframe":
            self.frames.append(dict(attributes))


def test_a_report_cannot_speak_to_comfyui(comfyui_server, root):
    (root / RUN / "report.html").write_text(FOREIGN, encoding="utf-8")
    status, headers, body = answer(comfyui_server, f"/{ENCODED}/report")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    text = body.decode("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
    assert text.index(f'content="{policy}"') < text.index("<iframe") and f"<title>{RUN}</title>" in text
    page = Frame(text)
    assert page.tags == ["html", "meta", "meta", "title", "style", "iframe"]
    assert page.frames == [{"sandbox": None, "title": RUN, "srcdoc": FOREIGN}]


def test_a_report_of_any_bytes_stays_in_its_frame(comfyui_server, root):
    report = root / RUN / "report.html"
    report.write_bytes(b"\xff<p title='\"'></iframe><script>{0}{title}</script>&quot;&#39;\x00")
    page = Frame(answer(comfyui_server, f"/{ENCODED}/report")[2].decode("utf-8"))
    assert page.tags.count("script") == 0 and len(page.frames) == 1
    assert page.frames[0]["srcdoc"].startswith("\ufffd<p title='\"'></iframe><script>{0}{title}</script>&quot;&#39;")
    report.unlink()


DAMAGE = {
    "deep": ("config.json", b"[" * 100_000),
    "half a row": ("metrics.jsonl", b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo'),
    "huge step": ("status.json", b'{"state": "finished", "step": 1' + b"0" * 400 + b"}"),
    "text for a number": ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n'),
    "no text": ("status.json", b"\xff\xfe"),
}


def test_damaged_runs_are_listed_and_deleted_among_the_others(comfyui_server, root):
    for name, (file, data) in DAMAGE.items():
        with RunFolder.open(root, name, resume="restart") as folder:
            folder.claim({"kind": "lora"}, {"config": asdict(LoraConfig(run_name=name))})
            (folder.path / file).write_bytes(data)
    if hasattr(os, "mkfifo"):
        (root / "no text" / "status.json").unlink()
        os.mkfifo(root / "no text" / "status.json")
    status, _, body = answer(comfyui_server, "")
    states = {run["id"]: run["state"] for run in json.loads(body)}
    assert status == 200 and states[RUN] == "finished"
    assert {name: states[name] for name in DAMAGE} == dict.fromkeys(DAMAGE, "damaged") | {"half a row": "interrupted"}
    for name in DAMAGE:
        place = urllib.parse.quote(name)
        assert json.loads(answer(comfyui_server, f"/{place}")[2])["state"] == states[name]
        assert answer(comfyui_server, f"/{place}/report")[0] == (200 if states[name] == "interrupted" else 409)
        assert answer(comfyui_server, f"/{place}", "DELETE")[0] == 200
    assert RUN in {run["id"] for run in json.loads(answer(comfyui_server, "")[2])}


@pytest.mark.parametrize("name", ["nobody", "..", "%2e%2e", "..%2f..%2fuser", ".locks", "%2fetc", "a%00b"])
def test_other_names_find_nothing(comfyui_server, root, name):
    secret = comfyui_server.base_directory / "user" / "config.json"
    secret.write_text("{}", encoding="utf-8")
    for path, method in ((f"/{name}/report", "GET"), (f"/{name}/workflow", "GET"), (f"/{name}/finish", "POST")):
        assert answer(comfyui_server, path, method)[0] in (404, 405)
    assert answer(comfyui_server, f"/{ENCODED}/samples/{name}")[0] == 404
    assert answer(comfyui_server, f"/{name}", "DELETE")[0] in (404, 405)
    assert answer(comfyui_server, f"/{name}")[0] in (204, 404, 200 if name in ("..", "%2e%2e") else 204)
    assert secret.exists() and (root / RUN).exists()


def test_only_a_run_that_nobody_holds_is_deleted_and_only_one_in_progress_finishes(comfyui_server, root):
    status, _, body = answer(comfyui_server, f"/{ENCODED}/finish", "POST")
    assert status == 409 and "not in progress in this ComfyUI" in json.loads(body)["error"]
    with RunFolder.open(root, RUN, resume="auto"):
        status, _, body = answer(comfyui_server, f"/{ENCODED}", "DELETE")
        assert status == 409 and "is in use" in json.loads(body)["error"]
    assert (root / RUN).exists()
    assert answer(comfyui_server, f"/{ENCODED}", "DELETE")[0] == 200
    assert not (root / RUN).exists()
    assert answer(comfyui_server, f"/{ENCODED}")[0] == 204
