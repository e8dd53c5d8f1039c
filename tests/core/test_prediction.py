"""What a file predicts and at which noise levels: read from all that says it, corrected by flags, and written again."""

import json
import logging

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands.open_model import ModelConfig, build_model, open_denoiser, save_unet, unet_parameters
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.config.run import TrainModelConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.demo.files import weights_path
from retune.training.models import ldm
from retune.training.models.diffusers import DiffusersDenoiser, load_denoiser, load_model
from retune.training.models.noise_levels import training_sigmas
from retune.training.models.prediction import Correction, file_scheduler
from retune.training.models.protocols import Conditioning
from retune.training.recipes.apply_results import with_tuned
from retune.training.recipes.unet import read_trained_model, train_model

SD1_LAST, ZERO_LAST = 14.6146, 4518.76
SGM = """model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.%s
"""
V_OF_SD2 = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    parameterization: "v"  # velocity
"""


def number(value):
    return torch.tensor(float(value))


def rewritten(file, markers=None, metadata=None, scheduler=None, yaml=None):
    """The checkpoint with more in it; `retune.config` keeps the shapes alone, unless a scheduler is given."""
    tensors, about = read_tensors(file)
    config = json.loads(about["retune.config"]) | ({"scheduler": scheduler} if scheduler else {})
    markers = dict.fromkeys(markers, torch.zeros(0)) if isinstance(markers, (list, tuple)) else markers or {}
    write_tensors(file, tensors | markers, {"retune.config": json.dumps(config)} | (metadata or {}))
    if yaml:
        file.with_suffix(".yaml").write_text(yaml, encoding="utf-8")
    return file


EDM = {"edm_vpred.sigma_max": number(120), "edm_vpred.sigma_min": number(0.002)}
SAYS = {
    "nothing": ({}, "eps", SD1_LAST),
    "v_pred": ({"markers": ["v_pred"]}, "v", SD1_LAST),
    "NoobAI": ({"markers": ["v_pred", "ztsnr"]}, "v", ZERO_LAST),
    "ztsnr alone, as ComfyUI reads it": ({"markers": ["ztsnr"]}, "eps", SD1_LAST),
    "Load Diffusion Model's place": ({"markers": [f"{ldm.UNET_PREFIX}v_pred"]}, "v", SD1_LAST),
    "CosXL": ({"markers": EDM}, "v", 120),
    "CosXL without its lower end": ({"markers": {"edm_vpred.sigma_max": torch.tensor([80.0])}}, "v", 80),
    "ModelSpec v": ({"metadata": {"modelspec.prediction_type": "v"}}, "v", SD1_LAST),
    "ModelSpec epsilon": ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "eps", SD1_LAST),
    "ComfyUI's key": ({"metadata": {"modelspec.predict_key": "v"}}, "v", SD1_LAST),
    "sd-scripts": ({"metadata": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}}, "v", ZERO_LAST),
    "flow": ({"metadata": {"modelspec.prediction_type": "flow"}}, "flow", 1),
    "SD2's YAML": ({"yaml": V_OF_SD2}, "v", SD1_LAST),
    "a YAML of eps": ({"yaml": V_OF_SD2.replace('"v"', "eps")}, "eps", SD1_LAST),
    "SDXL's YAML": ({"yaml": SGM % "VScaling"}, "v", SD1_LAST),
    "CosXL's YAML": ({"yaml": SGM % "VScalingWithEDMcNoise"}, "v", 120),
    "a YAML of something else": ({"yaml": "general:\n  seed: 1\n"}, "eps", SD1_LAST),
    "its own": (
        {"scheduler": {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}},
        "v",
        SD1_LAST,
    ),
}


@pytest.mark.parametrize("case", SAYS)
def test_all_that_says_it_is_read(single_file, case, caplog):
    given, prediction, last = SAYS[case]
    with caplog.at_level(logging.INFO):
        denoiser = load_denoiser(rewritten(single_file, **given))
    assert denoiser.prediction_type == prediction
    assert denoiser.sigmas[-1].item() == pytest.approx(last, rel=1e-3)
    assert f"tiny.safetensors: {prediction} prediction, noise levels" in caplog.text and " (by " in caplog.text
    assert not [row for row in caplog.records if row.levelno > logging.INFO]


def test_sd2_is_told_by_the_std_of_a_bias(tmp_path):
    path = tmp_path / "sd2.safetensors"
    for std, expected in ((0.05, "epsilon"), (0.2, "v_prediction")):
        bias = torch.tensor([std, -std] * 8)
        assert file_scheduler(path, {}, {}, {}, bias).scheduler.get("prediction_type", "epsilon") == expected
    known = {"modelspec.prediction_type": "epsilon"}
    assert file_scheduler(path, {}, known, {}, bias).scheduler["prediction_type"] == "epsilon"


def test_a_contradiction_is_told_and_the_more_certain_counts(single_file, caplog):
    file = rewritten(single_file, ["v_pred"], {"modelspec.prediction_type": "epsilon"})
    assert load_denoiser(file).prediction_type == "v"
    (row,) = [row.getMessage() for row in caplog.records if row.levelno == logging.WARNING]
    assert "its key v_pred says v and modelspec.prediction_type in its metadata says eps" in row
    assert "--prediction" in row
    caplog.clear()
    file = rewritten(single_file, ["v_pred"], {"modelspec.prediction_type": "x0"})
    assert load_denoiser(file).prediction_type == "v" and "'x0' in its metadata, which is not known here" in caplog.text


CORRECTED = [
    (Correction("v"), [], "v", SD1_LAST),
    (Correction("eps"), ["v_pred", "ztsnr"], "eps", ZERO_LAST),
    (Correction("eps", "scaled linear"), ["v_pred", "ztsnr"], "eps", SD1_LAST),
    (Correction("auto", "zero terminal SNR"), ["v_pred"], "v", ZERO_LAST),
    (Correction("v", "zero terminal SNR"), EDM, "v", ZERO_LAST),
    (Correction("flow"), ["v_pred"], "flow", 1),
]


@pytest.mark.parametrize("correction, markers, prediction, last", CORRECTED)
def test_flags_know_better(single_file, correction, markers, prediction, last):
    denoiser = load_denoiser(rewritten(single_file, markers), correction)
    assert denoiser.prediction_type == prediction
    assert denoiser.sigmas[-1].item() == pytest.approx(last, rel=1e-3)


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="noise_levels is 'scaled linear' with prediction flow; expected auto"):
        Correction("flow", "scaled linear")


def test_the_flag_reaches_run_and_report(train_arguments, tmp_path, capsys):
    assert main(train_arguments(tmp_path / "out", "--steps", "1", "--prediction", "v", "--sample-prompts")) == 0
    config = json.loads((tmp_path / "out" / "r" / "config.json").read_text(encoding="utf-8"))
    assert config["prediction_type"] == "v" and config["denoiser"].startswith("v prediction, noise levels 0.0292 to")
    assert "model: v prediction, noise levels 0.0292 to 14.615 (by the flags)\n" in capsys.readouterr().err


DAMAGED = {
    "its tensor edm_vpred.sigma_max has 2 values": {"markers": {"edm_vpred.sigma_max": torch.ones(2)}},
    "sigma_max is nan; expected a finite number": {"markers": {"edm_vpred.sigma_max": number("nan")}},
    "sigma_min is 0.002 and sigma_max 0.001": {"markers": EDM | {"edm_vpred.sigma_max": number(0.001)}},
    "Playground v2.5 .edm_mean": {"markers": ["edm_mean", "edm_std"]},
    "beta_end is 12.0; expected a number between 0 and 1": {"scheduler": {"beta_start": 0.1, "beta_end": 12}},
    "beta_start is 'low'; expected a finite number": {"scheduler": {"beta_start": "low", "beta_end": 0.1}},
    "no beta_start and is 'UnCLIPScheduler'": {"scheduler": {"_class_name": "UnCLIPScheduler"}},
    "num_train_timesteps is 1000000000000; expected": {
        "scheduler": {"beta_start": 0.1, "beta_end": 0.2, "num_train_timesteps": 10**12}
    },
    "parameterization is 'x1'; expected eps or v": {"yaml": V_OF_SD2.replace('"v"', "x1")},
    "tiny.yaml: linear_start is 'low'": {"yaml": V_OF_SD2.replace("0.00085", "low")},
    "tiny.yaml: its size is 2 MB": {"yaml": "#" * (1 << 21)},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_what_is_no_number_or_of_another_kind_is_named(single_file, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_denoiser(rewritten(single_file, **DAMAGED[message]))
    assert "tiny." in str(raised.value)


def saved(scheduler):
    """The values of a scheduler as scheduler_config.json has them."""
    return json.loads(scheduler.to_json_string())


def drawn():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 8, 8, generator=random) for _ in range(2)]


@torch.no_grad()
def test_continuous_levels_are_those_of_diffusers_edm(tiny_model):
    """CosXL: scaling, time and clean latent of diffusers' EDMEulerScheduler."""
    from diffusers import EDMEulerScheduler

    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
    denoiser = DiffusersDenoiser(tiny_model.denoiser.network, saved(theirs))
    (latent, noise), sigma = drawn(), denoiser.sigmas[[3, 500, 999]]
    assert (denoiser.sigmas[0].item(), denoiser.sigmas[-1].item()) == (pytest.approx(0.002), pytest.approx(120))
    noisy, words = denoiser.add_noise(latent, noise, sigma), Conditioning(torch.randn(3, 4, 32))
    found = denoiser.predict(noisy, sigma, words)
    for i, level in enumerate(sigma):
        scaled, time = theirs.precondition_inputs(noisy[i : i + 1], level), theirs.precondition_noise(level)
        output = denoiser.network(scaled, time, encoder_hidden_states=words.context[i : i + 1]).sample
        torch.testing.assert_close(found[i : i + 1], output, rtol=1e-4, atol=1e-5)
        clean = theirs.precondition_outputs(noisy[i : i + 1], output, level)
        ours = denoiser.denoised(noisy[i : i + 1], level[None], output)
        torch.testing.assert_close(ours, clean, rtol=1e-4, atol=1e-4)
    back = denoiser.denoised(noisy, sigma, denoiser.target(latent, noise, sigma))
    torch.testing.assert_close(back, latent, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="flow matching or of EDM; expected those of a discrete schedule"):
        denoiser.with_sigmas(denoiser.sigmas)


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_those_of_diffusers(tiny_model, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    denoiser = DiffusersDenoiser(tiny_model.denoiser.network, saved(theirs))
    torch.testing.assert_close(denoiser.sigmas, theirs.sigmas.flip(0), rtol=1e-5, atol=1e-6)
    (latent, noise), sigma = drawn(), denoiser.sigmas[[3, 500, 999]]
    noisy = denoiser.add_noise(latent, noise, sigma)
    levels = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, levels * noise + (1 - levels) * latent)
    words = Conditioning(torch.randn(3, 4, 32))
    output = denoiser.network(noisy, sigma * 1000, encoder_hidden_states=words.context).sample
    torch.testing.assert_close(denoiser.predict(noisy, sigma, words), output)
    torch.testing.assert_close(denoiser.denoised(noisy, sigma, noise - latent), latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoiser.target(latent, noise, sigma), noise - latent)


def test_other_schedulers_of_a_folder_are_named():
    for scheduler, words in (
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDM's noise levels with prediction_type 'epsilon'"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting is on",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1}, "shift is -1.0; expected more than 0"),
    ):
        with pytest.raises(ValueError, match=words):
            DiffusersDenoiser(torch.nn.Identity(), scheduler)
    assert training_sigmas({"use_flow_sigmas": True, "flow_shift": 2.0})[499].item() == pytest.approx(2 * 0.5 / 1.5)


WRITTEN = {
    "eps": ([], set()),
    "v": (["v_pred"], {"v_pred"}),
    "zero": (["v_pred", "ztsnr"], {"v_pred", "ztsnr"}),
    "edm": (EDM, {"edm_vpred.sigma_max", "edm_vpred.sigma_min"}),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_reset_writes_what_it_read(single_file, tmp_path, kind):
    markers, names = WRITTEN[kind]
    known = load_denoiser(rewritten(single_file, markers))
    output = tmp_path / "reset.safetensors"
    assert main(["reset", "--model", str(single_file), "--layers", "QK", "--output", str(output)]) == 0
    tensors, metadata = read_tensors(output)
    extra = {name for name in tensors if not name.startswith(ldm.UNET_PREFIX)}
    assert extra == names and {ldm.UNET_PREFIX + name for name in names} <= tensors.keys()
    assert metadata["modelspec.predict_key"] == ("v" if names else "epsilon")
    for about in (metadata, {}):  # others may leave the metadata out
        write_tensors(output, tensors, about | ({} if about else read_shapes(single_file)))
        found = load_denoiser(output)
        assert found.prediction_type == known.prediction_type
        torch.testing.assert_close(found.sigmas, known.sigmas, rtol=1e-4, atol=0)


def read_shapes(file):
    """`retune.config` with the shapes of a file alone: the tiny model's heads are no real model's."""
    config = json.loads(read_tensors(file)[1]["retune.config"])
    return {"retune.config": json.dumps({"unet": config["unet"]})}


def test_reset_writes_the_flags_and_no_path(single_file, tmp_path):
    flags = ["--layers", "QK", "--prediction", "v", "--noise-levels", "zero terminal SNR"]
    output = tmp_path / "reset.safetensors"
    assert main(["reset", "--model", str(single_file), "--output", str(output), *flags]) == 0
    tensors, metadata = read_tensors(output)
    assert {"v_pred", "ztsnr"} <= tensors.keys() and str(tmp_path) not in json.dumps(metadata)
    assert load_denoiser(output).sigmas[-1].item() == pytest.approx(ZERO_LAST, rel=1e-3)


@torch.no_grad()
def test_the_demo_model_comes_back_whole(tmp_path):
    """README's `reset --model demo`: v prediction and the demo's heads; also without metadata, as ComfyUI saves it."""
    output = tmp_path / "reset.safetensors"
    flags = ["--layers", "QK", "--strength", "0", "--output", str(output)]
    assert main(["reset", "--model", "demo", *flags]) == 0
    plain = tmp_path / "plain.safetensors"
    write_tensors(plain, {n: v for n, v in read_tensors(output)[0].items() if n.startswith(ldm.UNET_PREFIX)})
    known, latent = open_denoiser("demo"), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = Conditioning(torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1)))
    expected = known.predict(latent, torch.tensor([2.0]), words)
    for file in (output, plain):
        found = open_denoiser(str(file))
        assert found.prediction_type == "v" and found.fingerprint == known.fingerprint
        assert torch.equal(found.predict(latent, torch.tensor([2.0]), words), expected)


def test_the_whole_demo_model_opens_without_its_metadata(tmp_path):
    write_tensors(tmp_path / "saved.safetensors", read_tensors(weights_path("demo.safetensors"))[0])
    options = {"tokenizer": weights_path("clip_tokenizer")}
    found, known = (
        build_model(ModelConfig(model=str(tmp_path / "saved.safetensors"), **options)),
        build_model(ModelConfig(model="demo")),
    )
    for one, other in ((found.denoiser, known.denoiser), (found.autoencoder, known.autoencoder)):
        assert one.fingerprint == other.fingerprint
    assert found.text_encoder.fingerprint == known.text_encoder.fingerprint


def test_a_trained_unet_tells_it_and_is_read_as_before(tiny_model, pictures, single_file, tmp_path):
    model = load_model(rewritten(single_file, ["v_pred"]), tokenizer=single_file.parent / "clip_tokenizer")
    settings = TrainingSettings(zero_terminal_snr=True, loss_weighting="none", warmup_steps=0)
    config = TrainModelConfig(run_name="r", steps=1, learning_rate=1e-3, train="whole UNet", settings=settings)
    trained = train_model(model, pictures, config, tmp_path)
    tensors, metadata = read_tensors(trained.path)
    assert {"v_pred", "ztsnr", f"{ldm.UNET_PREFIX}v_pred"} <= tensors.keys()
    assert metadata["modelspec.prediction_type"] == "v"
    assert read_trained_model(trained.path.parent).unet.keys() == unet_parameters(model.denoiser).keys()
    before = model.denoiser.fingerprint
    assert with_tuned(model, [str(trained.path)]).denoiser.fingerprint != before


def test_no_marker_is_written_where_there_is_none(tiny_model, tmp_path):
    save_unet(tmp_path / "a.safetensors", unet_parameters(tiny_model.denoiser), tiny_model.denoiser)
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    assert all(name.startswith(ldm.UNET_PREFIX) and value.numel() for name, value in tensors.items())
    assert metadata["modelspec.prediction_type"] == "epsilon"
