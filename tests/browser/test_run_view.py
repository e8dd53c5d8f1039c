"""The run in its node: restored from the server, in both renderers and themes, in subgraphs, at hardly any cost."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "js"
TRAINER = "RetuneTrainLora"
TITLE = "Train a style LoRA"
RENDERERS = {"classic": {"Comfy_VueNodes_Enabled": False, "Comfy_ColorPalette": "dark"}}
RENDERERS["nodes 2.0"] = {"Comfy_VueNodes_Enabled": True, "Comfy_ColorPalette": "light"}
PROFILED = 3
"""Seconds of a profile."""


@pytest.mark.parametrize("renderer", ["classic", pytest.param("nodes 2.0", marks=pytest.mark.slow)])
def test_a_node_shows_its_run_and_costs_nothing_while_idle(editor, written_run, renderer):
    written_run("shown")
    editor.open(**RENDERERS[renderer])
    editor.load(TITLE, RetuneTrainLora={"run_name": "shown"})
    editor.focus(TRAINER)
    editor.see("finished", "step 40 of 40")
    editor.page.wait_for_function(
        "() => [...document.querySelectorAll('.retune-strip img')].every(i => i.naturalWidth)"
    )
    assert editor.page.locator(".retune-strip img").count() == 2
    check_slider(editor)
    check_hover(editor)
    linear = editor.chart()
    editor.page.get_by_role("button", name="linear").click()
    editor.page.wait_for_function(
        "(old) => document.querySelector('.retune-view canvas').toDataURL() !== old", arg=linear
    )
    editor.shoot(f"finished run, {renderer}")
    drawn, idle = cost_per_frame(editor, redrawn=True), cost_per_frame(editor)
    assert idle < 2 and drawn > 0.01  # the profile does see our scripts
    check_other_names(editor)
    assert not editor.complaints


def check_slider(editor) -> None:
    first = editor.page.locator(".retune-strip img").first
    assert "000040_00.png?v=" in first.get_attribute("src") and first.get_attribute("title") == "a red circle"
    editor.page.locator(".retune-view input[type=range]").fill("0")
    assert "000010_00.png?v=" in first.get_attribute("src")
    assert "step 10, alignment 0.125" in editor.page.locator(".retune-view").inner_text()


def hovered(editor) -> str:
    """The text shown for the middle of the chart."""
    box = editor.page.locator(".retune-view canvas").bounding_box()
    editor.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    return editor.page.locator(".retune-tip").inner_text()


def check_hover(editor) -> None:
    tip = hovered(editor)
    step = int(tip.split()[1])
    loss = 0.3 / step**0.5 + 0.02 * (step % 3)
    assert 15 <= step <= 25 and f"loss {loss:.3g}" in tip and "learning rate" in tip and "validation" in tip
    editor.page.mouse.move(5, 5)
    assert editor.page.locator(".retune-tip").is_hidden()


def check_other_names(editor) -> None:
    """A name that no run has empties the view; the old one brings the run back."""
    for name, state in (("nobody", "no run yet"), ("shown", "finished")):
        rename = """(name) => {
          const widget = window.comfyAPI.app.app.graph.nodes.find((n) => n.type === "RetuneTrainLora").widgets
            .find((w) => w.name === "run_name");
          widget.value = name;
          widget.callback?.(name);
        }"""
        editor.page.evaluate(rename, name)
        editor.see(state)


def cost_per_frame(editor, redrawn: bool = False) -> float:
    """Milliseconds per frame in which our scripts are on the stack, over PROFILED seconds in which nothing happens.

    redrawn: the chart is switched between linear and log in every frame instead.
    """
    editor.devtools.send("Profiler.enable")
    editor.devtools.send("Profiler.setSamplingInterval", {"interval": 200})
    editor.devtools.send("Profiler.start")
    count = """([seconds, redrawn]) => new Promise((done) => {
      const end = performance.now() + 1000 * seconds;
      const button = [...document.querySelectorAll(".retune-view button")].find((b) => /linear|log/.test(b.innerText));
      let frames = 0;
      const next = () => {
        if (redrawn) button.click();
        performance.now() < end ? requestAnimationFrame(next, frames++) : done(frames);
      };
      next();
    })"""
    frames = editor.page.evaluate(count, [PROFILED, redrawn])
    profile = editor.devtools.send("Profiler.stop")["profile"]
    return time_of(profile, "/extensions/retune/") / 1000 / frames


def time_of(profile: dict, part: str) -> float:
    """Microseconds of a profile in functions of files with this part in their address, and in what they call."""
    nodes = {node["id"]: node for node in profile["nodes"]}
    ours = set()

    def mark(number: int, inside: bool) -> None:
        inside = inside or part in nodes[number]["callFrame"]["url"]
        if inside:
            ours.add(number)
        for child in nodes[number].get("children", []):
            mark(child, inside)

    mark(profile["nodes"][0]["id"], False)
    return sum(d for sample, d in zip(profile["samples"], profile["timeDeltas"], strict=True) if sample in ours)


@pytest.mark.slow
def test_a_node_in_a_subgraph_shows_its_run_too(editor, written_run):
    written_run("inside")
    editor.open(**RENDERERS["classic"])
    editor.load(TITLE, RetuneTrainLora={"run_name": "inside"})
    editor.see("finished")
    enter = """() => {
      const { graph, canvas } = window.comfyAPI.app.app, node = graph.nodes.find((n) => n.type === "RetuneTrainLora");
      const { subgraph, node: outside } = graph.convertToSubgraph(new Set([node]));
      canvas.openSubgraph(subgraph, outside);
      canvas.ds.reset();
      canvas.setDirty(true, true);
    }"""
    editor.page.evaluate(enter)
    editor.see("finished", "step 40 of 40")
    editor.shoot("in a subgraph")
    assert not editor.complaints


@pytest.mark.slow
def test_steps_that_come_while_the_run_is_read_are_not_lost(editor, written_run):
    written_run("read slowly")
    editor.open(**RENDERERS["classic"])
    editor.page.route("**/retune/runs/read*", lambda route: (editor.page.wait_for_timeout(1500), route.continue_()))
    editor.load(TITLE, RetuneTrainLora={"run_name": "read slowly"})
    send = """() => {
      const about = { run: "read slowly", node: "8", steps: 60, validation: [], seconds_per_step: 1, learning_rate: 0 };
      for (let step = 36; step <= 50; step++)
        window.comfyAPI.api.api.dispatchCustomEvent("retune.step",
          { ...about, step, loss: 0.5, memory: { used: 1, total: 2 } });
    }"""
    editor.page.wait_for_timeout(700)
    editor.page.evaluate(send)
    editor.see("running", "step 50 of 60")
    assert not editor.complaints


@pytest.mark.slow
@pytest.mark.parametrize("other", [0.3, 0.30000000000000004, 0.3000000003])
def test_losses_that_hardly_differ_are_drawn(editor, written_run, other):
    """As after the first step, where the smoothed loss is the raw one up to its last digit."""
    written_run("flat", loss=lambda step: (0.3, other)[step % 2])
    editor.open(**RENDERERS["classic"])
    editor.load(TITLE, RetuneTrainLora={"run_name": "flat"})
    editor.focus(TRAINER)
    editor.see("finished", "step 40 of 40")
    linear = editor.chart()
    editor.page.get_by_role("button", name="linear").click()
    changed = "(old) => document.querySelector('.retune-view canvas').toDataURL() !== old"
    editor.until(changed, linear)
    assert "loss 0.3" in hovered(editor)
    assert not editor.complaints


def test_the_scripts_are_small():
    assert sum(file.stat().st_size for file in SCRIPTS.glob("*.js")) <= 60 * 1024
