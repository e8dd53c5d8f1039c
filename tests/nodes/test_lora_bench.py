"""The LoRA benchmark in a real ComfyUI, and its judge against ComfyUI's own loader."""

import pytest
import torch
from retune.benchmarks.lora import lora_applied, run_lora_bench
from retune.benchmarks.lora_runs import COMFYUI, RETUNE, LoraBenchConfig
from retune.training.commands.open_model import unet_parameters
from retune.training.formats.lora import parse_lora


def test_a_lora_is_judged_with_the_weights_that_comfyui_loads(demo, core_demo):
    import comfy.sd

    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("input_blocks.0.0", "input_blocks.3.1.proj_in", "out.0"):
        shape = unet_parameters(core_demo.denoiser)[f"{name}.weight"].shape
        roles = {"diff_b": shape[:1]}
        roles |= {"lora_up.weight": (shape[0], 4), "lora_down.weight": (4, shape[1:].numel())} if len(shape) > 1 else {}
        drawn = {role: 0.1 * torch.randn(size, generator=random) for role, size in roles.items()}
        drawn |= {"alpha": torch.tensor(0.9)} if len(shape) > 1 else {"diff": torch.randn(shape, generator=random)}
        tensors |= {f"diffusion_model.{name}.{role}": value for role, value in drawn.items()}
    patched, _ = comfy.sd.load_lora_for_models(demo[0], None, tensors, 1.0, 0.0)
    with torch.inference_mode():
        patched.patch_model(torch.device("cpu"))
        theirs = {name: value.clone() for name, value in patched.model.diffusion_model.state_dict().items()}
        patched.unpatch_model(torch.device("cpu"))
    with lora_applied(core_demo.denoiser, parse_lora("x", tensors)):
        for name, value in unet_parameters(core_demo.denoiser).items():
            torch.testing.assert_close(value.detach(), theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_tiny_comparison_ends_with_figures_of_both(comfyui):
    config = LoraBenchConfig(steps=8, accumulation=2, learning_rates=(5e-3,), images=4, judged=2)
    found = run_lora_bench(config, comfyui)
    assert [(row["steps"], row["trainer"]) for row in found["rows"]] == [
        (steps, name) for steps in (2, 4, 8) for name in (RETUNE, COMFYUI)
    ]
    assert all(0 < row["validation loss"] < found["untrained"] for row in found["rows"])
    assert all(row["training loss"] > 0 and row["seconds per step"] > 0 for row in found["rows"])
    here, there = (found["trainers"][name]["trained_numbers"] for name in (RETUNE, COMFYUI))
    assert 0 < here < there and found["at_equal_seconds"] and found["differences"]
