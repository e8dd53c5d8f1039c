"""What Export Diffusers writes, loaded by plain diffusers, predicts what the MODEL predicts."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

PROMPT = "two small red circles (left)"


def export(*args):
    from retune.nodes.export import RetuneExportDiffusers

    with torch.inference_mode():
        output = RetuneExportDiffusers.execute(*args)
    return Path(output.result[0]), output.ui["text"]


@pytest.fixture
def patched(demo):
    """The demo with changes on UNet and CLIP as a LoRA makes them, and SDXL's latent scale."""
    from retune.nodes.vae import RetuneSwapVAE

    model, clip, vae = demo
    with torch.inference_mode():
        model = RetuneSwapVAE.execute(model, vae, "SDXL").result[0]
    clip = clip.clone()
    unet = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    text = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    for patcher, name in ((model, unet), (clip.patcher, text)):
        weight = patcher.model.state_dict()[name]
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std()
        patcher.add_patches({name: ("diff", (change,))}, 0.5)
    return model, clip, vae


def in_comfyui(model, clip):
    """Context of PROMPT, and predictions for fixed latents at three noise levels, from the MODEL itself."""
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode
    from retune.training.models.protocols import Conditioning

    with torch.inference_mode():
        context = clip.encode_from_tokens(clip.tokenize(PROMPT, disable_weights=True)).clone()
        with training_mode(), torch.no_grad():
            context = context.clone()
            denoiser, found = ComfyDenoiser(model), []
            for time in (20, 500, 980):
                sigma = denoiser.sigmas[[time]]
                noisy = latents() * (1 + sigma**2).sqrt()
                found.append((time, denoiser.predict(noisy, sigma, Conditioning(context)).clone()))
    return context, found


def latents():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def assert_predicts(unet, context, expected):
    for time, output in expected:
        with torch.no_grad():
            got = unet(latents(), torch.tensor([time]), encoder_hidden_states=context).sample
        torch.testing.assert_close(got, output, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["v", "eps"])
def test_a_pipeline_loads_and_predicts_the_same(patched, kind):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from diffusers import StableDiffusionPipeline

    model, clip, vae = patched
    if kind == "eps":
        (model,) = ModelSamplingDiscrete().patch(model, "eps", False)
    folder, text = export(model, clip, vae, f"pipeline {kind}")
    assert folder.parent.name == "diffusers" and text == [str(folder)]
    assert not list(folder.parent.glob(".*")) and not list(folder.rglob("*.bin"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert pipe.scheduler.config.prediction_type == {"v": "v_prediction", "eps": "epsilon"}[kind]
    context, expected = in_comfyui(model, clip)
    with torch.no_grad():
        given = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    torch.testing.assert_close(given, context, atol=1e-4, rtol=0)
    assert_predicts(pipe.unet, given, expected)
    assert pipe.vae.config.scaling_factor == 0.13025
    with torch.no_grad():
        pixels = (pipe.vae.decode(latents() / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    with torch.inference_mode():
        decoded = vae.decode(model.get_model_object("process_latent_out")(latents())).movedim(-1, 1).clone()
    torch.testing.assert_close(pixels, decoded, atol=1e-4, rtol=0)
    image = pipe(PROMPT, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3) and image.std() > 0.01


def test_a_clip_that_stops_early_is_exported_without_its_last_layers(demo):
    from transformers import CLIPTextModel

    model, clip, vae = demo
    clip = clip.clone()
    clip.clip_layer(-2)
    folder, _ = export(model, clip, vae, "stops early")
    context, _ = in_comfyui(model, clip)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    assert text.config.num_hidden_layers == 1
    with torch.inference_mode():
        ids = [[token for token, _ in section] for section in clip.tokenize(PROMPT, disable_weights=True)["l"]]
    with torch.no_grad():
        torch.testing.assert_close(text(torch.tensor(ids)).last_hidden_state, context, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind, pad, max_tokens, length",
    [("orthogonal", "none", 256, 20), ("truncate", "none", 12, 12), ("mlp", "max_tokens", 30, 30)],
)
def test_the_code_in_the_readme_runs_a_t5(demo, monkeypatch, kind, pad, max_tokens, length):
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.text_encoder.projection import Projection

    model, _, vae = demo
    projection = Projection(96, 128, kind, seed=1).scaled(0.7)
    if kind == "mlp":
        torch.nn.init.normal_(projection.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        clip = load_t5_clip("demo", projection, pad=pad, max_tokens=max_tokens)
    folder, _ = export(model, clip, vae, f"t5 {kind}")
    assert not (folder / "model_index.json").exists()
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "retune" not in code and len(code.splitlines()) < 32
    (folder / "run.py").write_text(code, encoding="utf-8")
    ran = runpy.run_path("run.py")
    context, expected = in_comfyui(model, clip)
    assert context.shape[1] == length
    torch.testing.assert_close(ran["encode"](PROMPT), context, atol=1e-4, rtol=0)
    assert_predicts(ran["pipe"].unet, ran["encode"](PROMPT), expected)
    assert ran["image"].size == (128, 128) and (folder / "image.png").is_file()


def test_a_t5_lora_is_exported(demo):
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.nodes.export import text_part
    from retune.training.text_encoder.projection import Projection

    with torch.inference_mode():
        clip = load_t5_clip("demo", Projection(96, 128)).clone()
        name = next(n for n in clip.patcher.model.state_dict() if n.endswith("layer.0.SelfAttention.q.weight"))
        before = clip.patcher.model.state_dict()[name].clone()
        clip.patcher.add_patches({name: ("diff", (torch.ones_like(before),))}, 0.5)
        state = text_part(clip).encoder.model.state_dict()
    torch.testing.assert_close(state[name.removeprefix("t5base.transformer.")], before + 0.5)


def test_names_stay_inside_and_nothing_is_overwritten(demo):
    first, _ = export(*demo, "twice")
    marker = first / "mine.txt"
    marker.write_text("kept", encoding="utf-8")
    second, _ = export(*demo, "twice")
    assert second == first.with_name("twice 2") and marker.read_text(encoding="utf-8") == "kept"
    index = json.loads((second / "model_index.json").read_text(encoding="utf-8"))
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    for name in ("../out", "a/b", "", "..", "C:\\x", "nul"):
        with pytest.raises(ValueError, match="folder_name is .*; expected a plain folder name"):
            export(*demo, name)


def test_a_failed_export_leaves_nothing(demo, monkeypatch):
    from retune.training.commands import export_diffusers as core

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(core, "_write_transformer", full)
    with pytest.raises(OSError, match="disk full"):
        export(*demo, "failed")
    import folder_paths

    assert not list((Path(folder_paths.get_output_directory()) / "diffusers").glob("*failed*"))


def test_what_the_folder_could_not_hold_is_said_or_refused(demo, caplog):
    import comfy.sd
    from comfy.taesd.taesd import TAESD
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.text_encoder.projection import Projection

    model, clip, vae = demo
    taesd = comfy.sd.VAE(sd={n: v.clone() for n, v in TAESD(latent_channels=4).state_dict().items()})
    with pytest.raises(ValueError, match="expected an AutoencoderKL"):
        export(model, clip, taesd, "refused")
    (zero,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    with pytest.raises(ValueError, match="MODEL's noise levels end at"):
        export(zero, clip, vae, "refused")
    with torch.inference_mode():
        wide = load_t5_clip("demo", Projection(96, 768))
    with pytest.raises(ValueError, match="text encoder's width is 768; the UNet reads 128"):
        export(model, wide, vae, "refused")
    with torch.inference_mode():
        early = load_t5_clip("demo", Projection(96, 128)).clone()
    early.clip_layer(-2)
    with pytest.raises(ValueError, match="stops at an earlier layer"):
        export(model, early, vae, "refused")
    for index, name in enumerate(("model", "clip", "vae")):
        parts = [None if i == index else part for i, part in enumerate(demo)]
        with pytest.raises(ValueError, match=f"{name} is empty"):
            export(*parts, "refused")
    changed = model.clone()
    changed.set_model_sampler_cfg_function(lambda args: args["cond"])
    _, text = export(changed, clip, vae, "changed")
    assert "sampler_cfg_function" in text[1] and text[1] in caplog.text
