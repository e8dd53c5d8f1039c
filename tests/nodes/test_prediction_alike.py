"""A single file is read on the command line as ComfyUI reads it: prediction, noise levels, SD2's text encoder."""

from pathlib import Path

import pytest
import torch
from retune.training.models import ldm
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.noise_levels import prediction_type_of, training_sigmas
from retune.training.models.prediction import file_scheduler, markers_of
from retune.training.models.protocols import Conditioning

EMPTY = torch.zeros(0)
MARKERS = {
    "nothing": {},
    "v_pred": {"v_pred": EMPTY},
    "v_pred and ztsnr": {"v_pred": EMPTY, "ztsnr": EMPTY},
    "ztsnr alone": {"ztsnr": EMPTY},
    "CosXL": {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)},
    "CosXL and v_pred": {"edm_vpred.sigma_max": torch.tensor(80.0), "v_pred": EMPTY},
}
FILE = Path("model.safetensors")


def sampling_of(markers):
    """The model_sampling that ComfyUI gives an SDXL file with these keys."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.SDXL({"in_channels": 4})
    return comfy.model_base.model_sampling(config, config.model_type(markers))


@pytest.mark.parametrize("case", MARKERS)
def test_markers(comfyui, case):
    from retune.nodes.bridge.denoiser import prediction_type_of as prediction_in_comfyui

    sampling, scheduler = sampling_of(MARKERS[case]), file_scheduler(FILE, MARKERS[case], {}, {}).scheduler
    assert prediction_type_of(scheduler) == prediction_in_comfyui(sampling)
    sigmas = training_sigmas(scheduler)
    torch.testing.assert_close(sigmas, sampling.sigmas, rtol=1e-3, atol=0)
    denoiser = DiffusersDenoiser.__new__(DiffusersDenoiser)
    denoiser.scheduler, denoiser.prediction_type = scheduler, prediction_type_of(scheduler)
    denoiser.sigmas, denoiser._log_sigmas = sigmas, sigmas.log()
    drawn = sigmas[[3, 500, 998]]
    torch.testing.assert_close(denoiser._times(drawn).float(), sampling.timestep(drawn).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", MARKERS)
def test_a_written_file_is_read_by_both_of_comfyuis_loaders(comfyui, case):
    import comfy.utils

    scheduler = file_scheduler(FILE, MARKERS[case], {}, {}).scheduler
    written = markers_of(prediction_type_of(scheduler), training_sigmas(scheduler))
    file = {f"{ldm.UNET_PREFIX}x": torch.ones(1)} | written
    file |= {ldm.UNET_PREFIX + name: value for name, value in written.items()}
    in_load_diffusion_model = comfy.utils.state_dict_prefix_replace(dict(file), {ldm.UNET_PREFIX: ""}, filter_keys=True)
    for state in (file, in_load_diffusion_model):
        found = sampling_of(state)
        assert type(found).__mro__[1:3] == type(sampling_of(MARKERS[case])).__mro__[1:3]
        torch.testing.assert_close(found.sigmas, sampling_of(MARKERS[case]).sigmas, rtol=1e-3, atol=1e-6)


def test_sd2_by_the_std_of_a_bias(comfyui):
    import comfy.model_base
    import comfy.supported_models

    for std in (0.01, 0.0899, 0.0901, 0.5):
        bias = torch.tensor([std, -std] * 8)
        key = "p.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        kind = comfy.supported_models.SD20({"in_channels": 4}).model_type({key: bias}, "p.")
        ours = prediction_type_of(file_scheduler(FILE, {}, {}, {}, bias).scheduler)
        assert ours == {"EPS": "eps", "V_PREDICTION": "v"}[kind.name]


def test_flow_levels(comfyui):
    from comfy.model_sampling import ModelSamplingDiscreteFlow

    for shift in (1.0, 3.0):
        sampling = ModelSamplingDiscreteFlow()
        sampling.set_parameters(shift=shift, multiplier=1000)
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
        torch.testing.assert_close(training_sigmas(scheduler), sampling.sigmas, rtol=1e-5, atol=1e-7)


def test_continuous_levels_predict_alike_and_refuse_others(demo, core_demo):
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode

    scheduler = file_scheduler(FILE, MARKERS["CosXL"], {}, {}).scheduler
    ours = DiffusersDenoiser(core_demo.denoiser.network, scheduler)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        (model,) = ModelSamplingContinuousEDM().patch(demo[0], "v_prediction", 120.0, 0.002)
        with training_mode(), torch.no_grad():
            theirs = ComfyDenoiser(model)
            sigma = theirs.sigmas[[100, 900]]
            found = theirs.predict(noisy, sigma, Conditioning(words)).clone()
            with pytest.raises(ValueError, match="flow matching or of EDM; expected those of a discrete schedule"):
                theirs.with_sigmas(theirs.sigmas)
    assert torch.equal(theirs.sigmas, ours.sigmas)
    with torch.no_grad():
        torch.testing.assert_close(ours.predict(noisy, sigma, Conditioning(words)), found, atol=1e-4, rtol=1e-4)


def test_sd2s_text_encoder_encodes_alike(clips, comfyui, tmp_path):
    """ComfyUI's SD2 CLIP, saved in the original layout as CheckpointSave does, then read from the file."""
    import comfy.supported_models
    from retune.training.models.clip import ClipTextEncoder
    from retune.training.models.open_clip import penultimate

    clip, prefix = clips["SD2"], ldm.SD2_CLIP_PREFIXES[0]
    with torch.inference_mode():
        state = {name: value.clone() for name, value in clip.cond_stage_model.state_dict().items()}
        saved = comfy.supported_models.SD20({"in_channels": 4}).process_clip_state_dict_for_saving(state)
        prompts = ["a photo of a red cat, (sitting)", ""]
        expected = [clip.encode_from_tokens(clip.tokenize(text, disable_weights=True)).clone() for text in prompts]
    stored = {name.removeprefix(prefix): value.clone() for name, value in saved.items() if name.startswith(prefix)}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"}
    tokenizer = comfyui / "comfy" / "sd1_tokenizer"
    encoder = ClipTextEncoder.from_state(penultimate(stored), heads, tokenizer, pad=0).named("clip_h")
    with torch.no_grad():
        for text, context in zip(prompts, expected, strict=True):
            found = encoder.encode(encoder.tokenize([text])).context
            torch.testing.assert_close(found, context.float(), atol=1e-4, rtol=1e-4)
