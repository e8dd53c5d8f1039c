"""Another VAE's latent format reaches sampling, training and previews, and only those of the new MODEL."""

import logging

import pytest
import torch

SCALES = {"SD1.5": 0.18215, "SDXL": 0.13025}


def swap(model, vae, latent_format):
    from retune.nodes.vae import RetuneSwapVAE

    with torch.inference_mode():
        return RetuneSwapVAE.execute(model, vae, latent_format).result


def sample(model, clip, latent=None, previews=None, steps=2):
    """Euler through ComfyUI's sampler; the pictures that its preview callback sends go into `previews`."""
    import comfy.sample
    import comfy.utils
    import latent_preview

    def hook(value, total, preview, node_id=None):
        previews.append(preview[1].copy())

    with torch.inference_mode():
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("two small red circles"))
        latent = torch.zeros(1, 4, 8, 8) if latent is None else latent
        noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 1)
        comfy.utils.set_progress_bar_global_hook(hook if previews is not None else None)
        try:
            callback = latent_preview.prepare_callback(model, steps)
            options = {"denoise": 1.0, "disable_pbar": True, "seed": 1, "callback": callback}
            args = (model, noise, steps, 1.0, "euler", "simple", positive, positive, latent)
            return comfy.sample.sample(*args, **options).clone()
        finally:
            comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture
def previewing(comfyui):
    from comfy.cli_args import LatentPreviewMethod, args

    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    yield
    args.preview_method = before


@pytest.mark.parametrize("latent_format", SCALES)
def test_sampling_scales_latents_by_the_new_format(demo, latent_format):
    """From zeros the network's own result is the same, so what comes out differs by the two factors alone."""
    model, clip, vae = demo
    changed, given = swap(model, vae, latent_format)
    assert given is vae
    own = model.model.latent_format.scale_factor
    plain, scaled = sample(model, clip), sample(changed, clip)
    assert plain.std() > 0.1
    torch.testing.assert_close(scaled * SCALES[latent_format], plain * own, atol=1e-5, rtol=1e-5)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    entering = sample(changed, clip, start / SCALES[latent_format]) * SCALES[latent_format]
    torch.testing.assert_close(entering, sample(model, clip, start / own) * own, atol=1e-5, rtol=1e-5)


def test_the_base_model_stays_as_it_was(demo):
    model, clip, vae = demo
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    picture, format_before = sample(model, clip), model.model.latent_format
    changed, _ = swap(model, vae, "SDXL")
    assert not torch.equal(sample(changed, clip), picture)
    assert torch.equal(sample(model, clip), picture)
    assert model.model.latent_format is format_before and not model.object_patches and not model.wrappers
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert torch.equal(model.model.process_latent_in(torch.ones(1)), torch.ones(1) * format_before.scale_factor)


def test_the_last_swap_counts(demo):
    from retune.nodes.bridge.autoencoder import latent_format_of

    model, clip, vae = demo
    once, _ = swap(model, vae, "SD1.5")
    twice, _ = swap(swap(model, vae, "SDXL")[0], vae, "SD1.5")
    assert torch.equal(sample(once, clip), sample(twice, clip))
    assert type(latent_format_of(twice)).__name__ == "SD15" and len(sum(wrapper_lists(twice), [])) == 1
    assert latent_format_of(model) is model.model.latent_format


def wrapper_lists(model):
    return [functions for kind in model.wrappers.values() for functions in kind.values()]


def test_training_sees_latents_of_the_new_format(demo):
    from retune.nodes.bridge.view import text_to_image

    model, clip, vae = demo
    changed, _ = swap(model, vae, "SDXL")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents, prints = {}, {}
    for name, one in (("new", changed), ("own", model), ("trained", changed.clone())):
        with torch.inference_mode(), text_to_image(one, clip, vae) as view:
            latents[name], prints[name] = view.autoencoder.encode(pixels), view.autoencoder.fingerprint
            again = view.autoencoder.encode(view.autoencoder.decode(latents[name]))
            assert (again - latents[name]).std() < latents[name].std()
    own = model.model.latent_format.scale_factor
    torch.testing.assert_close(latents["new"] / SCALES["SDXL"], latents["own"] / own)
    assert torch.equal(latents["trained"], latents["new"])
    assert prints["new"] == prints["trained"] != prints["own"]


def test_previews_are_drawn_by_the_format_of_the_model_that_samples(demo, previewing):
    import comfy.latent_formats
    from latent_preview import Latent2RGBPreviewer

    def drawn(latent_format, x0):
        factors = (latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
        return Latent2RGBPreviewer(*factors).decode_latent_to_preview(x0)

    model, clip, vae = demo
    changed, _ = swap(model, vae, "SDXL")
    sdxl, own = comfy.latent_formats.SDXL(), model.model.latent_format
    before, new, after = [], [], []
    sample(model, clip, previews=before)
    x0 = sdxl.process_in(sample(changed, clip, previews=new))
    sample(model, clip, previews=after)
    assert len(before) == len(new) == len(after) == 2
    assert largest_difference(new[-1], drawn(sdxl, x0)) <= 1
    assert largest_difference(before[-1], drawn(own, x0)) <= 1
    assert largest_difference(new[-1], before[-1]) > 8
    assert [one.tobytes() for one in after] == [one.tobytes() for one in before]


def largest_difference(one, other) -> int:
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (one, other)]
    return (pixels[0] - pixels[1]).abs().max().item()


def test_a_callback_of_somebody_else_is_left_alone(demo):
    import comfy.sample

    model, clip, vae = demo
    changed, _ = swap(model, vae, "SDXL")
    seen = []
    with torch.inference_mode():
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("x"))
        latent = torch.zeros(1, 4, 8, 8)
        args = (changed, latent, 2, 1.0, "euler", "simple", positive, positive, latent)
        comfy.sample.sample(*args, denoise=1.0, callback=lambda *a: seen.append(a[0]), disable_pbar=True, seed=1)
    assert seen == [0, 1]


def test_a_change_of_scale_is_said_and_none_is_not(demo, caplog):
    from retune.nodes.vae import RetuneSwapVAE

    model, _, vae = demo
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "retune"):
        output = RetuneSwapVAE.execute(model, vae, "SDXL")
        before = model.model.latent_format.scale_factor
        assert f"changes from {before:.5f} to 0.13025" in caplog.text and "train it" in caplog.text
        assert output.ui["text"] == [caplog.records[-1].getMessage()]
        caplog.clear()
        again = RetuneSwapVAE.execute(output.result[0], vae, "SDXL")
    assert not caplog.text and again.ui["text"] == []


def test_vaes_and_models_of_another_kind_are_refused(demo):
    import comfy.latent_formats
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    model, _, vae = demo
    sixteen = comfy.sd.VAE(sd=taesd_state(TAESD(latent_channels=16)))
    with pytest.raises(ValueError, match="16 channels, 8 times smaller; expected 2-D, 4 channels"):
        swap(model, sixteen, "SDXL")
    four = comfy.sd.VAE(sd=taesd_state(TAESD(latent_channels=4)))
    assert swap(model, four, "SDXL")[1] is four
    for empty in ((None, vae), (model, None)):
        with pytest.raises(ValueError, match="is empty; expected one"):
            swap(*empty, "SDXL")
    flux = model.clone()
    flux.add_object_patch("latent_format", comfy.latent_formats.Flux())
    with pytest.raises(ValueError, match="MODEL's latents have 16 channels; expected 4"):
        swap(flux, vae, "SDXL")


def taesd_state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}
