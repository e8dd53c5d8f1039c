"""A timestep resampler in ComfyUI: one conditioning for each range, each sampler step hears the core's."""

import pytest
import torch
from retune.nodes.bridge import text_encoder
from retune.nodes.clips import saved_clip, t5_clip
from retune.nodes.clips.timed_clip import spans
from retune.training.common.rng import generator
from retune.training.text_encoder.projection import BANDS, Projection

pytestmark = pytest.mark.comfyui
PROMPT = "two small red circles"


def projection(width=128):
    made = Projection(96, width, "timestep resampler", tokens=5, layers=2)
    modulation = made.resampler.time.modulation.weight
    with torch.no_grad():
        modulation.copy_(torch.randn(modulation.shape, generator=generator(0, "test")) * 0.05)
    return made


@pytest.fixture
def clip(comfyui):
    with torch.inference_mode():
        return t5_clip.load_t5_clip("demo", projection())


def scheduled(clip, text=PROMPT, **more):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text), **more)


def expected(clip, text, time):
    encoder = text_encoder.core_text_encoder(clip)
    with torch.no_grad():
        return encoder.project(encoder.backbone(encoder.tokenize([text])), torch.tensor([time])).context


def test_spans_are_the_bands_that_a_range_touches():
    assert spans(4) == [(0.875, 0, 0.25), (0.625, 0.25, 0.5), (0.375, 0.5, 0.75), (0.125, 0.75, 1.0)]
    assert spans(4, 0.3, 0.6) == [(0.625, 0.3, 0.5), (0.375, 0.5, 0.6)]
    assert spans(4, 0.5, 0.5) == [] and spans(0) == []


def test_each_range_has_the_projection_at_its_middle(clip):
    found = scheduled(clip)
    assert len(found) == BANDS
    for band, (context, more) in enumerate(found):
        assert (more["start_percent"], more["end_percent"]) == (band / BANDS, (band + 1) / BANDS)
        torch.testing.assert_close(context, expected(clip, PROMPT, 1 - (band + 0.5) / BANDS), atol=1e-5, rtol=1e-5)
    (part,) = scheduled(clip, add_dict={"start_percent": 0.0, "end_percent": 0.04, "width": 64})
    assert torch.equal(part[0], found[0][0]) and part[1]["end_percent"] == 0.04 and part[1]["width"] == 64


def test_t5_runs_once_and_nothing_is_remembered(clip, monkeypatch):
    runs = []
    transformer = getattr(clip.cond_stage_model, clip.cond_stage_model.retune_source.name).transformer
    transformer.register_forward_hook(lambda *_: runs.append(1))
    first = scheduled(clip)
    assert len(runs) == 1
    other = scheduled(clip, "one large blue square")
    assert len(runs) == 2 and not torch.equal(first[0][0], other[0][0])
    with torch.inference_mode():
        alone = clip.encode_from_tokens(clip.tokenize(PROMPT))
    torch.testing.assert_close(alone, expected(clip, PROMPT, 0.5), atol=1e-5, rtol=1e-5)


def test_clones_keep_the_schedule_and_a_fitted_one_needs_none(clip):
    clone = clip.clone()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(scheduled(clone), scheduled(clip), strict=True))
    linear = t5_clip.clone_with_projection(clip, Projection(96, 128))
    assert len(scheduled(linear)) == 1 and len(scheduled(clip)) == BANDS
    back = t5_clip.clone_with_projection(linear, projection())
    assert torch.equal(scheduled(back)[3][0], scheduled(clip)[3][0])


def test_every_sampler_step_hears_its_own_range(demo, clip):
    """What enters the UNet at a step is what the core projects for that step's timestep."""
    import comfy.sample

    model, calls = demo[0].clone(), []

    def listen(apply, given):
        calls.append((given["timestep"][0].item(), given["c"]["c_crossattn"].clone(), given["cond_or_uncond"]))
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(listen)
    with torch.inference_mode():
        positive, negative, latent = scheduled(clip), scheduled(clip, ""), torch.zeros(1, 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 1)
        options = {"denoise": 1.0, "disable_pbar": True, "seed": 1}
        comfy.sample.sample(model, noise, 6, 4.0, "euler", "normal", positive, negative, latent, **options)
    sampling = model.get_model_object("model_sampling")
    assert len(calls) >= 6 and len({round(sigma, 4) for sigma, _, _ in calls}) == 6
    for sigma, contexts, which in calls:
        time = sampling.timestep(torch.tensor([sigma])).float().item() / 999
        for row, unconditional in enumerate(which):
            text = "" if unconditional else PROMPT
            torch.testing.assert_close(contexts[row : row + 1], expected(clip, text, time), atol=1e-4, rtol=1e-4)


def test_saved_and_loaded_by_the_nodes(clip, tmp_path):
    from retune.training.text_encoder.file import read_text_encoder, save_text_encoder

    save_text_encoder(tmp_path / "t.safetensors", saved_clip.saved_text_encoder(clip))
    with torch.inference_mode():
        again = saved_clip.load_saved_text_encoder(read_text_encoder(tmp_path / "t.safetensors"), [])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(scheduled(again), scheduled(clip), strict=True))
