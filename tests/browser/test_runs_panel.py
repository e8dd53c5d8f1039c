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
    assert opened.value.locator("h1").inner_text() == "second"
    assert opened.value.evaluate("() => [...document.images].every((image) => image.naturalWidth > 0)")
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
