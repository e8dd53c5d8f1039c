"""Every example workflow as a user has it: opened, run, watched, stopped, opened again and run to the same end."""

import json
import time
from pathlib import Path

import pytest
from retune.training.commands.comfyui_server import raise_if_failed

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
TITLES = sorted(file.stem for file in EXAMPLES.glob("*.json"))
TRAINERS = ("RetuneTrainModel", "RetuneTrainLora", "RetuneTrainEmbedding", "RetuneRewardTune")
SMALL = {kind: {"steps": 60, "batch_size": 1} for kind in TRAINERS}  # long enough to be stopped on a fast machine
SMALL["RetuneTrainModel"] |= {"steps": 240, "batch_size": 6}  # its steps are the shortest
SMALL["RetuneRewardTune"] |= {"steps": 16, "sampling_steps": 3, "gradient_steps": 1, "width": 64, "height": 64}
SMALL |= {"RetuneSamplePrompts": {"every": 20, "steps": 2, "prompts": "a red circle"}, "KSampler": {"steps": 2}}
SMALL |= {"EmptyLatentImage": {"batch_size": 1}, "RetuneDemoDataset": {"count": 16}}
CLASSIC, NEW = {"Comfy_VueNodes_Enabled": False}, {"Comfy_VueNodes_Enabled": True}


def trainer_of(title: str) -> str | None:
    graph = json.loads((EXAMPLES / f"{title}.json").read_text(encoding="utf-8"))
    return next((node["type"] for node in graph["nodes"] if node["type"] in TRAINERS), None)


def edits(title: str, run_name: str, **more) -> dict:
    trainer = trainer_of(title)
    return SMALL | {trainer: SMALL[trainer] | {"run_name": run_name} | more} if trainer else SMALL


def rename(editor, kind: str, run_name: str) -> None:
    change = """([kind, name]) => {
      const node = window.comfyAPI.app.app.graph.nodes.find((found) => found.type === kind);
      const widget = node.widgets.find((found) => found.name === "run_name");
      widget.value = name;
      widget.callback?.(name);
    }"""
    editor.page.evaluate(change, [kind, run_name])


def wait_for_queue(editor, timeout: float = 600) -> None:
    """Waits until the last prompt is done; it must have succeeded."""
    deadline = time.monotonic() + timeout
    while any(json.loads(editor.server.request("/queue")).values()):
        assert time.monotonic() < deadline, "the queue was not done"
        time.sleep(0.5)
    history = [entry["status"] for entry in json.loads(editor.server.request("/history")).values()]
    raise_if_failed(max(history, key=lambda status: status["messages"][0][1]["timestamp"]))


def wait_for_movement(editor, kind: str) -> None:
    """Two pictures of the chart that differ, while the run goes on."""
    editor.see("running", "s/step", timeout=300)
    editor.focus(kind)  # late, since a template that opens moves the view again
    first = editor.chart()
    moved = "(old) => document.querySelector('.retune-view canvas').toDataURL() !== old"
    editor.until(moved, first, timeout=60)
    editor.see("running")


def made_by(editor, run_name: str) -> dict[str, bytes]:
    folder = editor.server.base_directory / "output" / "retune" / run_name
    files = [folder / "metrics.jsonl", *sorted((folder / "samples").iterdir())]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("title", TITLES)
def test_an_example_runs_stops_and_goes_on_to_the_same_end(editor, title):
    trainer = trainer_of(title)
    steps = SMALL[trainer]["steps"] if trainer else 0
    editor.open(**CLASSIC)
    editor.load_template(title, **edits(title, f"{title} stopped"))
    editor.queue()
    if trainer is None:
        wait_for_queue(editor)
        assert not editor.complaints
        return
    wait_for_movement(editor, trainer)
    editor.execute("Comfy.Interrupt")
    editor.see("interrupted", "queue it again to go on", timeout=60)
    editor.shoot(f"{title}, stopped")
    editor.open()
    editor.load(title, **edits(title, f"{title} stopped"))
    editor.focus(trainer)
    editor.see("interrupted")
    editor.chart()
    editor.queue()
    editor.see("finished", f"step {steps} of {steps}", timeout=600)
    wait_for_queue(editor)
    rename(editor, trainer, f"{title} straight")
    editor.queue()
    editor.see("finished", f"step {steps} of {steps}", timeout=600)
    wait_for_queue(editor)
    assert made_by(editor, f"{title} stopped") == made_by(editor, f"{title} straight")
    assert not editor.complaints


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title in TITLES if trainer_of(title)])
def test_an_example_is_watched_over_a_reload_and_finished_by_hand_in_nodes_2(editor, title):
    steps = 3000  # more than are ever done
    editor.open(**NEW)
    editor.load_template(title, **edits(title, f"{title} by hand", steps=steps))
    editor.queue()
    wait_for_movement(editor, trainer_of(title))
    editor.open()
    editor.load(title, **edits(title, f"{title} by hand", steps=steps))
    wait_for_movement(editor, trainer_of(title))
    editor.shoot(f"{title}, nodes 2.0")
    editor.press("Finish now")
    editor.see("finished", timeout=120)
    wait_for_queue(editor)
    folder = editor.server.base_directory / "output" / "retune" / f"{title} by hand"
    assert 2 <= json.loads((folder / "status.json").read_text(encoding="utf-8"))["step"] < steps
    assert not editor.complaints
    editor.queue()  # cached, or finished already: the node shows the run as it ended
    wait_for_queue(editor)
    editor.see("finished")
