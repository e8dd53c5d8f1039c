"""Advanced inputs: folded in both renderers, remembered for each node, saved in the schema's order."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
TRAINER, TITLE = "RetuneTrainLora", "Train a style LoRA"
BASICS = ["steps", "batch_size", "learning_rate", "rank", "run_name", "preset"]
RENDERERS = {"classic": False, "nodes 2.0": True}
SAVED = (
    """() => Object.fromEntries(window.comfyAPI.app.app.graph.serialize().nodes.map((n) => [n.id, n.widgets_values]))"""
)
SEEN = """(kind) => {
  const node = window.comfyAPI.app.app.graph.nodes.find((found) => found.type === kind);
  return node.getLayoutWidgets().map((widget) => widget.name);
}"""
PLACE = """([kind, name]) => {
  const { graph, canvas } = window.comfyAPI.app.app, node = graph.nodes.find((found) => found.type === kind);
  const widget = node.widgets.find((found) => found.name === name), { scale, offset } = canvas.ds;
  const box = canvas.canvas.getBoundingClientRect(), y = widget ? widget.y + 10 : -15; // the title
  return [box.x + (node.pos[0] + 60 + offset[0]) * scale, box.y + (node.pos[1] + y + offset[1]) * scale];
}"""
LINK_SEED = """(kind) => {
  const { graph } = window.comfyAPI.app.app, node = graph.nodes.find((found) => found.type === kind);
  const seed = LiteGraph.createNode("PrimitiveInt");
  graph.add(seed);
  seed.connect(0, node, node.findInputSlot("seed"));
}"""
REOPEN = "() => window.comfyAPI.app.app.loadGraphData(window.comfyAPI.app.app.graph.serialize(), true, true, null)"


MISSING = """async () => {
  const { missing } = await import("/extensions/retune/relied_on.js"), before = missing();
  delete LiteGraph.LGraphNode.prototype.getLayoutWidgets;
  return [before, missing()];
}"""


@pytest.mark.parametrize("renderer", ["classic", pytest.param("nodes 2.0", marks=pytest.mark.slow)])
def test_the_saved_values_stay_in_the_schemas_order(editor, renderer):
    editor.open(Comfy_VueNodes_Enabled=RENDERERS[renderer])
    for file in sorted(EXAMPLES.glob("*.json")):
        editor.load(file.stem)
        saved = editor.page.evaluate(SAVED)
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            values = node.get("widgets_values")
            if node["type"].startswith("Retune") and isinstance(values, list):
                assert saved[str(node["id"])][: len(values)] == values, f"{file.stem}: {node['type']}"
    editor.shoot(f"folded, {renderer}")
    assert not editor.complaints


def test_advanced_inputs_open_below_the_chart_and_stay_open(editor, written_run):
    written_run("open")
    editor.open(Comfy_VueNodes_Enabled=False)
    editor.load(TITLE, RetuneTrainLora={"run_name": "open"})
    editor.focus(TRAINER)
    editor.see("finished")
    folded = editor.page.evaluate(SEEN, TRAINER)
    assert folded == [*BASICS, "retune_advanced", "retune_run_view"]
    editor.page.evaluate(LINK_SEED, TRAINER)
    assert "seed" in editor.page.evaluate(SEEN, TRAINER)  # what a link sets is in sight
    editor.page.mouse.click(*editor.page.evaluate(PLACE, [TRAINER, "retune_advanced"]))
    opened = "(kind) => window.comfyAPI.app.app.graph.nodes.find((node) => node.type === kind).showAdvanced"
    editor.until(opened, TRAINER)
    editor.page.evaluate(REOPEN)
    shown = editor.page.evaluate(SEEN, TRAINER)
    assert shown.index("retune_run_view") < shown.index("alpha") and shown[: len(BASICS) - 1] == BASICS[:-1][:5]
    assert not editor.complaints


def test_the_properties_panel_leaves_the_view_alone(editor, written_run):
    written_run("beside")
    editor.open(Comfy_VueNodes_Enabled=False, Comfy_RightSidePanel_IsOpen=False)
    editor.load(TITLE, RetuneTrainLora={"run_name": "beside"})
    editor.focus(TRAINER)
    editor.see("finished")
    width = "() => document.querySelector('.retune-view').getBoundingClientRect().width"
    before = editor.page.evaluate(width)
    editor.page.mouse.click(*editor.page.evaluate(PLACE, [TRAINER, ""]))
    editor.page.get_by_role("button", name="Toggle properties panel").click()
    editor.page.get_by_text("batch_size").first.wait_for(state="attached")
    editor.page.wait_for_timeout(500)
    editor.shoot("properties panel")
    assert editor.page.get_by_text("retune_run_view").count() == 0
    editor.page.get_by_role("button", name="Toggle properties panel").click()
    editor.page.wait_for_timeout(500)
    assert abs(editor.page.evaluate(width) - before) < 2
    assert not editor.complaints
    assert editor.page.evaluate(MISSING) == [[], ["LGraphNode.getLayoutWidgets"]]
