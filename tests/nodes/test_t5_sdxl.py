"""T5 for SDXL, resamplers and a kept CLIP in ComfyUI: the core's numbers, the stock nodes, training on the MODEL."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from retune.nodes.bridge import measure, text_encoder
from retune.nodes.clips import saved_clip, t5_clip
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.models.protocols import Conditioning
from retune.training.text_encoder.file import read_text_encoder, save_text_encoder
from retune.training.text_encoder.projection import Projection
from retune.training.text_encoder.t5 import Padding, load_t5

pytestmark = pytest.mark.comfyui

TEXTS = ["a red circle", "two small blue squares on a green ground, and a star", ""]
PADDINGS = {"tight": {}, "padded": {"pad": "max_tokens", "max_tokens": 40}}
KINDS = {
    "pooled": {"pooled_width": 1280},
    "resampler": {"kind": "resampler", "tokens": 6, "layers": 2},
    "both": {"kind": "resampler", "tokens": 6, "layers": 2, "pooled_width": 1280},
}


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, write_t5_folder):
    return write_t5_folder(tmp_path_factory.mktemp("t5_sdxl") / "small_t5")


def load(folder, width=2048, projection=None, options=None, **more):
    options = {"pooled_width": 1280} if options is None else options
    projection = projection or Projection(64, width, **options).scaled(1.3)
    with torch.inference_mode():
        return t5_clip.load_t5_clip(folder, projection, dtype="fp32", **more)


def encode(clip, text):
    with torch.inference_mode():
        context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return context.clone(), None if pooled is None else pooled.clone()


def close(left, right, **tolerance):
    torch.testing.assert_close(left, right, **(tolerance or {"atol": 1e-4, "rtol": 1e-4}))


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if a is not None or b is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_equals_the_core_encoder(comfyui, t5_folder, kind, padding):
    from retune.nodes.bridge.device import training_mode
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder

    padding, options = PADDINGS[padding], KINDS[kind]
    clip = load(t5_folder, 96, options=options, **padding)
    core = load_t5(t5_folder, Projection(64, 96, **options).scaled(1.3), padding=Padding(**padding))
    with torch.no_grad():
        expected = core.encode(core.tokenize(TEXTS))
        for text in TEXTS:
            alone = core.encode(core.tokenize([text]))
            for own, wanted in zip(encode(clip, text), (alone.context, alone.pooled), strict=True):
                assert (own is None) == (wanted is None)
                if own is not None:
                    close(own, wanted)
    with training_mode():
        encoder = ComfyTextEncoder(clip)
        trained = encoder.encode(TEXTS)
        trained.context.sum().backward()
    assert encoder.projection.linear.weight.grad.abs().sum() > 0
    assert (trained.mask is None) == (expected.mask is None)
    mask = torch.ones(expected.context.shape[:2], dtype=torch.bool) if expected.mask is None else expected.mask
    close(trained.context[mask].detach(), expected.context[mask])
    if expected.pooled is not None:
        close(trained.pooled.detach(), expected.pooled)


def test_stock_nodes_encode_for_sdxl(comfyui, t5_folder, caplog):
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    import nodes

    clip = load(t5_folder)
    context, pooled = encode(clip, TEXTS[0])
    sizes = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    with torch.inference_mode():
        plain = nodes.CLIPTextEncode().encode(clip, TEXTS[0])[0]
        sdxl = CLIPTextEncodeSDXL.execute(clip, text_g=TEXTS[0], text_l=TEXTS[0], **sizes).result[0]
        assert "text_l" not in caplog.text
        with caplog.at_level(logging.WARNING):
            other = CLIPTextEncodeSDXL.execute(clip, text_g=TEXTS[0], text_l=TEXTS[1], **sizes).result[0]
    assert "text_l differs from text_g" in caplog.text
    for ((found, options),) in (plain, sdxl, other):
        assert torch.equal(found, context) and torch.equal(options["pooled_output"], pooled)
    assert context.shape[2] == 2048 and pooled.shape == (1, 1280) and sdxl[0][1]["target_width"] == 64


def test_pads_of_stock_options_and_dropped_vectors_do_not_count(comfyui, t5_folder, tmp_path):
    from safetensors.torch import save_file

    save_file({"t5base": torch.zeros(3, 7)}, tmp_path / "narrow.safetensors")
    clip = load(t5_folder, embedding_directory=[str(tmp_path)])
    longer = clip.clone()
    longer.set_tokenizer_option("t5base_min_length", 20)
    assert encode(longer, TEXTS[0])[0].shape[1] == 20
    close(encode(longer, TEXTS[0])[1], encode(clip, TEXTS[0])[1])
    dropped = [[(torch.zeros(7), 1.0)] * 3 + clip.tokenize(TEXTS[0])["t5base"][0]]
    with torch.inference_mode():
        pooled = clip.encode_from_tokens({"t5base": dropped}, return_pooled=True)[1]
    close(pooled, encode(clip, TEXTS[0])[1])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_scaled_and_loaded_again_is_bit_equal(comfyui, t5_folder, tmp_path, kind):
    clip = load(t5_folder, 96, options=KINDS[kind])
    scaled, _ = measure.scale_clip(clip, 0.7, TEXTS)
    assert measure.clip_std(scaled, TEXTS) == pytest.approx(0.7, rel=1e-4)
    assert equal(encode(scaled, TEXTS[0])[1:], encode(clip, TEXTS[0])[1:])  # the pooled output is not scaled
    save_text_encoder(tmp_path / "te.safetensors", saved_clip.saved_text_encoder(scaled))
    loaded = saved_clip.load_saved_text_encoder(read_text_encoder(tmp_path / "te.safetensors"), [t5_folder.parent])
    for text in TEXTS:
        assert equal(encode(loaded, text), encode(scaled, text))
    known = {t5_clip.backbone_fingerprint(one) for one in (clip, scaled, loaded)}
    assert len(known) == 1


@pytest.fixture
def sdxl(comfyui, sdxl_unet, core_demo):
    """(MODEL, diffusers' denoiser) of the same weights; latents in the demo's scale."""
    import comfy.latent_formats
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models
    from retune.training.models import ldm
    from retune.training.models.diffusers import DiffusersDenoiser

    state = ldm.to_ldm(sdxl_unet.state_dict(), ldm.unet_names(sdxl_unet.config))
    state = {ldm.UNET_PREFIX + name: value for name, value in state.items()}
    about = comfy.supported_models.SDXL(comfy.model_detection.detect_unet_config(state, ldm.UNET_PREFIX))
    about.latent_format = comfy.latent_formats.SD15(core_demo.autoencoder.network.config.scaling_factor)
    about.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        network = about.get_model(state, ldm.UNET_PREFIX, device="cpu")
        network.load_model_weights(state, ldm.UNET_PREFIX)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, device, device), DiffusersDenoiser(sdxl_unet)


def test_an_sdxl_model_is_recognised(sdxl, demo):
    from retune.nodes.text_encoder import widths

    assert widths("auto", sdxl[0]) == (2048, 1280) == widths("sdxl", None)
    assert widths("auto", demo[0]) == (128, 0) and widths("1024", None) == (1024, 0)


def test_sdxl_trains_with_t5_the_same_in_both_implementations(
    sdxl, demo, core_demo, pictures, sampled, t5_folder, tmp_path
):
    from retune.nodes.bridge.text_encoder import with_projection
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.common.weights import with_unet_weights
    from retune.training.recipes.unet import train_model

    settings = TrainingSettings(warmup_steps=1)
    run = TrainModelConfig(
        run_name="r", steps=2, batch_size=2, learning_rate=1e-3, settings=settings, samples=SamplePrompts()
    )
    projection = Projection(64, 2048, pooled_width=1280)
    core = replace(core_demo, denoiser=sdxl[1], text_encoder=load_t5(t5_folder, projection))
    expected = train_model(core, pictures, run, tmp_path / "diffusers")
    clip = load(t5_folder, projection=projection)
    with torch.inference_mode():
        with text_to_image(sdxl[0], clip, demo[2]) as view:
            found = train_model(view, pictures, run, tmp_path / "comfyui")
        trained = with_unet_weights(sdxl[0], found.unet), with_projection(clip, found.projection)
    rows = [(tmp_path / side / "r" / "metrics.jsonl").read_text().splitlines() for side in ("diffusers", "comfyui")]
    losses = [[json.loads(row)["loss"] for row in side] for side in rows]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert found.projection.keys() == expected.projection.keys() == {"linear.weight", "pooled.weight", "scale"}
    for name in ("linear.weight", "pooled.weight"):
        assert (found.projection[name] - projection.state_dict()[name]).abs().max() > 1e-4
    assert torch.equal(t5_clip.t5_parts(trained[1]).projection.pooled.weight, found.projection["pooled.weight"])
    pictures_of = [sampled(*pair) for pair in ((sdxl[0], clip), trained)]
    assert all(picture.isfinite().all() for picture in pictures_of) and not torch.equal(*pictures_of)


@pytest.mark.parametrize("pooled_width, found", [(0, "none"), (64, "64")])
def test_a_pooled_output_that_does_not_fit_is_refused_first(
    sdxl, demo, pictures, t5_folder, tmp_path, pooled_width, found
):
    from retune.nodes.bridge.view import text_to_image
    from retune.training.recipes.checks import check_fit
    from retune.training.recipes.unet import train_model

    clip = load(t5_folder, options={"pooled_width": pooled_width})
    run = TrainModelConfig(run_name="r", steps=2, batch_size=2)
    with torch.inference_mode(), text_to_image(sdxl[0], clip, demo[2]) as view:
        with pytest.raises(ValueError, match=f"pooled output is {found}; the UNet reads one of 1280"):
            train_model(view, pictures, run, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    clip = load(t5_folder, 128, options={"pooled_width": pooled_width})
    with torch.inference_mode(), text_to_image(demo[0], clip, demo[2]) as view:
        check_fit(view, run)  # reads none


def test_the_view_knows_the_width_of_the_pooled_output(t5_folder, demo, small_sdxl_clip):
    from retune.nodes.bridge.device import training_mode
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder

    clips = {
        demo[1]: encode(demo[1], "")[1].shape[-1],
        small_sdxl_clip: 64,
        load(t5_folder): 1280,
        load(t5_folder, 96, options={}): 0,
        load(t5_folder, 96, options={}, keep_clip=small_sdxl_clip): 64,
        load(t5_folder, 96, keep_clip=small_sdxl_clip): 64,
    }
    with training_mode():
        for clip, width in clips.items():
            encoder = ComfyTextEncoder(clip)
            pooled = encoder.encode(encoder.tokenize(["a red circle"])).pooled
            assert encoder.pooled_width == width == (0 if pooled is None else pooled.shape[-1])


def test_a_kept_clip_comes_first(comfyui, t5_folder, demo, tmp_path):
    from retune.nodes.bridge.device import training_mode
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.training.data.cache import TextCache

    kept = demo[1]
    before = [encode(kept, text) for text in TEXTS]
    alone = load(t5_folder, 128, options={})
    both = load(t5_folder, 128, options={}, keep_clip=kept)
    for text, (context, pooled) in zip(TEXTS, before, strict=True):
        found = encode(both, text)
        assert torch.equal(found[0], torch.cat([context, encode(alone, text)[0]], dim=1))
        assert torch.equal(found[1], pooled)
    with training_mode():
        encoder = ComfyTextEncoder(both)
        texts = TextCache(tmp_path, lambda t: encoder.backbone(encoder.tokenize(t)), encoder.fingerprint)
        trained = encoder.project(Conditioning.cat(texts.get(text) for text in TEXTS))
    for row, text in enumerate(TEXTS):
        close(trained.context[row][trained.mask[row]].detach(), encode(both, text)[0][0])
        assert torch.equal(trained.pooled[row], encode(both, text)[1][0])
    assert all(equal(encode(kept, text), known) for text, known in zip(TEXTS, before, strict=True))


def test_both_encoders_are_comfyuis_to_load_and_unload(comfyui, t5_folder, demo):
    import comfy.model_management

    both = load(t5_folder, 128, options={"kind": "resampler"}, keep_clip=demo[1])
    before = encode(both, TEXTS[1])
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(one.is_clone(both.patcher) for one in loaded) and any(one.is_clone(demo[1].patcher) for one in loaded)
    weights = sum(p.nbytes for p in t5_clip.t5_parts(both).projection.state_dict().values())
    assert both.cond_stage_model.memory_estimation_function({}) == weights > 2**20
    comfy.model_management.unload_all_models()
    assert equal(encode(both, TEXTS[1]), before)
    separate = both.clone()
    separate.patcher = both.patcher.clone(force_deepcopy=True)
    separate.cond_stage_model = separate.patcher.model
    assert separate.cond_stage_model is not both.cond_stage_model and equal(encode(separate, TEXTS[1]), before)


def test_scale_and_fit_leave_a_kept_clip_alone(comfyui, t5_folder, demo):
    both = load(t5_folder, 128, options={}, keep_clip=demo[1])
    alone = load(t5_folder, 128, options={})
    scaled, report = measure.scale_clip(both, 0.7, TEXTS)
    assert report.before.std == pytest.approx(measure.clip_std(alone, TEXTS), rel=1e-5)
    length = encode(demo[1], TEXTS[0])[0].shape[1]
    assert torch.equal(encode(scaled, TEXTS[0])[0][:, :length], encode(demo[1], TEXTS[0])[0])
    prompts = [
        f"{number} {colour} circles" for number in ("one", "two", "three") for colour in ("red", "blue", "a", "")
    ]
    fitted, beside = (measure.fit_clip(one, demo[1], prompts)[0] for one in (alone, both))
    assert torch.equal(encode(beside, TEXTS[0])[0][:, length:], encode(fitted, TEXTS[0])[0])


def test_a_kept_sdxl_clip_with_two_texts(comfyui, t5_folder, small_sdxl_clip):
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    kept = small_sdxl_clip
    both, alone = load(t5_folder, 96, options={}, keep_clip=kept), load(t5_folder, 96, options={})
    sizes = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    with torch.inference_mode():
        texts = {"text_g": TEXTS[0], "text_l": TEXTS[1], **sizes}
        found, own = (CLIPTextEncodeSDXL.execute(clip, **texts).result[0][0] for clip in (both, kept))
    assert torch.equal(found[0], torch.cat([own[0], encode(alone, TEXTS[0])[0]], dim=1))
    assert torch.equal(found[1]["pooled_output"], own[1]["pooled_output"])


def test_fingerprint_and_file_know_of_the_kept_clip(comfyui, t5_folder, demo, tmp_path, caplog):
    from retune.nodes.saved_text_encoder import RetuneSaveTextEncoder

    both, alone = load(t5_folder, 128, options={}, keep_clip=demo[1]), load(t5_folder, 128, options={})
    patched = demo[1].clone()
    key = next(name for name, _ in demo[1].cond_stage_model.named_parameters() if name.endswith("mlp.fc1.weight"))
    patched.add_patches({key: ("diff", (torch.ones(demo[1].cond_stage_model.get_parameter(key).shape),))}, 0.1)
    other = load(t5_folder, 128, options={}, keep_clip=patched)
    again = load(t5_folder, 128, options={}, keep_clip=demo[1])
    marks = [t5_clip.backbone_fingerprint(clip) for clip in (both, alone, other, again)]
    assert len(set(marks)) == 3 and marks[0] == marks[3]
    with caplog.at_level(logging.WARNING):
        output = RetuneSaveTextEncoder.execute(both, "retune/kept")
    (path,), (_, warning) = output.result, output.ui["text"]
    assert "lacks the kept CLIP" in warning and warning in caplog.text
    saved = read_text_encoder(path)
    with pytest.raises(ValueError, match="was made beside a CLIP, which is not part of its file"):
        saved_clip.load_saved_text_encoder(saved, [t5_folder.parent])
    loaded = saved_clip.load_saved_text_encoder(saved, [t5_folder.parent], demo[1])
    assert equal(encode(loaded, TEXTS[0]), encode(both, TEXTS[0]))
    with pytest.raises(ValueError, match="the T5 stands beside a kept CLIP"):
        text_encoder.core_text_encoder(both)


def test_a_kept_clip_must_fit(comfyui, t5_folder, demo, small_sdxl_clip):
    from retune.nodes.clips.kept_clip import KeptClip

    with pytest.raises(ValueError, match="keep_clip gives a width of 128; expected the projection's 96"):
        load(t5_folder, 96, options={}, keep_clip=demo[1])
    with pytest.raises(ValueError, match="keep_clip is a T5"):
        load(t5_folder, 96, options={}, keep_clip=load(t5_folder, 96, options={}))
    kept = KeptClip.of(small_sdxl_clip, 96)
    assert kept.gives_pooled(0) and not KeptClip(None, 96, 0).gives_pooled(1280)
    with pytest.raises(ValueError, match="keep_clip gives a pooled output of .*; expected the model's 1280"):
        kept.gives_pooled(1280)


def test_the_loader_puts_it_together(comfyui, demo):
    from retune.nodes.text_encoder import RetuneLoadT5

    with torch.inference_mode():
        (plain,) = RetuneLoadT5.execute("demo", "sdxl", seed=3).result
        (kept,) = RetuneLoadT5.execute("demo", "auto", model=demo[0], projection="resampler", keep_clip=demo[1]).result
    assert [part.shape for part in encode(plain, "a red circle")[1:]] == [(1, 1280)]
    parts = t5_clip.t5_parts(kept)
    assert parts.keeps_clip and parts.projection.kind == "resampler" and parts.projection.pooled_width == 0
    assert encode(kept, "a red circle")[0].shape[1] == encode(demo[1], "a red circle")[0].shape[1] + 64
    schema = {entry.id: entry for entry in RetuneLoadT5.define_schema().inputs}
    assert schema["context_width"].options == ["auto", "768", "1024", "sdxl"]
    assert schema["projection"].options == ["orthogonal", "truncate", "mlp", "resampler", "timestep resampler"]
