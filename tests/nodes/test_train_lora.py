"""Training a LoRA through ComfyUI: the core's numbers, results that stock nodes read, nothing left behind."""

import json

import pytest
import torch
from retune.training.config.lora import ALGORITHMS, LoraConfig
from retune.training.config.training_settings import TrainingSettings

TEXTS = ("a red circle on the left", "two small blue squares (flat)")


def lora_config(**changes):
    values = {
        "run_name": "r",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "alpha": 2.0,
        "targets": "all",
        "text_encoder_learning_rate": 1e-2,
        "settings": TrainingSettings(warmup_steps=1),
    }
    return LoraConfig(**(values | changes))


def state_of(model, clip):
    patchers = {"unet": model, "text": clip.patcher}
    return {(n, k): v.clone() for n, p in patchers.items() for k, v in p.model.state_dict().items()}


def losses(folder):
    rows = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


@pytest.mark.parametrize("text", ["clip", "t5"])
def test_both_implementations_give_the_same_losses_and_the_same_lora(demo, core_demo, pictures, tmp_path, text):
    from dataclasses import replace

    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.demo.files import weights_path
    from retune.training.recipes.lora import train_lora
    from retune.training.text_encoder.projection import Projection
    from retune.training.text_encoder.t5 import load_t5

    model, clip, vae = demo
    if text == "t5":
        projection = Projection(96, 128, seed=3)
        core_demo = replace(core_demo, text_encoder=load_t5(weights_path("t5.safetensors"), projection))
        with torch.inference_mode():
            clip = load_t5_clip("demo", projection)
    settings = TrainingSettings(warmup_steps=1, optimizer="SGD")
    config = lora_config(settings=settings, learning_rate=0.3, text_encoder_learning_rate=0.3)
    core = train_lora(core_demo, pictures, config, tmp_path / "core")
    before = state_of(model, clip)
    with torch.inference_mode(), text_to_image(model, clip, vae) as view:
        found = train_lora(view, pictures, config, tmp_path / "comfyui")
    assert losses(tmp_path / "comfyui") == pytest.approx(losses(tmp_path / "core"), rel=1e-4)
    assert found.tensors.keys() == core.tensors.keys()
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, core.tensors[name], rtol=1e-3, atol=1e-5, msg=name)
    assert all(v.any() for n, v in found.tensors.items() if n.endswith("up.weight") and "_k." not in n)
    after = state_of(model, clip)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for p in (model, clip.patcher) for m in p.model.modules())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_comes_out_predicts_what_the_attached_adapters_predict(demo, pictures, tmp_path, algorithm):
    """The node's MODEL and CLIP, which carry the LoRA as patches, against the network with the adapters on it."""
    import comfy.sd
    from retune.nodes.bridge.lora_patches import Row, apply_loras, lora_of
    from retune.nodes.bridge.view import text_to_image
    from retune.training.recipes.lora import networks_of, train_lora, trainable_layers
    from retune.training.trainables.lora import Adapters, select_layers

    model, clip, vae = demo
    config = lora_config(algorithm=algorithm, conv_rank=3, conv_alpha=3.0)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([2.0])

    def predicted(view):
        encoder = view.text_encoder
        return view.denoiser.predict(noisy, sigma, encoder.encode(encoder.tokenize([TEXTS[0]])))

    with torch.inference_mode():
        with text_to_image(model, clip, vae) as view:
            trained = train_lora(view, pictures, config, tmp_path)
            plain = predicted(view)
            chosen = select_layers(trainable_layers(view, config), config)
            adapters = Adapters(chosen, networks_of(view, chosen), config, seed=5)
            values = {n: v for n, v in trained.tensors.items() if not n.endswith(".alpha")}
            with view.text_encoder.training(), adapters.attach(values), torch.no_grad():
                expected = predicted(view)
        patched = apply_loras(model, clip, [Row(lora_of("trained", trained.tensors), 1.0, 1.0)])[:2]
        stock = comfy.sd.load_lora_for_models(model, clip, dict(trained.tensors), 1.0, 1.0)
        found = []
        for pair in (patched, stock):
            with text_to_image(*pair, vae) as view:
                found.append(predicted(view))
    size = (expected - plain).abs().max()
    assert size > 1e-3
    for prediction in found:
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_node_trains_and_hands_out_what_stock_nodes_take(comfyui, demo, sampled, pictures):
    import folder_paths
    from retune.nodes.train_lora import RetuneTrainLora

    model, clip, vae = demo
    node = RetuneTrainLora.PREPARE_CLASS_CLONE(None)
    values = {
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "alpha": 4.0,
        "algorithm": "LoRA",
        "targets": "attention",
        "text_encoder_learning_rate": 0.0,
        "run_name": "lora of a test",
        "seed": 0,
    }
    with torch.inference_mode():
        result = node.execute(model, clip, vae, pictures, **values).args
        new_model, new_clip, lora, run = result
        assert new_clip is clip and run.parent.parent.samefile(folder_paths.get_output_directory())
        assert not torch.equal(sampled(new_model, clip), sampled(model, clip))
        again = node.execute(model, clip, vae, pictures, **values).args[2]
        assert all(torch.equal(again[name], value) for name, value in lora.items())
        other = node.execute(model, clip, vae, pictures, **(values | {"preset": "SDXL", "run_name": "preset"})).args[2]
    assert next(v for n, v in other.items() if n.endswith("to_q.lora_down.weight")).shape[0] == 32
    assert {n.rsplit(".lora", 1)[0].rsplit(".alpha", 1)[0].split(".")[-1] for n in lora} == {
        "to_q",
        "to_k",
        "to_v",
        "0",
    }
