"""The runs panel in the sidebar: what it lists, compares, opens and deletes."""

import json

from retune.training.runs.folder import RunFolder

OPEN = "() => window.comfyAPI.app.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.retune-runs')"


def card(editor, name: str):
    return editor.page.locator(".retune-card", has=editor.page.locator(f".retune-name[title='{name}']"))


def test_runs_are_listed_compared_opened_and_deleted(editor, written_run):
    first, second = written_run("first", 30), written_run("second")
    held = RunFolder.open(first.path.parent, "in use", resume="auto")
    editor.open(Comfy_VueNodes_Enabled=False, Comfy_ColorPalette="dark")
    with held as busy:
        busy.claim({"kind": "model"}, {"config": {"steps": 9}})
        busy.set_status("running", 3)
        editor.page.evaluate(OPEN)
        card(editor, "in use").wait_for()
        check_cards(editor)
        check_comparison(editor)
        editor.shoot("runs panel")
    check_report(editor)
    check_workflow(editor)
    check_delete(editor, first, second)
    assert not editor.complaints


def check_cards(editor) -> None:
    words = card(editor, "second").inner_text()
    assert "finished" in words and "lora · step 40 of 40 · loss 0.0674" in words
    assert "000040_grid.png?v=" in card(editor, "second").locator("img").get_attribute("src")
    busy = card(editor, "in use")
    assert "running" in busy.inner_text() and "step 3 of 9" in busy.inner_text()
    assert busy.get_by_role("button", name="Delete").is_disabled()
    assert busy.get_by_role("button", name="Load").is_disabled()  # no workflow made it


def check_comparison(editor) -> None:
    for name in ("first", "second"):
        card(editor, name).get_by_role("checkbox").check()
    tip = editor.page.locator(".retune-panel .retune-tip")
    canvas = editor.page.locator(".retune-panel canvas")
    canvas.wait_for()
    editor.page.wait_for_timeout(500)
    box = canvas.bounding_box()
    editor.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    lines = tip.inner_text().splitlines()
    assert lines[0].startswith("step ") and [line.split()[0] for line in lines[1:]] == ["first", "second"]


def check_report(editor) -> None:
    with editor.page.context.expect_page() as opened:
        card(editor, "second").get_by_role("button", name="Report").click()
    opened.value.wait_for_load_state()
    report = opened.value.frame_locator("iframe")
    assert report.locator("h1").inner_text() == "second" and opened.value.title() == "second"
    assert report.locator("img").count() > 1
    assert opened.value.evaluate("() => window.opener === null")
    opened.value.close()


def check_workflow(editor) -> None:
    made = json.loads(editor.server.request("/retune/runs/second/workflow"))["workflow"]
    card(editor, "second").get_by_role("button", name="Copy").click()
    editor.page.get_by_text("is in the clipboard").wait_for()
    assert json.loads(editor.page.evaluate("() => navigator.clipboard.readText()")) == made
    card(editor, "second").get_by_role("button", name="Load").click()
    shown = "(count) => window.comfyAPI.app.app.graph.nodes.length === count"
    editor.page.wait_for_function(shown, arg=len(made["nodes"]))


def check_delete(editor, first, second) -> None:
    for answer, remains in (("Cancel", True), ("Delete", False)):
        card(editor, "first").get_by_role("button", name="Delete").click()
        dialog = editor.page.get_by_role("dialog")
        assert 'Delete the folder of run "first"' in dialog.inner_text()
        dialog.get_by_role("button", name=answer).click()
        dialog.wait_for(state="detached")
        card(editor, "first").wait_for(state="attached" if remains else "detached")
        assert first.path.exists() == remains
    assert second.path.exists() and card(editor, "second").count() == 1


FOREIGN = """<!doctype html><meta http-equiv=refresh content="0; url={url}"><h1>foreign</h1><script>
top.location = "{url}"; opener.location = "{url}"</script><a id=leave href="{url}" target=_top>leave</a>
<a id=within href="{url}">within</a>"""


def test_a_foreign_report_steers_no_tab(editor, written_run):
    run = written_run("foreign").path
    url = f"{editor.server.url}/api/system_stats?evil"
    (run / "report.html").write_text(FOREIGN.format(url=url), encoding="utf-8")
    asked = []
    editor.page.context.on("response", lambda response: asked.append(response.url))
    editor.open(Comfy_VueNodes_Enabled=False)
    editor.page.evaluate(OPEN)
    here = editor.page.url
    with editor.page.context.expect_page() as opened:
        card(editor, "foreign").get_by_role("button", name="Report").click()
    page = opened.value
    page.frame_locator("iframe").locator("h1").wait_for()
    for link in ("#leave", "#within"):
        page.frame_locator("iframe").locator(link).click()
        page.wait_for_timeout(1000)
    assert page.url.endswith("/retune/runs/foreign/report") and page.title() == "foreign"
    assert editor.page.url == here and not any("evil" in url for url in asked)
    assert page.evaluate("() => window.opener === null")
    page.close()


DEEP, HUGE = b"[" * 100_000, b"1" + b"0" * 400
DAMAGE = {
    "deep": ("config.json", DEEP),
    "deep row": ("metrics.jsonl", b'{"step": 1, "loss": 1, "x": ' + DEEP + b"\n"),
    "huge step": ("status.json", b'{"state": "finished", "step": ' + HUGE + b"}"),
    "huge loss": ("metrics.jsonl", b'{"step": 1, "loss": ' + HUGE + b"}\n"),
    "text for a loss": ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n'),
    "list for a message": ("status.json", b'{"state": "failed", "step": 1, "message": [1]}'),
    "no prompts": ("metrics.jsonl", b'{"event": "sample", "step": 1, "files": ["a.png"]}\n'),
    "no text": ("status.json", b"\xff\xfe\x00"),
    "empty": ("config.json", b""),
    "another kind": ("config.json", b'{"identity": {"kind": {"a": 1}}}'),
    "no number": ("config.json", b'{"identity": {}, "config": {"steps": "many"}}'),
    "unknown state": ("status.json", b'{"state": "cooking", "step": 1}'),
}


def test_damaged_runs_stand_among_the_others_and_can_be_deleted(editor, written_run):
    good = [written_run(name, 20) for name in ("good", "better")]
    for name, (file, data) in DAMAGE.items():
        (written_run(name, 10).path / file).write_bytes(data)
    being_written = good[0].path / "metrics.jsonl"
    being_written.write_bytes(being_written.read_bytes() + b'{"step": 21, "lo')
    editor.open(Comfy_VueNodes_Enabled=False)
    editor.page.evaluate(OPEN)
    card(editor, "good").wait_for()
    for name in DAMAGE:
        assert card(editor, name).locator(".retune-state").inner_text() == "damaged"
        assert "begin the run again" in card(editor, name).inner_text()
    for run in good:
        assert (
            "finished" in card(editor, run.name).inner_text() and "step 20 of 20" in card(editor, run.name).inner_text()
        )
    for name in ("good", *DAMAGE):
        card(editor, name).get_by_role("checkbox").check()
    editor.page.locator(".retune-panel canvas").wait_for()
    editor.shoot("damaged runs")
    for name in DAMAGE:
        card(editor, name).get_by_role("button", name="Delete").click()
        editor.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        card(editor, name).wait_for(state="detached")
    assert card(editor, "good").count() == card(editor, "better").count() == 1
    assert not editor.complaints
