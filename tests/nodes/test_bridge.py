"""ComfyUI's MODEL, CLIP and VAE give the core the same numbers as diffusers, and come out of training untouched."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.models.protocols import Conditioning
from torch._subclasses.fake_tensor import FakeTensor


def train_config(**changes):
    values = {
        "run_name": "r",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 1e-4,
        "settings": TrainingSettings(warmup_steps=1),
    }
    return TrainModelConfig(**(values | changes))


def test_parts_agree_with_diffusers(demo, core_demo):
    from retune.nodes.bridge.view import text_to_image

    captions = ["two small red circles (left)", "a large green star, blue background"]
    sigma = core_demo.denoiser.sigmas[[100, 900]]
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=random)
    images = torch.rand(2, 3, 64, 64, generator=random)
    states = Conditioning.cat([Conditioning(torch.randn(1, n, 128, generator=random)) for n in (5, 9)])
    with torch.inference_mode(), text_to_image(*demo) as model, torch.no_grad():
        assert torch.equal(model.denoiser.sigmas, core_demo.denoiser.sigmas)
        assert model.denoiser.fingerprint == core_demo.denoiser.fingerprint
        text = [m.text_encoder.encode(m.text_encoder.tokenize(captions)).context for m in (model, core_demo)]
        torch.testing.assert_close(*text, atol=1e-5, rtol=1e-5)
        latents = [m.autoencoder.encode(images) for m in (model, core_demo)]
        torch.testing.assert_close(*latents, atol=1e-5, rtol=1e-5)
        pixels = [m.autoencoder.decode(latents[0]) for m in (model, core_demo)]
        torch.testing.assert_close(*pixels, atol=1e-4, rtol=1e-4)
        outputs = [m.denoiser.predict(noisy, sigma, states) for m in (model, core_demo)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        alone = model.denoiser.predict(noisy[:1], sigma[:1], Conditioning(states.context[:1, :5]))
        torch.testing.assert_close(alone, outputs[0][:1], atol=1e-5, rtol=1e-5)
        clean = [m.denoiser.denoised(noisy, sigma, outputs[1]) for m in (model, core_demo)]
        torch.testing.assert_close(*clean, atol=1e-4, rtol=1e-5)
        goals = [m.denoiser.target(latents[1], noisy, sigma) for m in (model, core_demo)]
        torch.testing.assert_close(*goals, atol=0, rtol=0)


def test_checkpointing_gives_the_same_gradient(demo, core_demo):
    from retune.nodes.bridge.view import text_to_image

    noisy, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0])
    states = Conditioning.cat([Conditioning(torch.ones(1, n, 128)) for n in (3, 4)])
    states = Conditioning(states.context[:1], None, states.mask[:1])
    gradients = []
    with torch.inference_mode(), text_to_image(*demo) as model:
        for enabled in (False, True):
            factor = torch.ones(1, requires_grad=True)
            with model.denoiser.checkpointing(enabled):
                output = model.denoiser.predict(noisy * factor, sigma, states)
                output.square().sum().backward()
            gradients.append(factor.grad.item())
    assert gradients[0] != 0 and gradients[1] == pytest.approx(gradients[0], rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_swapped_blocks_of_comfyuis_unet_give_the_same_gradient(demo, recompute):
    from retune.nodes.bridge.view import text_to_image
    from retune.training.models.block_swap import check_block_swap, swapped_blocks
    from retune.training.models.blocks import blocks_in_order

    noisy, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0])
    states, gradients = Conditioning(torch.ones(1, 4, 128)), []
    with torch.inference_mode(), text_to_image(*demo) as model:
        denoiser = model.denoiser
        before = {name: p.detach().clone() for name, p in denoiser.network.named_parameters()}
        count = len(blocks_in_order(denoiser))
        for swapped in (0, 3, count):
            context = states.context.clone().requires_grad_()
            with swapped_blocks(denoiser, swapped, (), recompute), denoiser.checkpointing(recompute):
                denoiser.predict(noisy, sigma, Conditioning(context)).square().sum().backward()
            gradients.append(context.grad)
        assert count > 3 and torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
        assert all(torch.equal(p, before[name]) for name, p in denoiser.network.named_parameters())
        with pytest.raises(ValueError, match=f"expected at most {count}, the blocks of this UNet"):
            check_block_swap(denoiser, count + 1)


def test_fifty_steps_give_the_same_losses_in_both_implementations(demo, core_demo, pictures, tmp_path):
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.clips import t5_clip
    from retune.training.demo.files import weights_path
    from retune.training.recipes.unet import train_model
    from retune.training.text_encoder.projection import Projection
    from retune.training.text_encoder.t5 import load_t5

    projection = Projection(96, 128, seed=3)
    run = train_config(steps=50, train="all attention", samples=SamplePrompts())
    encoder = load_t5(weights_path("t5.safetensors"), projection)
    train_model(replace(core_demo, text_encoder=encoder), pictures, run, tmp_path / "diffusers")
    with torch.inference_mode():
        clip = t5_clip.load_t5_clip("demo", projection)
        with text_to_image(demo[0], clip, demo[2]) as model:
            train_model(model, pictures, run, tmp_path / "comfyui")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / side / "r" / "metrics.jsonl").read_text().splitlines()]
        for side in ("diffusers", "comfyui")
    ]
    assert len(losses[0]) == 50
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_clip_is_told_by_the_weights_that_a_unet_reads(small_sdxl_clip):
    from retune.nodes.clips.fingerprint import clip_fingerprint

    weights = small_sdxl_clip.cond_stage_model
    before = clip_fingerprint(small_sdxl_clip)
    with torch.no_grad():
        weights.get_parameter("clip_l.transformer.text_projection.weight").fill_(float("nan"))
        assert clip_fingerprint(small_sdxl_clip) == before
        for name in (
            "clip_g.transformer.text_projection.weight",
            "clip_l.transformer.text_model.final_layer_norm.bias",
        ):
            weights.get_parameter(name).add_(1)
            assert clip_fingerprint(small_sdxl_clip) != before
            before = clip_fingerprint(small_sdxl_clip)


def test_the_demo_clip_holds_no_stray_memory(demo):
    clip = demo[1]
    projection = clip.cond_stage_model.get_parameter("clip_l.transformer.text_projection.weight")
    assert torch.equal(projection, torch.eye(len(projection)))


def test_only_the_demo_model_brings_a_judge(demo, comfyui, tmp_path):
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.common.weights import with_unet_weights
    from retune.training.demo.judge import judge_samples

    model, clip, vae = demo
    for given in (model, with_unet_weights(model, {})):
        with torch.inference_mode(), text_to_image(given, clip, vae) as view:
            assert view.judge is judge_samples


def test_training_leaves_model_and_clip_bit_identical(demo, sampled, pictures, tmp_path):
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.common.weights import with_unet_weights
    from retune.training.recipes.unet import train_model

    model, clip, vae = demo
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    text = {k: v.clone() for k, v in clip.cond_stage_model.state_dict().items()}
    image = sampled(model, clip)
    with torch.inference_mode(), text_to_image(model, clip, vae) as view:
        trained = train_model(view, pictures, train_config(learning_rate=1e-2), tmp_path)
    after = model.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(text[k], v) for k, v in clip.cond_stage_model.state_dict().items())
    assert torch.equal(sampled(model, clip), image)
    changed = with_unet_weights(model, trained.unet)
    assert not torch.equal(sampled(changed, clip), image)
    assert torch.equal(sampled(model, clip), image)


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta" and thing.layout is torch.strided:
            if isinstance(thing, FakeTensor):  # has no memory
                continue
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_memory_is_given_back(demo, sampled, pictures, tmp_path):
    import comfy.model_management
    from retune.nodes.bridge.view import text_to_image
    from retune.training.recipes.unet import train_model

    model, clip, vae = demo
    sampled(model, clip)
    before, held = live_bytes(), []
    with torch.inference_mode(), text_to_image(model, clip, vae) as view:
        patcher = weakref.ref(view.denoiser.patcher)
        trained = train_model(view, pictures, train_config(train="whole UNet"), tmp_path)
        held.append(live_bytes())
    assert sum(v.numel() * 4 for v in trained.unet.values()) > 2**22  # enough to notice
    del view, trained
    assert live_bytes() - before < 2**20 < held[0] - before
    assert patcher() is None
    comfy.model_management.cleanup_models()
    assert not any(loaded.model is None for loaded in comfy.model_management.current_loaded_models)


@pytest.mark.parametrize("empty", ["model", "clip", "vae"])
def test_an_empty_input_is_named(demo, empty):
    from retune.nodes.bridge.view import text_to_image

    parts = dict(zip(("model", "clip", "vae"), demo, strict=True)) | {empty: None}
    with pytest.raises(ValueError, match=f"{empty} is empty; expected one"), text_to_image(**parts):
        pass


def test_trained_weights_arrive_exactly_and_a_lora_stays(demo, pictures, tmp_path):
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.common.weights import patched_weight, with_unet_weights
    from retune.training.recipes.unet import train_model

    model, clip, vae = demo
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    base = model.model.state_dict()[key].clone()
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    with_lora = model.clone()
    with_lora.add_patches({key: ("diff", (change,))}, 0.5)
    with torch.inference_mode():
        with text_to_image(with_lora, clip, vae) as view:
            start = view.denoiser.network.get_parameter(key.removeprefix("diffusion_model.")).clone()
            trained = train_model(view, pictures, train_config(), tmp_path)
        result = with_unet_weights(with_lora, trained.unet)
    torch.testing.assert_close(start, base + 0.5 * change)
    assert len(result.patches[key]) == 2
    for name, value in trained.unet.items():
        arrived = patched_weight(result, "diffusion_model." + name)
        torch.testing.assert_close(arrived, value, atol=1e-6, rtol=1e-6)
        if "diffusion_model." + name != key:
            assert torch.equal(arrived, value)


def test_unknown_models_are_refused(comfyui):
    from retune.nodes.bridge.denoiser import context_width_of

    with pytest.raises(ValueError, match="model is not connected"):
        context_width_of(None)
