"""Every workflow without a browser: through `comfy run`, which gives up after two minutes without a word.

Those of the examples' API twins stand for the examples: test_examples.py holds both to the same inputs.
"""

import json
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKFLOWS = Path(__file__).parents[1] / "workflows"
PREPARED = {"apply_loras", "blend_controlnet", "blend_inpainting"}
"""They read files that the tests of their nodes write."""
SMALL = {
    "5": {"count": 12},
    "7": {"every": 4, "steps": 4},
    "8": {"steps": 4, "batch_size": 2},
    "11": {"batch_size": 1},
    "12": {"steps": 2},
    "19": {"steps": 2},
}
QUIET = 10.0
"""Most seconds without a word from a training, in any phase."""


@pytest.mark.parametrize("name", sorted({path.stem for path in WORKFLOWS.glob("*.json")} - PREPARED))
def test_workflows_run_through_comfy_cli(comfyui_server, comfy_cli, tmp_path, name):
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node, values in SMALL.items():
        if node in prompt:
            inputs = prompt[node]["inputs"]
            inputs |= {key: value for key, value in values.items() if key in inputs}
    for node in prompt.values():
        if "run_name" in node["inputs"]:
            node["inputs"]["run_name"] += " by comfy run"
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(prompt), encoding="utf-8")
    texts = []
    comfyui_server.on_event = lambda event: event["type"] == "progress_text" and texts.append(time.monotonic())
    address = comfyui_server.url.rpartition("/")[2].partition(":")
    options = ["--host", address[0], "--port", address[2], "--timeout", "120"]
    try:
        done = comfy_cli("run", "--workflow", str(file), "--wait", *options)
    finally:
        comfyui_server.on_event = None
    assert done.returncode == 0, done.stdout + done.stderr
    shown = {number for number, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage")}
    outputs = last_outputs(comfyui_server)
    assert all(outputs[number]["images"] for number in shown)
    trains = any("run_name" in node["inputs"] for node in prompt.values())
    assert not trains or len(texts) > 3
    assert max((b - a for a, b in zip(texts, texts[1:], strict=False)), default=0.0) < QUIET


def last_outputs(server) -> dict:
    """Outputs by node id of the prompt that was queued last."""
    history = json.loads(server.request("/history")).values()
    return max(history, key=lambda entry: entry["prompt"][0])["outputs"]
