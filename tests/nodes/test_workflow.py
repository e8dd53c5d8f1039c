"""The example workflow through a real ComfyUI, over /prompt and /ws: run, repeat, stop, kill, go on."""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from retune.training.commands.comfyui_server import server
from retune.training.common.foreign import read_tensors
from retune.training.runs.folder import RunFolder
from safetensors import safe_open
from safetensors.torch import save_file

WORKFLOWS = Path(__file__).parents[1] / "workflows"


def small_prompt(name, **training):
    """A workflow at a size that takes seconds."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    small = {"5": {"count": 12}, "6": {"save_every": 3, "warmup_steps": 1}, "7": {"every": 4, "steps": 2}}
    small |= {"8": {"steps": 6, "batch_size": 2} | training, "11": {"batch_size": 1}, "12": {"steps": 2}}
    for node in small.keys() & prompt.keys():
        prompt[node]["inputs"] |= small[node]
    return prompt


def swap_prompt(**training):
    return small_prompt("swap_text_encoder", **training)


def training_only(**training):
    """Without what comes after the training node, apart from the chart."""
    prompt = swap_prompt(**training)
    return {node: prompt[node] for node in ("1", "2", "18", "3", "5", "6", "7", "8", "15")}


def run_folder(base: Path, name: str = "demo T5 swap") -> Path:
    return base / "output" / "retune" / name


def digest(folder: Path) -> dict[str, str]:
    """Hashes of rows, pictures and the result's tensors, with its metadata, in which the run's name does not count."""
    files = [folder / "metrics.jsonl", *sorted((folder / "samples").iterdir())]
    tensors, metadata = read_tensors(folder / "model.safetensors")
    contents = {file.name: file.read_bytes() for file in files}
    contents |= {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    contents["metadata"] = json.dumps(metadata, sort_keys=True).replace(folder.name, "").encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def wait_for_step(running, step: int, run: str = "") -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        running.check_alive()
        steps = [event["data"] for event in list(running.events) if event["type"] == "retune.step"]
        if any(data["step"] >= step and data["run"] == (run or data["run"]) for data in steps):
            return
        time.sleep(0.01)
    raise TimeoutError(f"step {step} did not come")


def check_events(events, folder) -> None:
    """What the page is told of a run: every row's figures with pace and memory, the samples' files, the state."""
    told = {kind: [e for e in events if e["type"] == f"retune.{kind}"] for kind in ("step", "sample", "state")}
    rows = RunFolder(folder).rows()
    for event, row in zip(told["step"], [row for row in rows if "event" not in row], strict=True):
        assert event.items() >= {**row, "steps": 6, "run": folder.name, "node": "8"}.items()
        assert 0 < event["memory"]["used"] < event["memory"]["total"] and event["seconds_per_step"] > 0
    validations = [row for event in told["step"] for row in event["validation"]]
    logged = [row for row in rows if row.get("event") == "validation"]
    assert validations == [row for row in logged if row["step"] < 6]  # the last one comes after the last step
    assert [e["files"] for e in told["sample"]] == [row["files"] for row in rows if row.get("event") == "sample"]
    states = [e["state"] for e in told["state"]]
    assert states[0] == "preparing" and "running" in states and "finished" in states


def test_the_whole_road(comfyui_server):
    tmp_path = comfyui_server.base_directory
    comfyui_server.events.clear()
    outputs = comfyui_server.run(swap_prompt())
    folder = run_folder(tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, 7))
    assert sorted(p.name for p in (folder / "samples").iterdir())[0] == "000000_00.png"
    assert len(list((folder / "samples").iterdir())) == 3 * (4 + 1)  # and the sheet
    assert json.loads((folder / "config.json").read_text())["prompt"]["8"]["class_type"] == "RetuneTrainModel"
    check_events([e["data"] | {"type": e["type"]} for e in comfyui_server.events], folder)
    text = [e["data"]["text"] for e in comfyui_server.events if e["type"] == "progress_text"]
    assert any("step 6 of 6" in line for line in text)
    image = outputs["14"]["images"][0]
    assert (tmp_path / "output" / image["subfolder"] / image["filename"]).exists()
    assert Path(outputs["16"]["text"][0]).exists() and outputs["15"]["images"]

    again = load_again(tmp_path, outputs["16"]["text"][0])
    reloaded = comfyui_server.run(again)
    pixels = [tmp_path / "output" / i["subfolder"] / i["filename"] for i in (image, reloaded["14"]["images"][0])]
    from retune.training.data.images import load_image

    first, second = (load_image(path) for path in pixels)
    assert (first - second).abs().max() <= 1 / 255  # the saved checkpoint and text encoder draw the same picture


def test_a_lora_goes_on_top_and_a_saved_model_draws_the_same(comfyui_server):
    base = comfyui_server.base_directory
    write_lora(base / "models" / "loras" / "on_top.safetensors")
    prompt = swap_prompt(run_name="with a lora")
    for node, strength in (("30", 0.0), ("31", 3.0)):
        inputs = {"model": ["8", 0], "lora_name": "on_top.safetensors", "strength_model": strength}
        prompt[node] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    prompt["32"] = {"class_type": "ModelSave", "inputs": {"model": ["8", 0], "filename_prefix": "diffusion_models/t"}}
    for number, model in enumerate((["8", 0], ["30", 0], ["31", 0])):
        add_picture(prompt, number, model)
    pictures = [picture(base, output) for output in images(comfyui_server.run(prompt))]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])

    (saved,) = (base / "output" / "diffusion_models").glob("t_*.safetensors")
    inputs = {"text_encoder": "clip", "file": saved.name}
    prompt = swap_prompt(run_name="with a lora") | {"33": {"class_type": "RetuneLoadDemoModel", "inputs": inputs}}
    add_picture(prompt, 0, ["33", 0])
    (reloaded,) = (picture(base, output) for output in images(comfyui_server.run(prompt)))
    assert (pictures[0] - reloaded).abs().max() <= 1 / 255


def write_lora(path: Path) -> None:
    """A kohya-style LoRA of rank 2 on every key projection of the demo's cross-attention."""
    from retune.training.demo.files import weights_path

    tensors = {}
    with safe_open(weights_path("demo.safetensors"), "pt") as file:
        keys = [key for key in file.keys() if key.endswith("attn2.to_v.weight")]
        for index, key in enumerate(keys):
            rows, columns = file.get_slice(key).get_shape()
            random = torch.Generator().manual_seed(index)
            name = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=random) * 0.2
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=random) * 0.2
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def add_picture(prompt: dict, number: int, model: list) -> None:
    """Sampler, decoder and saved image for one more model."""
    for node, changes in (("12", {"model": model}), ("13", {}), ("14", {"filename_prefix": f"picture{number}"})):
        copied = json.loads(json.dumps(prompt[node]))
        copied["inputs"] |= changes
        prompt[f"9{node}{number}"] = copied
    prompt[f"913{number}"]["inputs"]["samples"] = [f"912{number}", 0]
    prompt[f"914{number}"]["inputs"]["images"] = [f"913{number}", 0]


def images(outputs: dict) -> list[dict]:
    return [outputs[node]["images"][0] for node in sorted(outputs) if node.startswith("914")]


def picture(base: Path, output: dict) -> torch.Tensor:
    from retune.training.data.images import load_image

    return load_image(base / "output" / output["subfolder"] / output["filename"])


def load_again(base: Path, text_encoder: str) -> dict:
    """A graph that samples from the saved checkpoint and the saved text encoder."""
    prompt = swap_prompt()
    checkpoint = max((base / "output" / "checkpoints").glob("demo_t5_swap*.safetensors"))  # others save there too
    with safe_open(checkpoint, "pt") as file:
        names = set(file.keys())
    assert any(name.startswith("model.diffusion_model.") for name in names)
    sampler = {node: prompt[node] for node in ("9", "10", "11", "12", "13", "14")}
    sampler["1"] = {
        "class_type": "RetuneLoadDemoModel",
        "inputs": {"text_encoder": "none", "file": checkpoint.name},
    }
    sampler["2"] = {"class_type": "RetuneLoadTextEncoder", "inputs": {"file": f"retune/{Path(text_encoder).name}"}}
    sampler["9"]["inputs"]["clip"] = sampler["10"]["inputs"]["clip"] = ["2", 0]
    sampler["12"]["inputs"]["model"], sampler["13"]["inputs"]["vae"] = ["1", 0], ["1", 2]
    return sampler


def test_cancel_keeps_the_state_and_the_next_queue_goes_on(comfyui_server):
    folder = run_folder(comfyui_server.base_directory, "cancelled")
    comfyui_server.events.clear()
    prompt_id = comfyui_server.queue(training_only(steps=40, run_name="cancelled"))
    wait_for_step(comfyui_server, 2)
    comfyui_server.interrupt()
    with pytest.raises(RuntimeError, match="interrupted in node 8"):
        comfyui_server.wait(prompt_id)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "interrupted" and 2 <= status["step"] < 40
    stopped = status["step"]
    comfyui_server.events.clear()
    comfyui_server.run(training_only(steps=stopped + 2, run_name="cancelled"))
    steps = [e["data"]["step"] for e in comfyui_server.events if e["type"] == "retune.step"]
    assert steps == [stopped + 1, stopped + 2]


TRAINING = ("steps", "batch_size", "learning_rate")
ROW = (("lora", "strength_model", "strength_clip"), ("enabled", "blocks"))
TWINS = {
    "Swap the text encoder for T5": (
        "swap_text_encoder",
        "RetuneTrainModel",
        (*TRAINING, "train", "train_projection", "run_name", "seed", "resume"),
    ),
    "Train a style LoRA": (
        "train_style_lora",
        "RetuneTrainLora",
        (*TRAINING, "rank", "alpha", "algorithm", "targets", "text_encoder_learning_rate", "run_name", "seed"),
    ),
    "Train a textual inversion from five images": (
        "train_embedding",
        "RetuneTrainEmbedding",
        ("steps", "batch_size", "token", "vectors", "initial_text", "learning_rate", "run_name", "seed", "template"),
    ),
    "Reward-tune the text encoder": (
        "tune_text_encoder",
        "RetuneRewardTune",
        ("prompts", *TRAINING, "train", "method", "gradient_steps", "sampling_steps", "cfg", "clip_constraint"),
    ),
    "Blend tuned encoders": ("blend_tuned_encoders", "RetuneStepWindow", ("start_percent",)),
    "Use embeddings in prompts": ("use_embeddings", "RetuneLoadEmbedding", ("file", "token", "second_file")),
    "Apply several LoRAs": (
        "apply_several_loras",
        "RetuneApplyLora",
        ("count", *(f"count.{name}_{row}" for names in ROW for row in (1, 2) for name in names)),
    ),
}


@pytest.mark.parametrize("title", TWINS)
def test_example_workflows_and_their_twins_hold_the_same_nodes(comfyui_server, title):
    name, trainer, widgets = TWINS[title]
    example = WORKFLOWS.parents[1] / "example_workflows" / f"{title}.json"
    assert example.with_suffix(".jpg").exists()
    graph = json.loads(example.read_text(encoding="utf-8"))
    active = [node for node in graph["nodes"] if node["type"] != "MarkdownNote" and node["mode"] == 0]
    twin = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    assert sorted(node["type"] for node in active) == sorted(node["class_type"] for node in twin.values())
    known = comfyui_server.object_info()
    assert all(node["type"] in known for node in graph["nodes"] if node["type"] != "MarkdownNote")
    assert all(node["widgets_values"][:2] == [1, "fixed"] for node in active if node["type"] == "KSampler")
    (train,) = (node for node in active if node["type"] == trainer)
    inputs = next(node["inputs"] for node in twin.values() if node["class_type"] == trainer)
    assert train["widgets_values"][: len(widgets)] == [inputs[name] for name in widgets]


def test_several_loras_are_put_on_and_reported(comfyui_server):
    prompt = small_prompt("apply_several_loras")
    prompt["19"]["inputs"]["steps"] = 2
    outputs = comfyui_server.run(prompt)
    (report,) = outputs["2"]["text"]
    assert "warm edges" in report and "crescents" in report and report.count("LoCon") >= 2
    assert outputs["14"]["images"] and outputs["21"]["images"]


def test_a_word_of_the_demo_is_loaded_and_reported(comfyui_server):
    prompt = small_prompt("use_embeddings")
    prompt["19"]["inputs"]["steps"] = 2
    outputs = comfyui_server.run(prompt)
    (report,) = outputs["2"]["text"]
    assert "token <heart>" in report and "4 vectors of 128 numbers" in report and "nearest words" in report
    assert outputs["14"]["images"] and outputs["21"]["images"]


def test_a_word_is_trained_saved_and_read_by_stock_nodes(comfyui_server):
    prompt = small_prompt("train_embedding", run_name="word", token="<small-heart>", caption_word="figure, figures")
    prompt["5"]["inputs"]["count"] = 3
    prompt["19"]["inputs"]["steps"] = 2
    prompt["7"]["inputs"]["prompts"] = "two large red <small-heart>, white background"
    outputs = comfyui_server.run(prompt)
    base = comfyui_server.base_directory
    folder = run_folder(base, "word")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert any(row.get("event") == "watch" for row in rows) and any(row.get("event") == "sample" for row in rows)
    assert Path(outputs["16"]["text"][0]) == base / "models" / "embeddings" / "small-heart.safetensors"
    stock = {node: json.loads(json.dumps(prompt[node])) for node in ("1", "10", "11", "12", "13", "14")}
    text = prompt["9"]["inputs"]["text"].replace("<heart>", "embedding:small-heart")
    stock["9"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}
    stock["10"]["inputs"]["clip"] = ["1", 1]
    ours = prompt | {"9": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["8", 0], "text": text}}}
    ours["9"]["inputs"]["text"] = text.replace("embedding:small-heart", "<small-heart>")
    pictures = [picture(base, comfyui_server.run(graph)["14"]["images"][0]) for graph in (ours, stock)]
    assert torch.equal(*pictures)


def test_a_text_encoder_is_tuned_by_a_reward(comfyui_server):
    prompt = small_prompt("tune_text_encoder", gradient_steps=2, sampling_steps=3, width=64, height=64)
    prompt["19"]["inputs"]["steps"] = 2
    outputs = comfyui_server.run(prompt)
    folder = run_folder(comfyui_server.base_directory, "demo reward tuning")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "event" not in row]
    assert len(steps) == 6 and all({"reward", "demo aesthetic", "demo CLIP"} <= row.keys() for row in steps)
    assert outputs["14"]["images"] and outputs["21"]["images"]


def test_a_style_lora_is_trained_saved_and_put_on(comfyui_server):
    prompt = small_prompt("train_style_lora", rank=2, alpha=2.0)
    prompt["19"]["inputs"]["steps"] = 2
    outputs = comfyui_server.run(prompt)
    base = comfyui_server.base_directory
    folder = run_folder(base, "demo style LoRA")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    with safe_open(outputs["16"]["text"][0], "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert metadata["ss_network_dim"] == "2" and metadata["modelspec.title"] == "demo style LoRA"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg") and names[0].startswith("lora_unet_")
    (report,) = outputs["4"]["text"]
    assert "LoCon" in report and outputs["15"]["images"] and outputs["14"]["images"] and outputs["21"]["images"]
    comfyui_server.run(
        prompt | {"4": prompt["4"] | {"inputs": prompt["4"]["inputs"] | {"trained_strength_model": 0.0}}}
    )
    steps = [e["data"]["step"] for e in comfyui_server.events if e["type"] == "retune.step"]
    assert steps[-6:] == list(range(1, 7))


def test_reset_attention_scales_resets_and_trains(comfyui_server):
    comfyui_server.run(small_prompt("reset_attention"))
    folder = run_folder(comfyui_server.base_directory, "demo reset")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]
    assert names and all(".attn2." in name for name in names)


def test_refusals_name_what_is_wrong(comfyui_server):
    for change, message in (
        ({"run_name": "../x"}, "run name is '../x'"),
        ({"clip": ["1", 1], "train_projection": False, "model": ["1", 0], "vae": ["1", 2], "steps": 0}, "steps"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            comfyui_server.run(training_only(**change))


@pytest.mark.slow
def test_killed_at_any_step_it_ends_the_same(comfyui, comfyui_server, tmp_path):
    """A server that goes on with a killed run is the next one to be killed."""
    comfyui_server.run(training_only(run_name="not killed"))
    whole = digest(run_folder(comfyui_server.base_directory, "not killed"))
    with server(comfyui, tmp_path) as running:
        kill_at(running, 1)
    with server(comfyui, tmp_path) as running:
        assert end_of_killed(running, 1) == whole
        kill_at(running, 5)
    with server(comfyui, tmp_path) as running:
        assert end_of_killed(running, 5) == whole


def kill_at(running, step: int) -> None:
    running.queue(training_only(run_name=f"killed at {step}"))
    wait_for_step(running, step, f"killed at {step}")
    running.kill()


def end_of_killed(running, step: int) -> dict[str, str]:
    running.run(training_only(run_name=f"killed at {step}"))
    return digest(run_folder(running.base_directory, f"killed at {step}"))
