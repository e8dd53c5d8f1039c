"""Blended conditionings and the step window with stock nodes and samplers."""

import logging

import pytest
import torch
from retune.nodes.blend import RetuneBlendConditioning, RetuneStepWindow

pytestmark = pytest.mark.comfyui
STEPS = 4


def encode(clip, text):
    """Stock CLIPTextEncode."""
    from nodes import CLIPTextEncode

    with torch.inference_mode():
        return CLIPTextEncode().encode(clip, text)[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def blended(a, b, amount):
    with torch.inference_mode():
        return RetuneBlendConditioning.execute(a, b, amount).args[0]


def test_conditionings_blend_entry_by_entry(demo, caplog):
    from nodes import ConditioningCombine, ConditioningSetArea

    _, clip, _ = demo
    a, b = encode(clip, "a red circle"), encode(clip, "a blue square")
    areas = [ConditioningSetArea().append(each, 32, 32, 0, 0, 0.5)[0] for each in (a, b)]
    two = [ConditioningCombine().combine(x, y)[0] for x, y in zip((a, b), areas, strict=True)]
    found = blended(*two, 0.3)
    assert len(found) == 2 and found[1][1]["area"] == areas[0][0][1]["area"] and found[1][1]["strength"] == 0.5
    for context, more in found:
        close(context, 0.7 * a[0][0] + 0.3 * b[0][0])
        close(more["pooled_output"], 0.7 * a[0][1]["pooled_output"] + 0.3 * b[0][1]["pooled_output"])
    for amount, same in ((0.0, a), (1.0, b)):
        assert torch.equal(blended(a, b, amount)[0][0], same[0][0])
    with caplog.at_level(logging.WARNING):
        close(blended(a, b, 1.5)[0][0], -0.5 * a[0][0] + 1.5 * b[0][0])
    assert "amount is 1.5" in caplog.text
    with pytest.raises(ValueError, match="a has 1 entries and b 2"):
        blended(a, two[1], 0.5)
    with pytest.raises(ValueError, match="differ in area, strength"):
        blended(a, areas[1], 0.5)


def test_a_longer_prompt_is_blended_with_a_shorter(demo):
    _, clip, _ = demo
    short, long = encode(clip, "a red circle"), encode(clip, "a red circle " * 30)
    assert long[0][0].shape[1] == 154
    found = blended(short, long, 0.5)[0][0]
    close(found, 0.5 * short[0][0].repeat(1, 2, 1) + 0.5 * long[0][0])


# --- step window ------------------------------------------------------------------------------------------------------


def window(original, tuned, start):
    return RetuneStepWindow.execute(original, tuned, start).args[0]


def sample(model, positive, negative, latent=None, start=0, last=None, noise=True):
    """Stock KSampler (Advanced), 4 steps of ddim."""
    from nodes import KSamplerAdvanced

    latent = {"samples": torch.zeros(1, 4, 8, 8)} if latent is None else latent
    with torch.inference_mode():
        (found,) = KSamplerAdvanced().sample(
            model,
            "enable" if noise else "disable",
            3,
            STEPS,
            4.0,
            "ddim",
            "ddim_uniform",
            positive,
            negative,
            latent,
            start,
            10000 if last is None else last,
            "disable" if last is None else "enable",  # the rest of the noise is left
        )
    return found


def test_each_step_hears_the_encoder_of_its_side(demo):
    """Against the same steps sampled in two parts, one with each encoder."""
    import comfy.samplers

    model, clip, _ = demo
    tuned, original, negative = (encode(clip, text) for text in ("a blue square", "two small red circles", ""))
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS)
    at_a_step = 1 - sampling.timestep(sigmas[2]).item() / 999
    for start in (0.1, 0.3, 0.4, 0.8, at_a_step):
        border = sampling.percent_to_sigma(start)
        with_original = sum(sigma > border * (1 + 1e-6) for sigma in sigmas[:-1].tolist())
        if with_original:
            first = sample(model, original, negative, last=with_original)
            expected = sample(model, tuned, negative, first, start=with_original, noise=False)["samples"]
        else:
            expected = sample(model, tuned, negative)["samples"]
        found = sample(model, window(original, tuned, start), negative)["samples"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert with_original == 2
    for start, same in ((0.0, tuned), (1.0, original)):
        pictures = [sample(model, each, negative)["samples"] for each in (window(original, tuned, start), same)]
        assert torch.equal(*pictures)


def test_ten_and_fifteen_of_25_steps(demo):
    import comfy.samplers

    sampling = demo[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 25)[:-1]
    ((_, first), (_, last)) = window([[None, {}]], [[None, {}]], 0.4)
    assert sum(float(sigma) >= sampling.percent_to_sigma(first["end_percent"]) for sigma in sigmas) == 10
    assert sum(float(sigma) <= sampling.percent_to_sigma(last["start_percent"]) for sigma in sigmas) == 15


@pytest.mark.parametrize("steps", [5, 25, 50])
def test_a_step_on_the_border_hears_one_encoder_on_flow_models_too(comfyui, steps):
    import comfy.model_sampling
    import comfy.samplers

    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=3.0, multiplier=1000)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1]
    for start in (0.2, 0.4, 0.6, 0.8):
        ((_, first), (_, last)) = window([[None, {}]], [[None, {}]], start)
        with_original = [sigma >= sampling.percent_to_sigma(first["end_percent"]) for sigma in sigmas]
        then = [sigma <= sampling.percent_to_sigma(last["start_percent"]) for sigma in sigmas]
        assert [bool(a) != bool(b) for a, b in zip(with_original, then, strict=True)] == [True] * steps
        assert sum(map(bool, with_original)) == round(start * steps)


def test_ranges_that_entries_have_are_kept_within():
    def part(start, end, name):
        return [name, {"start_percent": start, "end_percent": end, "strength": 0.5}]

    found = window(
        [part(0.0, 0.2, "a"), part(0.2, 0.7, "b"), part(0.7, 1.0, "c")], [part(0.3, 0.6, "d"), ["e", {}]], 0.5
    )
    ranges = [(name, round(o["start_percent"], 4), round(o["end_percent"], 4)) for name, o in found]
    assert ranges == [("a", 0.0, 0.2), ("b", 0.2, 0.5), ("d", 0.5, 0.6), ("e", 0.5, 1.0)]
    assert found[0][1]["strength"] == 0.5
    by_hooks = [["f", {"clip_start_percent": 0.6, "clip_end_percent": 1.0}]]
    assert [entry[0] for entry in window(by_hooks, by_hooks, 0.5)] == ["f"]
    with pytest.raises(ValueError, match="nothing is left"):
        window([part(0.6, 1.0, "a")], [part(0.0, 0.3, "b")], 0.5)
    with pytest.raises(ValueError, match="start_percent is 1.5"):
        window([part(0.0, 1.0, "a")], [part(0.0, 1.0, "b")], 1.5)
