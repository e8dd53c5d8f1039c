"""What a node says of itself in the graph: refused and failed runs with a way out, what a loader found."""

import pytest

TRAINER, TITLE = "RetuneTrainLora", "Train a style LoRA"
RENDERERS = {
    "classic": {"Comfy_VueNodes_Enabled": False, "Comfy_ColorPalette": "dark"},
    "nodes 2.0": {"Comfy_VueNodes_Enabled": True, "Comfy_ColorPalette": "light"},
}
VALUE = """([kind, name]) => window.comfyAPI.app.app.graph.nodes.find((node) => node.type === kind).widgets
  .find((widget) => widget.name === name).value"""
SET = """([kind, name, value]) => {
  const node = window.comfyAPI.app.app.graph.nodes.find((found) => found.type === kind);
  const widget = node.widgets.find((found) => found.name === name);
  widget.value = value;
  widget.callback?.(value);
}"""
SMALL = {
    TRAINER: {"run_name": "own", "steps": 2, "batch_size": 2},
    "RetuneSamplePrompts": {"every": 2, "steps": 1, "prompts": "a red circle"},
    "RetuneDemoDataset": {"count": 8},
    "KSampler": {"steps": 1},
}
LOADERS = """(folder) => {
  const { app } = window.comfyAPI.app, { graph } = app;
  graph.clear();
  const add = (kind, values, x, y) => {
    const node = LiteGraph.createNode(kind);
    node.pos = [x, y];
    graph.add(node);
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
    return node;
  };
  [["RetuneLoadDataset", { folder, resolution: 64, captions: "file name" }, "report"],
   ["RetuneLoadReward", {}, "reward"], ["RetuneLoadT5", { context_width: "768", encoder: "demo" }, "CLIP"],
  ].forEach(([kind, values, output], i) => {
    const node = add(kind, values, 380 * (i % 4), 20), shown = add("PreviewAny", {}, 380 * (i % 4), 640);
    node.connect(Math.max(0, node.outputs.findIndex((found) => found.name === output)), shown, 0);
  });
  app.canvas.ds.scale = 0.8;
  app.canvas.ds.offset = [80, 90];
}"""


@pytest.mark.parametrize(
    "renderer, name", [("classic", "own"), pytest.param("nodes 2.0", "mine", marks=pytest.mark.slow)]
)
def test_a_refused_run_offers_a_way_out(editor, written_run, renderer, name):
    written_run(name, 2)
    editor.open(**RENDERERS[renderer])
    editor.load(TITLE, **SMALL | {TRAINER: SMALL[TRAINER] | {"run_name": name}})
    editor.focus(TRAINER)
    refuse(editor, name)
    editor.shoot(f"refused run, {renderer}")
    editor.press("Set batch_size back to 1")
    editor.see("changed", "batch_size: 1.")
    assert editor.page.evaluate(VALUE, [TRAINER, "batch_size"]) == 1
    editor.page.evaluate(SET, [TRAINER, "batch_size", 2])
    refuse(editor, name)
    editor.press(f'Use "{name} 2"')
    editor.see("changed", f"{name} 2")
    editor.queue()
    editor.see("finished", "step 2 of 2", timeout=120)
    said = editor.page.locator(".retune-view").inner_text()
    assert "loss 0." in said and ", average 0." in said and name not in said
    assert "about 0 s left" not in editor.page.locator("body").inner_text()  # ComfyUI's own line, beside ours
    editor.page.evaluate(SET, [TRAINER, "run_name", name])
    refuse(editor, name)
    editor.press("Begin again")
    assert editor.page.evaluate(VALUE, [TRAINER, "resume"]) == "restart"
    editor.queue()
    editor.see("finished", "step 2 of 2", timeout=120)
    assert editor.page.evaluate(VALUE, [TRAINER, "resume"]) == "auto"  # "restart" was meant for one run
    assert not editor.complaints


def refuse(editor, name: str) -> None:
    """Queues a run whose name belongs to one of other settings."""
    editor.queue()
    editor.see("refused", f"batch_size is 2; run '{name}' was made with 1", timeout=60)


def test_a_loader_says_what_it_found_and_what_is_wrong(editor, written_run):
    pictures = written_run("pictures").samples
    editor.open(**RENDERERS["classic"])
    editor.page.evaluate(LOADERS, str(pictures))
    editor.queue()
    editor.see("found", "12 images", timeout=60)
    editor.see("found", "demo aesthetic", timeout=60)
    editor.see("found", "a T5 of width", timeout=60)
    editor.shoot("loaders")
    editor.page.evaluate(SET, ["RetuneLoadDataset", "folder", "nowhere"])
    editor.queue()
    editor.see("refused", "nowhere")
    assert not editor.complaints
