"""The same model from one file in the original layout and from a diffusers folder."""

import json
import shutil

import pytest
import torch
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.models.diffusers import load_denoiser, load_model
from retune.training.models.protocols import Conditioning


@torch.no_grad()
def outputs(model):
    random = torch.Generator().manual_seed(0)
    noisy, image = torch.randn(2, 4, 8, 8, generator=random), torch.rand(2, 3, 16, 16, generator=random)
    words = model.text_encoder.encode(model.text_encoder.tokenize(["a red circle", "two small blue squares"]))
    prediction = model.denoiser.predict(noisy, torch.tensor([1.0, 9.0]), Conditioning(words.context))
    latent = model.autoencoder.encode(image)
    return prediction, words.context, latent, model.autoencoder.decode(latent)


def test_file_and_folder_give_the_models_own_numbers(tiny_model, single_file, diffusers_folder, tmp_path):
    expected = outputs(tiny_model)
    for model in (load_model(single_file, tokenizer=tmp_path / "clip_tokenizer"), load_model(diffusers_folder)):
        for one, other in zip(outputs(model), expected, strict=True):
            assert torch.equal(one, other)
        assert model.denoiser.fingerprint == tiny_model.denoiser.fingerprint
        assert model.autoencoder.fingerprint == tiny_model.autoencoder.fingerprint
        assert torch.equal(model.denoiser.sigmas, tiny_model.denoiser.sigmas)


def test_the_unet_loads_alone(tiny_model, single_file, diffusers_folder, tmp_path):
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(diffusers_folder / part)
    tensors, metadata = read_tensors(single_file, "model.diffusion_model.")
    assert len(tensors) == len(list(tiny_model.denoiser.network.parameters()))
    write_tensors(tmp_path / "unet.safetensors", tensors, metadata)
    for path in (single_file, diffusers_folder, tmp_path / "unet.safetensors"):
        assert load_denoiser(path).fingerprint == tiny_model.denoiser.fingerprint
    shutil.rmtree(diffusers_folder / "unet")
    with pytest.raises(ValueError, match="lacks unet; expected unet"):
        load_denoiser(diffusers_folder)


def test_prediction_type_comes_from_the_scheduler(diffusers_folder, single_file, tmp_path):
    path = diffusers_folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction"}), encoding="utf-8")
    assert load_model(diffusers_folder).denoiser.prediction_type == "v"
    tensors, metadata = read_tensors(single_file)
    about = json.loads(metadata["retune.config"]) | {"scheduler": {"beta_start": 0.001, "beta_end": 0.01}}
    write_tensors(single_file, tensors, {"retune.config": json.dumps(about)})
    denoiser = load_model(single_file, tokenizer=tmp_path / "clip_tokenizer").denoiser
    assert denoiser.prediction_type == "eps" and denoiser.sigmas[0].item() == pytest.approx(0.001**0.5, rel=1e-3)


def test_half_precision_files_load_in_fp32(tiny_model, single_file, tmp_path):
    tensors, metadata = read_tensors(single_file)
    write_tensors(single_file, {name: tensor.half() for name, tensor in tensors.items()}, metadata)
    model = load_model(single_file, tokenizer=tmp_path / "clip_tokenizer")
    for part in (model.denoiser, model.autoencoder, model.text_encoder):
        assert {p.dtype for p in part.network.parameters()} == {torch.float32}
    name, weight = next(iter(tiny_model.denoiser.network.named_parameters()))
    assert torch.equal(model.denoiser.network.get_parameter(name), weight.half().float())


@pytest.mark.parametrize(
    "prefix, message",
    [
        ("model.diffusion_model.middle_block.", "UNet in the checkpoint lacks .* such as 'mid_block"),
        ("first_stage_model.decoder.conv_in.", "VAE in the checkpoint lacks 2 tensors such as 'decoder.conv_in.bias'"),
        ("cond_stage_model.", "checkpoint holds no CLIP text encoder"),
    ],
)
def test_incomplete_files_are_named(single_file, tmp_path, prefix, message):
    tensors, metadata = read_tensors(single_file)
    write_tensors(single_file, {n: t for n, t in tensors.items() if not n.startswith(prefix)}, metadata)
    with pytest.raises(ValueError, match=message):
        load_model(single_file, tokenizer=tmp_path / "clip_tokenizer")


def test_wrong_paths_are_named(single_file, diffusers_folder, tmp_path):
    with pytest.raises(ValueError, match="model is .*nothing.safetensors; expected a diffusers folder"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="no CLIP tokenizer is given"):
        load_model(single_file)
    shutil.rmtree(diffusers_folder / "vae")
    with pytest.raises(ValueError, match="lacks vae; expected unet, vae, text_encoder"):
        load_model(diffusers_folder)
    write_tensors(tmp_path / "other.safetensors", {"model.diffusion_model.double_blocks.0.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no UNet with cross-attention"):
        load_model(tmp_path / "other.safetensors")
