"""Blends with stock samplers, ControlNet and inpainting, through a real ComfyUI."""

import json
from pathlib import Path

import pytest
import torch
from retune.training.common.rng import generator
from retune.training.data.images import load_image
from safetensors.torch import save_file

pytestmark = pytest.mark.comfyui
WORKFLOWS = Path(__file__).parents[1] / "workflows"


def run(server, name, **changes):
    """Pictures of a workflow by their node, at a size that takes seconds; changes: inputs by node."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        small = {"steps": 4} if node["class_type"] == "KSampler" else {"batch_size": 1}
        node["inputs"] |= {key: value for key, value in small.items() if key in node["inputs"]}
    for node, inputs in changes.items():
        prompt[node]["inputs"] |= inputs
    outputs = server.run(prompt)
    folder = server.base_directory / "output"
    found = {node: outputs[node]["images"][0] for node in outputs if "images" in outputs[node]}
    return {node: load_image(folder / image["subfolder"] / image["filename"]) for node, image in found.items()}


def test_blended_encoders_and_a_step_window_sample(comfyui_server):
    both = run(comfyui_server, "blend_encoders")
    assert set(both) == {"122", "132", "142"} and not torch.equal(both["122"], both["142"])
    plain = {"3": {"weights": "1, 0"}, "4": {"weights": "1, 0"}}
    found = run(comfyui_server, "blend_encoders", **plain)
    assert torch.equal(found["122"], found["132"]) and torch.equal(found["122"], found["142"])
    window = {**plain, "12": {"positive": ["5", 0]}, "9": {"start_percent": 1.0}}
    assert torch.equal(run(comfyui_server, "blend_encoders", **window)["122"], found["142"])
    with pytest.raises(RuntimeError, match="weights has 3 numbers"):
        run(comfyui_server, "blend_encoders", **{"3": {"weights": "1, 0, 0"}})


def test_more_of_the_tuned_encoder_changes_more(comfyui_server):
    """The example's columns: original, three blends, tuned, step window."""
    strip = run(comfyui_server, "blend_tuned_encoders")["60"]
    columns = [strip[:, :, start : start + 128] for start in range(0, 6 * 132, 132)]
    changes = [(column - columns[0]).abs().mean().item() for column in columns]
    assert changes[:5] == sorted(changes[:5]) and changes[1] > 0.001 and changes[4] > 2 * changes[1]
    assert 0 < changes[5] != changes[4]


def test_with_stock_controlnet(comfyui_server, comfyui):
    write_control(comfyui_server.base_directory / "models" / "controlnet" / "retune_demo_control.safetensors")
    found = run(comfyui_server, "blend_controlnet")
    assert not torch.allclose(found["122"], found["132"], atol=0.05)
    found = run(comfyui_server, "blend_controlnet", **{"22": {"strength": 0.0}})
    assert torch.equal(found["122"], found["132"])


def write_control(path):
    """A Control-LoRA of the demo's shape: stock detection of whole ControlNets knows only real widths."""
    import comfy.cldm.cldm
    import comfy.ops
    from retune.nodes.common.demo_model import load_demo

    config = dict(load_demo(with_clip=False)[0].model.model_config.unet_config)
    config.pop("out_channels")
    options = {"hint_channels": 3, "operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
    network = comfy.cldm.cldm.ControlNet(**config | options)
    tensors = {"lora_controlnet": torch.zeros(0)}
    for place, (name, value) in enumerate(network.state_dict().items()):
        if name.startswith(("input_hint_block.", "zero_convs.", "middle_block_out.")):
            tensors[name] = torch.randn(value.shape, generator=generator(place, "control")) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def test_with_stock_inpainting(comfyui_server):
    found = run(comfyui_server, "blend_inpainting")
    before = found["302"]
    for node in ("122", "132"):
        change = (found[node] - before).abs()
        assert change[:, 112:].mean() < 0.03 and change[:, :48].mean() > 0.1  # the decoder's norms see all of it
