"""The demo as a workflow: the same figures' names, the same report."""

import pytest
from retune.training.commands.demo import DemoConfig
from retune.training.commands.demo_in_comfyui import demo_prompt, run_demo_in_comfyui
from retune.training.common.callbacks import Callbacks


def test_the_workflow_takes_the_demos_size():
    config = DemoConfig(images=12, steps=3, batch_size=2, learning_rate=1e-3, run_name="x", restart=True)
    prompt = demo_prompt(config)
    by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert by_type["RetuneDemoDataset"]["count"] == 12
    train = by_type["RetuneTrainModel"]
    assert (train["steps"], train["batch_size"], train["learning_rate"]) == (3, 2, 1e-3)
    assert (train["run_name"], train["resume"]) == ("x", "restart")
    with pytest.raises(ValueError, match="start is 'reset'.*--no-comfyui"):
        demo_prompt(DemoConfig(start="reset"))


@pytest.mark.slow
def test_the_demo_runs_in_comfyui(comfyui, tmp_path):
    said = []

    class Listener(Callbacks):
        def on_text(self, text):
            said.append(text)

    config = DemoConfig(output=tmp_path, images=40, judged=6, steps=3, batch_size=4)
    result = run_demo_in_comfyui(config, comfyui, Listener())
    assert list(result)[-1] == "report" and 0 <= result["alignment_t5_trained"] <= 1
    assert (tmp_path / "output" / "retune" / "demo T5 swap" / "report.html").is_file()
    assert any("step 3 of 3" in text for text in said)
