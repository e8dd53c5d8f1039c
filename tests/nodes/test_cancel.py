"""ComfyUI's cancel, "finish now" and memory errors: nodes called as ComfyUI calls them, and a real server."""

import hashlib
import json
import random
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from retune.training.commands.comfyui_server import WorkflowFailed
from retune.training.common.foreign import read_tensors
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings

WORKFLOWS = Path(__file__).parents[1] / "workflows"
STEADY = {"lr_schedule": "constant", "warmup_steps": 0, "validation_fraction": 0.3, "validate_every": 2}


@pytest.fixture
def progress(comfyui, monkeypatch):
    """What training nodes say, each text with its time; `then(text)` is called after it."""
    from retune.nodes.ui import progress as module

    said, then = [], []

    class Server:
        def send_progress_text(self, text, node):
            said.append((time.monotonic(), text))
            for one in then:
                one(text)

        def send_sync(self, event, values):
            pass

    monkeypatch.setattr(module, "_server", Server)
    monkeypatch.setattr(module, "TEXT_INTERVAL", -1.0)  # every text counts here
    said_and_then = (said, then)
    yield said_and_then
    assert not heartbeats()


def heartbeats():
    return [thread for thread in threading.enumerate() if thread.name == "retune heartbeat"]


def trained(demo, pictures, name, steps=4, node_id="8"):
    """RetuneTrainModel as ComfyUI executes it; returns the run's folder."""
    from retune.nodes.train import RetuneTrainModel

    class Node(RetuneTrainModel):
        hidden = SimpleNamespace(unique_id=node_id, prompt={}, extra_pnginfo=None)

    model, clip, vae = demo
    values = {"steps": steps, "batch_size": 2, "learning_rate": 1e-3, "train": "QK", "train_projection": False}
    samples = SamplePrompts(prompts=("a red circle",), every=2, steps=2, cfg=2.0, width=64, height=64)
    settings = TrainingSettings(save_every=3, **STEADY)
    with torch.inference_mode():
        found = Node.execute(
            model, clip, vae, pictures, settings=settings, samples=samples, run_name=name, seed=0, **values
        )
    return found.result[2]


def status_of(folder):
    return json.loads((folder / "status.json").read_text(encoding="utf-8"))


def digest(folder, artifact="model.safetensors"):
    """Hashes of rows, pictures and the result's tensors; its metadata holds the run's name."""
    files = [folder / "metrics.jsonl", *sorted((folder / "samples").iterdir())]
    tensors, _ = read_tensors(folder / artifact)
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    return hashes | {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def expect_nothing_half_written(folder):
    """Every file opens: states, rows, pictures; and no temporary one is left. Returns the run's state."""
    from PIL import Image
    from retune.training.loop.checkpoint import load_state
    from retune.training.runs.folder import RunFolder

    run = RunFolder(folder)
    load_state(run)
    assert not list(folder.rglob("*.tmp"))
    for row in run.rows():
        for name in row.get("files", ()):
            with Image.open(folder / "samples" / name) as image:
                image.load()
    return status_of(folder)["state"]


PHASES = ("loading", "caching", "validating", "drawing samples at", "drawing samples (0/1)", "step 2")
PHASES += ("saving", "writing")


def test_a_cancel_in_every_phase_ends_at_once_and_the_run_goes_on(demo, pictures, progress):
    import comfy.model_management as management

    _, then = progress
    whole = digest(trained(demo, pictures, "whole"))
    asked = []

    def cancel(text):
        if text.startswith(phase) and not asked:
            asked.append(text)
            management.interrupt_current_processing()

    then.append(cancel)
    for phase in PHASES:
        asked.clear()
        with pytest.raises(management.InterruptProcessingException):
            trained(demo, pictures, "cancelled")
        assert asked and not management.processing_interrupted() and not heartbeats()
        if phase != "loading":  # a cancel in the very last phase finds the run finished; the prompt is interrupted
            state = expect_nothing_half_written(runs() / "cancelled")
            assert state == ("finished" if phase == "writing" else "interrupted"), phase
    then.clear()
    assert digest(trained(demo, pictures, "cancelled")) == whole


def runs():
    from retune.nodes.common.paths import runs_folder

    return runs_folder()


def test_finish_now_ends_the_run_and_the_graph_goes_on(demo, pictures, progress):
    from retune.nodes.ui.running import finish

    _, then = progress
    answers = []
    then.append(lambda text: answers.append(finish("asked")) if text.startswith("step 2 of 6") else None)
    assert not finish("asked")
    folder = trained(demo, pictures, "asked", steps=6)
    assert set(answers) == {True} and not finish("asked")
    status = status_of(folder)
    assert status["state"] == "finished" and status["finished_on_request"] and status["step"] == 2
    assert (folder / "model.safetensors").exists() and (folder / "report.html").exists()
    then.clear()
    before = digest(folder)
    assert digest(trained(demo, pictures, "asked", steps=6)) == before


def test_a_failed_run_is_not_known_any_more_and_comfyui_knows_it_is_memory(demo, pictures, progress):
    import comfy.model_management as management
    from retune.nodes.ui.running import finish

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = demo[0].model.diffusion_model.time_embed.register_forward_hook(full)
    try:
        with pytest.raises(
            torch.cuda.OutOfMemoryError, match="memory ran out in the first step.*batch_size 1"
        ) as caught:
            trained(demo, pictures, "full", steps=2)
    finally:
        hook.remove()
    assert management.is_oom(caught.value) and not finish("full") and not heartbeats()
    assert status_of(runs() / "full")["state"] == "failed"


def test_a_phase_that_takes_long_is_said_again_with_its_seconds(demo, pictures, progress, monkeypatch):
    from retune.nodes.ui import heartbeat
    from retune.nodes.ui import progress as module

    monkeypatch.setattr(module, "Heartbeat", lambda say: heartbeat.Heartbeat(say, 0.2))
    said, _ = progress
    calls = [0]

    def slow(*_):
        calls[0] += 1
        time.sleep(1.0 if calls[0] == 1 else 0.0)

    hook = demo[0].model.diffusion_model.time_embed.register_forward_hook(slow)
    try:
        trained(demo, pictures, "slow", steps=1)
    finally:
        hook.remove()
    waits = [text for _, text in said if "…" in text]
    assert any(text.startswith(("validating", "drawing")) and text.endswith("… 1 s") for text in waits)
    count = len(said)
    time.sleep(0.5)
    assert len(said) == count


def test_a_node_that_took_long_says_how_long(progress, monkeypatch):
    from retune.nodes.ui import heartbeat
    from retune.nodes.ui import progress as module

    monkeypatch.setattr(module, "Heartbeat", lambda say, phase: heartbeat.Heartbeat(say, 0.1, phase))
    node, (said, _) = SimpleNamespace(hidden=SimpleNamespace(unique_id="3")), progress
    with module.reporting(node, "drawing"):
        pass
    assert said == []
    with module.reporting(node, "drawing"):
        time.sleep(1.2)
    *texts, last = [text for _, text in said]
    assert len(texts) > 2 and all(text.startswith("drawing …") for text in texts)
    assert last == "drawing: done in 1 s"
    said.clear()
    with pytest.raises(ValueError), module.reporting(node, "drawing"):
        time.sleep(0.3)
        raise ValueError
    assert not [text for _, text in said if "done" in text]


def prompt_of(name, **training):
    """A workflow's training alone, at a size that takes seconds."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    small = {"5": {"count": 12}, "6": {"save_every": 3, "warmup_steps": 1, **VALIDATED}, "7": {"every": 4, "steps": 4}}
    small |= {"8": {"batch_size": 2} | training}
    for node in small.keys() & prompt.keys():
        prompt[node]["inputs"] |= small[node]
    wanted, found = ["8"], {}
    while wanted:
        node = wanted.pop()
        found[node] = prompt[node]
        wanted += [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return found


VALIDATED = {"validation_fraction": 0.3, "validate_every": 3, "lr_schedule": "constant"}
CASES = {
    "swap_text_encoder": ("model.safetensors", {}),
    "tune_text_encoder": ("tuned.safetensors", {"sampling_steps": 6, "width": 64, "height": 64}),
}
MOMENTS = {
    "once it is begun": lambda event: "node" in event,
    "while it is loaded": lambda event: event.get("text") == "loading",
    "while the cache is filled": lambda event: event.get("text") == "loading",
    "in a step": lambda event: event.get("step", 0) > 0,
    "in a validation or a save": lambda event: event.get("step", 1) % 3 == 0,
    "while samples are drawn": lambda event: event.get("step", 1) % 4 == 0,
}
"""What is going on, soon after the first event of ComfyUI with such data: see `prompt_of`."""
CANCELS = 8


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cancelled_at_random_moments_it_ends_the_same(comfyui_server, name):
    """Each time some random time after a phase has begun or the prompt was queued; then the same run goes on."""
    running = comfyui_server
    artifact, training = CASES[name]
    source, delays, steps_at = random.Random(f"cancel {name}"), [], []
    folder = running.base_directory / "output" / "retune" / f"{name} cancelled"
    for number in range(CANCELS):
        moment = list(MOMENTS)[number % len(MOMENTS)]
        if moment == "while the cache is filled":
            shutil.rmtree(folder.with_name(".cache"), ignore_errors=True)
        running.events.clear()
        queued = running.queue(prompt_of(name, run_name=folder.name, steps=10_000, **training))
        wait_for(running, MOMENTS[moment])
        time.sleep(source.random() * source.choice((0.1, 0.5, 2.0)))
        began = time.monotonic()
        running.interrupt()
        with pytest.raises(WorkflowFailed, match="interrupted in node"):
            running.wait(queued)
        delays.append((round(time.monotonic() - began, 2), moment))
        if (folder / "status.json").exists():
            assert expect_nothing_half_written(folder) == "interrupted"
    steps = status_of(folder)["step"] + 2
    whole = folder.with_name(f"{name} whole")
    running.on_event = lambda event: event["type"] == "retune.step" and steps_at.append(time.monotonic())
    try:
        for run in (folder, whole):
            steps_at.clear()
            running.run(prompt_of(name, run_name=run.name, steps=steps, **training))
    finally:
        running.on_event = None
    print(f"{name}: {steps} steps; seconds from cancel to the end of the prompt, and where: {delays}")  # noqa: T201
    slowest = max(b - a for a, b in zip(steps_at, steps_at[1:], strict=False))
    assert max(delays)[0] < max(5, slowest)  # a step may be slow where the machine has other work
    assert digest(folder, artifact) == digest(whole, artifact)


def wait_for(running, matches):
    """Until an event's data match."""
    deadline = time.monotonic() + 300
    while not any(matches(event["data"]) for event in list(running.events)):
        running.check_alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"no such event among {running.events[-5:]}")
        time.sleep(0.01)
