"""Presets fill the widgets of a node, say "custom" once one of them is changed, and are what the run uses."""

import json

import pytest
from retune.training.config.lora import LORA_PRESETS
from retune.training.config.training_settings import PRESETS

RENDERERS = {"classic": False, "nodes 2.0": True}
TRAINER, TITLE = "RetuneTrainLora", "Train a style LoRA"
VALUES = """(kind) => Object.fromEntries(window.comfyAPI.app.app.graph.nodes.find((node) => node.type === kind).widgets
  .map((widget) => [widget.name, widget.value]))"""
REOPEN = "() => window.comfyAPI.app.app.loadGraphData(window.comfyAPI.app.app.graph.serialize(), true, true, null)"
QUICK = {"steps": 1, "batch_size": 1}
SMALL = {"RetuneSamplePrompts": {"every": 2, "steps": 1, "prompts": "a red circle"}, "KSampler": {"steps": 1}}
SMALL |= {"RetuneDemoDataset": {"count": 4}}


@pytest.mark.parametrize("renderer", ["classic", pytest.param("nodes 2.0", marks=pytest.mark.slow)])
def test_a_preset_fills_the_widgets_and_a_change_makes_it_custom(editor, renderer):
    editor.open(Comfy_VueNodes_Enabled=RENDERERS[renderer])
    editor.load(TITLE)
    for kind, presets in ((TRAINER, LORA_PRESETS), ("RetuneTrainingSettings", PRESETS)):
        for name, wanted in presets.items():
            edit(editor, kind, preset=name)
            values = editor.page.evaluate(VALUES, kind)
            assert {key: values[key] for key in wanted} == wanted and values["preset"] == name
    edit(editor, TRAINER, preset="style")
    editor.page.evaluate(REOPEN)
    values = editor.page.evaluate(VALUES, TRAINER)
    assert values["preset"] == "style" and values["rank"] == 32 and values["algorithm"] == "LoCon"
    edit(editor, TRAINER, steps=7)
    assert editor.page.evaluate(VALUES, TRAINER)["preset"] == "style"  # which names no steps
    edit(editor, TRAINER, rank=4)
    values = editor.page.evaluate(VALUES, TRAINER)
    assert values["preset"] == "custom" and values["rank"] == 4 and values["alpha"] == 32
    assert not editor.complaints


def edit(editor, kind: str, **values) -> None:
    change = """([kind, values]) => {
      const node = window.comfyAPI.app.app.graph.nodes.find((found) => found.type === kind);
      for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((found) => found.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
    }"""
    editor.page.evaluate(change, [kind, values])


@pytest.mark.slow
def test_what_a_preset_fills_in_is_what_the_run_uses(editor):
    editor.open(Comfy_VueNodes_Enabled=False)
    runs = {("style", "SD1.5 6 GB"), ("character", "T5 swap")}
    for lora, settings in sorted(runs):
        run_name = f"preset {lora}"
        chosen = {
            TRAINER: {"run_name": run_name, "preset": lora} | QUICK,
            "RetuneTrainingSettings": {"preset": settings},
        }
        editor.load(TITLE, **SMALL, **chosen)
        shown = [editor.page.evaluate(VALUES, kind) for kind in chosen]
        editor.queue()
        editor.see("finished", "step 1 of 1", timeout=120)
        file = editor.server.base_directory / "output" / "retune" / run_name / "config.json"
        used = json.loads(file.read_text(encoding="utf-8"))["config"]
        for values, config in zip(shown, (used, used["settings"]), strict=True):
            chosen_values = {key: value for key, value in values.items() if key in config and value != "auto"}
            assert chosen_values == {key: config[key] for key in chosen_values}  # "auto" is recorded as what it became
        assert "the run has" not in editor.page.locator(".retune-view").inner_text()
    assert not editor.complaints
