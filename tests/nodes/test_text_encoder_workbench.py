"""Fit Projection's methods and Scale Text Encoder's picture and report, called as ComfyUI calls them."""

from functools import partial

import pytest
import torch
from retune.nodes.bridge.measure import clip_std, is_fitted
from retune.nodes.clips.t5_clip import load_t5_clip, t5_parts
from retune.nodes.scale import RetuneScaleTextEncoder
from retune.nodes.text_encoder import RetuneFitProjection
from retune.training.plots.token_histogram import COLOURS, HEIGHT, WIDTH
from retune.training.text_encoder import distil
from retune.training.text_encoder.projection import Projection

PROMPTS = "\n".join(
    f"{count} {colour} circles on the {side}"
    for count in ("two", "three")
    for colour in ("red", "blue", "green", "yellow")
    for side in ("left", "right")
)
SHORT = "a red circle\na star"


def run(node, *args, **kwargs):
    """Results of a node as a tuple."""
    with torch.inference_mode():
        return node.execute(*args, **kwargs).result


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, write_t5_folder):
    return write_t5_folder(tmp_path_factory.mktemp("t5_workbench") / "small_t5")


@pytest.fixture
def t5(comfyui, t5_folder):
    with torch.inference_mode():
        return load_t5_clip(t5_folder, Projection(64, 32), dtype="fp32")


@pytest.fixture
def reference(comfyui, t5_folder):
    """A CLIP to come near to: another projection of the same T5, louder and with a part of its width."""
    with torch.inference_mode():
        return load_t5_clip(t5_folder, Projection(64, 32, seed=5).scaled(3.0), dtype="fp32")


def painted(image, colour):
    rgb = torch.tensor([int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)])
    return ((image[0] * 255).round() == rgb).all(-1).any().item()


def test_ridge_is_the_default(t5, reference):
    plain, named = (t5_parts(run(RetuneFitProjection, t5, reference, PROMPTS, *more)[0]) for more in ((), ("ridge",)))
    assert torch.equal(plain.projection.linear.weight, named.projection.linear.weight)
    other = t5_parts(run(RetuneFitProjection, t5, reference, PROMPTS, "mean-covariance")[0])
    assert not torch.equal(plain.projection.linear.weight, other.projection.linear.weight)


def test_mean_and_covariance_make_it_as_loud_as_the_reference(t5, demo):
    clip = demo[1]
    with torch.inference_mode():
        wide = t5_parts(t5).source.path
        own = load_t5_clip(wide, Projection(64, 128), dtype="fp32")
        fitted, report = run(RetuneFitProjection, own, clip, PROMPTS, method="mean-covariance")
        ridge, ridge_report = run(RetuneFitProjection, own, clip, PROMPTS)
        wanted = clip_std(clip, PROMPTS.splitlines())
        assert clip_std(fitted, PROMPTS.splitlines()) == pytest.approx(wanted, rel=0.01)
        assert clip_std(ridge, PROMPTS.splitlines()) < wanted
    for text, method in ((report, "mean-covariance"), (ridge_report, "ridge")):
        assert text.startswith(f"{method}: fitted on 16 prompts") and "held-out prompts" in text


def test_a_clip_is_distilled_into_a_t5_and_drawn_with(t5, demo, monkeypatch):
    """In few steps here; the context has the CLIP's number of tokens, and the T5 goes on as any other."""
    import comfy.utils

    clip = demo[1]
    monkeypatch.setattr(distil, "Distillation", partial(distil.Distillation, steps=100))
    bars = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, done, total: bars.append((done, total)))
    own = load_t5_clip(t5_parts(t5).source.path, Projection(64, 128), dtype="fp32")
    fitted, report = run(RetuneFitProjection, own, clip, PROMPTS, method="distillation")
    assert report.startswith("distillation: fitted on 16 prompts") and bars[-1] == (100, 100) and len(bars) == 100
    projection = t5_parts(fitted).projection
    assert projection.kind == "resampler" and is_fitted(fitted)
    line = PROMPTS.splitlines()[1]
    wanted, found = (one.encode_from_tokens(one.tokenize(line)) for one in (clip, fitted))
    assert found.shape == wanted.shape == (1, projection.tokens, 128)
    error = (found - wanted).square().mean() / (wanted - wanted.mean((0, 1))).square().mean()
    assert error < 0.7


def test_a_distillation_can_be_cancelled(t5, demo):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        own = load_t5_clip(t5_parts(t5).source.path, Projection(64, 128), dtype="fp32")
        run(RetuneFitProjection, own, demo[1], PROMPTS, method="distillation")
    assert not comfy.model_management.processing_interrupted()


def test_a_picture_of_what_there_is(t5, reference):
    clip, std, report, image = run(RetuneScaleTextEncoder, t5, "target std", 0.2, prompts=SHORT)
    assert image.shape == (1, HEIGHT, WIDTH, 3) and image.dtype == torch.float32
    assert painted(image, "before") and painted(image, "after") and not painted(image, "reference")
    assert std == pytest.approx(0.2, rel=1e-4)
    assert "\nbefore: std " in report and "\nafter: std 0.2000, per prompt " in report and "RMS per token" in report
    beside = run(RetuneScaleTextEncoder, t5, "target std", 0.2, reference, SHORT)
    assert painted(beside[3], "reference") and beside[1] == std
    assert f"\nreference: std {clip_std(reference, SHORT.splitlines()):.4f}" in beside[2]


def test_matching_uses_the_reference_that_is_shown(t5, reference):
    _, std, report, image = run(RetuneScaleTextEncoder, t5, "match reference", 0.2, reference, SHORT)
    assert std == pytest.approx(clip_std(reference, SHORT.splitlines()), rel=1e-4)
    assert all(painted(image, name) for name in ("before", "after", "reference"))
    assert report.count(f"std {std:.4f}") >= 2


def test_off_measures_and_changes_nothing(t5, reference):
    clip, std, report, image = run(RetuneScaleTextEncoder, t5, "off", 0.2, reference, SHORT)
    assert clip is t5 and std == clip_std(t5, SHORT.splitlines())
    assert "(unchanged)" in report and "\nreference: std " in report
    assert painted(image, "measured") and painted(image, "reference") and not painted(image, "after")


def test_a_fitted_projection_measured_on_the_built_in_list_is_told(t5, reference, caplog):
    fitted = run(RetuneFitProjection, t5, reference, PROMPTS)[0]
    told = "the projection was fitted, and other prompts than those of the fit"
    assert told in run(RetuneScaleTextEncoder, fitted, "target std", 0.2)[2] and told in caplog.text
    caplog.clear()
    assert told not in run(RetuneScaleTextEncoder, fitted, "target std", 0.2, prompts=PROMPTS)[2]
    assert told not in run(RetuneScaleTextEncoder, t5, "target std", 0.2)[2] and not caplog.text
