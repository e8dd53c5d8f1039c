"""ComfyUI's Train LoRA as the benchmarks run it: it knows their models, can read them again, and takes their steps."""

import pytest
import torch
from retune.benchmarks import comfyui_peer
from retune.benchmarks.anonymous_memory import PeakMemory
from retune.benchmarks.comparisons import LORA
from retune.benchmarks.processes import Case
from retune.benchmarks.random_models import random_parts, write_part
from retune.benchmarks.recorder import Recorder


def case(size, model=""):
    values = {"bench": LORA, "variant": "ComfyUI", "size": size, "model": str(model), "work": "", "pixels": 64}
    return Case(**values, batch_size=1, rank=4, rounds=2, device="cpu")


@pytest.mark.parametrize(("size", "family"), [("sd15", "SD15"), ("sdxl", "SDXL")])
def test_comfyui_knows_the_layout_of_the_random_models(comfyui, size, family):
    from comfy import model_detection

    with torch.device("meta"):
        weights = random_parts(size)["unet"]().state_dict()
    assert model_detection.model_config_from_unet(weights, "") is None  # then it tries diffusers' layout
    assert type(model_detection.model_config_from_diffusers_unet(weights)).__name__ == family


@pytest.mark.parametrize("bypass", [False, True])
def test_its_trainer_takes_the_steps_that_are_timed(comfyui, monkeypatch, bypass):
    from comfy_extras import nodes_train

    monkeypatch.setattr(nodes_train, "ProgressBar", nodes_train.ProgressBar)  # put back afterwards
    recorder = Recorder(case("demo"), PeakMemory())
    comfyui_peer.run_lora(case("demo"), recorder, "fp32", bypass)
    figures = recorder.figures()
    assert len(figures["seconds"]) == 2 and figures["trained"] > 0


@pytest.mark.slow
def test_a_model_of_true_size_can_be_cloned_as_the_trainer_does(comfyui, tmp_path, monkeypatch):
    """Its trainer begins with a deep clone, which reads the file again."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp16_unet", True)  # half the memory; a CPU would hold it in fp32
    write_part(random_parts("sd15")["unet"], tmp_path / "unet")
    with torch.inference_mode():
        model = comfyui_peer.open_model(case("sd15", tmp_path))
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    with torch.inference_mode(False):
        clone = model.clone(force_deepcopy=True)
        one, other = (patcher.model.get_parameter(name) for patcher in (model, clone))
        assert one is not other and torch.equal(one, other) and one.std() > 0
