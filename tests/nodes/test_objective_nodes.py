"""Masks, regularisation images and zero terminal SNR through the nodes, and beside ComfyUI's own sampling."""

import dataclasses
import json

import pytest
import torch
from PIL import Image


def run(node, *args, **kwargs):
    """Results of a node as a tuple."""
    with torch.inference_mode():
        return node.execute(*args, **kwargs).result


def resampled(model, sampling, zsnr):
    """A MODEL after ComfyUI's ModelSamplingDiscrete."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    with torch.inference_mode():
        return ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]


def test_zero_terminal_levels_are_those_of_comfyuis_node(demo):
    from retune.nodes.bridge.view import text_to_image
    from retune.training.models.noise_levels import zero_terminal_sigmas
    from retune.training.models.protocols import Conditioning

    plain, rescaled = (resampled(demo[0], "v_prediction", zsnr) for zsnr in (False, True))
    before = plain.get_model_object("model_sampling").sigmas.clone()
    with torch.inference_mode(), text_to_image(rescaled, *demo[1:]) as given:
        theirs = given.denoiser
        assert torch.equal(zero_terminal_sigmas(theirs.sigmas), theirs.sigmas)
        with text_to_image(plain, *demo[1:]) as view:
            ours = view.denoiser.with_sigmas(zero_terminal_sigmas(view.denoiser.sigmas))
            torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=0)
            assert torch.equal(view.denoiser.sigmas, before)
            latent, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            words, sigma = Conditioning(torch.ones(2, 3, 128)), theirs.sigmas[[300, 999]]
            noisy = theirs.add_noise(latent, noise, sigma)
            outputs = [d.predict(noisy, sigma, words) for d in (ours, theirs)]
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(*(d.denoised(noisy, sigma, outputs[1]) for d in (ours, theirs)))
    assert torch.equal(plain.get_model_object("model_sampling").sigmas, before)


def test_a_v_model_trains_at_zero_terminal_snr_and_an_eps_model_is_refused(demo, pictures, tmp_path):
    from retune.nodes.bridge.view import text_to_image
    from retune.training.config.run import TrainModelConfig
    from retune.training.config.sample_prompts import SamplePrompts
    from retune.training.config.training_settings import TrainingSettings
    from retune.training.recipes.unet import train_model

    settings = TrainingSettings(zero_terminal_snr=True, loss_weighting="none", min_timestep=999, warmup_steps=0)
    samples = SamplePrompts(prompts=("a red circle",), steps=2, width=64, height=64)
    config = TrainModelConfig(run_name="r", steps=1, settings=settings, samples=samples)
    with torch.inference_mode():
        with text_to_image(resampled(demo[0], "v_prediction", False), *demo[1:]) as view:
            trained = train_model(view, pictures, config, tmp_path)
        assert trained.unet and all(weight.isfinite().all() for weight in trained.unet.values())
        with text_to_image(resampled(demo[0], "eps", False), *demo[1:]) as view:
            with pytest.raises(ValueError, match="eps prediction; expected v"):
                train_model(view, pictures, dataclasses.replace(config, run_name="s"), tmp_path)


def test_masks_weights_and_joined_datasets(comfyui, tmp_path):
    from retune.nodes.dataset import RetuneJoinDatasets, RetuneLoadDataset

    for i in range(2):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red circle", encoding="utf-8")
    before = RetuneLoadDataset.fingerprint_inputs(str(tmp_path), masks="files")
    Image.new("L", (64, 64), 255).save(tmp_path / "0-masklabel.png")
    assert RetuneLoadDataset.fingerprint_inputs(str(tmp_path), masks="files") != before
    dataset, report = run(RetuneLoadDataset, str(tmp_path), 64, masks="files", repeats=3)
    assert [e.mask is not None for e in dataset.examples] == [True, False] and "masks: 1 of 2" in report
    (tmp_path / "0-masklabel.png").unlink()
    kept, _ = run(RetuneLoadDataset, str(tmp_path), 64, weight=0.5)
    joined, report = run(RetuneJoinDatasets, dataset, kept)
    assert len(joined) == 12 and "regularisation images: 2 of 2 images, 6 shown per epoch" in report
    assert [e.weight for e in joined.examples] == [1.0, 1.0, 0.5, 0.5]
    more, _ = run(RetuneJoinDatasets, dataset, kept, second_is="more images")
    assert len(more) == 8


def test_images_of_the_graph_have_masks_too(comfyui, demo, tmp_path):
    """Masked to a half whose other half is left out, a loss is that of half the latent."""
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.dataset import RetuneDatasetFromImages
    from retune.training.config.lora import LoraConfig
    from retune.training.config.training_settings import TrainingSettings
    from retune.training.data.dataset import from_images
    from retune.training.recipes.lora import train_lora

    assert RetuneDatasetFromImages.define_schema().inputs[-1].optional
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    (plain,) = run(RetuneDatasetFromImages, [images], ["a red circle"])
    assert plain.fingerprint == from_images([images], ["a red circle"]).fingerprint
    (masked,) = run(RetuneDatasetFromImages, [images], ["a red circle"], masks=[half])
    assert all(torch.equal(e.load_mask(), half) for e in masked.examples)
    losses = []
    for dataset, weight in ((plain, 0.0), (masked, 1.0), (masked, 0.0)):
        settings = TrainingSettings(mask_weight=weight, mask_normalize=False, warmup_steps=1)
        config = LoraConfig(run_name=f"r{len(losses)}", steps=1, learning_rate=1e-3, settings=settings)
        with torch.inference_mode(), text_to_image(*demo) as view:
            train_lora(view, dataset, config, tmp_path)
        losses.append(json.loads((tmp_path / config.run_name / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and 0.2 < losses[2] / losses[0] < 0.8


def test_every_setting_of_the_core_is_an_input_with_its_default_and_choices(comfyui):
    from typing import Literal, get_args, get_origin, get_type_hints

    from retune.nodes.settings import RetuneTrainingSettings
    from retune.training.config.training_settings import TrainingSettings

    inputs = {one.id: one for one in RetuneTrainingSettings.define_schema().inputs}
    hints = get_type_hints(TrainingSettings)
    assert [name for name in inputs if name != "preset"] and inputs.keys() - {"preset"} == hints.keys()
    for field in dataclasses.fields(TrainingSettings):
        assert inputs[field.name].default == field.default and inputs[field.name].optional
        if get_origin(hints[field.name]) is Literal:
            assert tuple(inputs[field.name].options) == get_args(hints[field.name])
