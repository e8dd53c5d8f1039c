"""Resize, extract and convert: dW before and after, by a closed form where there is one."""

import json

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands.lora_files import (
    ConvertLoraConfig,
    ExtractLoraConfig,
    ResizeLoraConfig,
    convert_lora,
    extract_lora,
    open_text_encoders,
    resize_lora,
)
from retune.training.commands.open_model import open_unet
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.formats.lora import read_lora
from retune.training.formats.lora_difference import delta_weight, truncated_svd

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"
LINEAR_SHAPE, KERNEL_SHAPE = torch.Size((16, 24)), torch.Size((16, 8, 3, 3))


def named(layer, roles):
    return {f"{layer}.{role}": value for role, value in roles.items()}


def change(result, shape):
    return result(torch.zeros(shape))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "LoKr, whole", "full", "flat LoRA"])
@pytest.mark.parametrize("shape", [LINEAR_SHAPE, KERNEL_SHAPE])
def test_differences_are_those_worked_out_by_hand(lora_kinds, tmp_path, kind, shape):
    roles, result = lora_kinds.KINDS[kind](shape, 0)
    write_tensors(tmp_path / "x.safetensors", named(LAYER, roles))
    found = delta_weight(read_lora(tmp_path / "x.safetensors").modules[LAYER])
    torch.testing.assert_close(found.reshape(shape), change(result, shape), atol=1e-6, rtol=1e-5)


def test_a_low_rank_matrix_comes_back_and_a_cut_loses_the_smallest_values():
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(20, 4, generator=random))[0] for _ in range(2))
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    matrix = u * values @ v.T
    whole = truncated_svd(matrix, 4)
    torch.testing.assert_close(whole.up @ whole.down, matrix, atol=1e-5, rtol=1e-5)
    cut = truncated_svd(matrix, 2)
    assert (matrix - cut.up @ cut.down).norm() == pytest.approx((1 + 0.25) ** 0.5, rel=1e-4)
    assert (cut.kept_energy, cut.energy) == pytest.approx((20.0, 21.25), rel=1e-4)
    assert [len(truncated_svd(matrix, energy=e).down) for e in (0.7, 0.76, 0.94, 0.95, 0.99)] == [1, 2, 2, 3, 4]
    assert (cut.up.gather(0, cut.up.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("kind", ["LoRA", "flat LoRA", "LoHa", "LoKr", "full"])
def test_at_full_rank_a_resized_file_is_plain_lora_with_the_same_weights(lora_kinds, tmp_path, kind):
    tensors, expected = {}, {}
    for seed, (layer, shape) in enumerate([(LAYER, LINEAR_SHAPE), (CONVOLUTION, KERNEL_SHAPE)]):
        roles, result = lora_kinds.KINDS[kind](shape, 10 * seed)
        tensors |= named(layer, roles)
        expected[layer] = change(result, shape)
    write_tensors(tmp_path / "x.safetensors", tensors)
    done = resize_lora(ResizeLoraConfig(lora=tmp_path / "x.safetensors", output=tmp_path / "y.safetensors", rank=16))
    assert done["energy_kept"] == pytest.approx(1, abs=1e-6) and done["layers"] == 2
    modules = read_lora(tmp_path / "y.safetensors").modules
    assert modules[CONVOLUTION].tensors["lora_down.weight"].shape[1:] == (8, 3, 3)
    for layer, value in expected.items():
        module = modules[layer]
        assert module.kind in ("LoRA", "LoCon") and module.alpha == module.rank
        assert (delta_weight(module).reshape(value.shape) - value).norm() <= 1e-5 * value.norm()


def test_resizing_keeps_the_largest_singular_values_and_says_how_much(lora_kinds, tmp_path):
    roles, result = lora_kinds.lora(LINEAR_SHAPE, 0)
    norm = {"lora_unet_down_blocks_0_resnets_0_norm1.diff": torch.ones(8)}
    write_tensors(tmp_path / "x.safetensors", named(LAYER, roles) | norm, {"ss_output_name": "cat"})
    values = torch.linalg.svdvals(change(result, LINEAR_SHAPE))
    share = (values[:2].square().sum() / values.square().sum()).item()
    options = ["--lora", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors")]
    assert main(["resize-lora", *options, "--rank", "2"]) == 0
    module = read_lora(tmp_path / "y.safetensors").modules[LAYER]
    assert (module.rank, module.alpha) == (2, 2)
    assert torch.linalg.svdvals(delta_weight(module))[:2] == pytest.approx(values[:2].tolist(), rel=1e-4)
    done = resize_lora(
        ResizeLoraConfig(lora=tmp_path / "x.safetensors", output=tmp_path / "z.safetensors", energy=share - 1e-3)
    )
    assert done["rank"] == [2, 2] and done["energy_kept"] == pytest.approx(share, rel=1e-4)
    assert done["least_layer"] == LAYER
    one, two = ((tmp_path / f"{name}.safetensors") for name in "yz")
    for name, value in read_tensors(one)[0].items():
        assert torch.equal(value, read_tensors(two)[0][name])
    data = read_tensors(one)[1]
    assert (data["ss_network_dim"], data["ss_network_alpha"], data["ss_output_name"]) == ("2", "2", "cat")
    assert torch.equal(read_tensors(one)[0][next(iter(norm))], torch.ones(8))


def test_layers_whose_difference_depends_on_the_weight_are_refused(lora_kinds, tmp_path):
    config = {"lora": tmp_path / "x.safetensors", "output": tmp_path / "y.safetensors", "rank": 2}
    write_tensors(config["lora"], named(LAYER, lora_kinds.dora(1)(LINEAR_SHAPE, 0)[0]))
    with pytest.raises(ValueError, match=f"{LAYER} is DoRA, which is no difference by itself"):
        resize_lora(ResizeLoraConfig(**config))
    for wrong, message in (({"rank": 0}, "rank is 0"), ({"rank": None}, "neither rank nor energy")):
        with pytest.raises(ValueError, match=message):
            ResizeLoraConfig(**config | wrong)


def test_kohya_and_diffusers_convert_into_each_other(lora_kinds, tmp_path):
    tensors, layers = {}, {LAYER: LINEAR_SHAPE, CONVOLUTION: KERNEL_SHAPE}
    layers["lora_te_text_model_encoder_layers_0_mlp_fc1"] = LINEAR_SHAPE
    for seed, (layer, shape) in enumerate(layers.items()):
        tensors |= named(layer, lora_kinds.lora(shape, 10 * seed)[0])
    files = [tmp_path / f"{name}.safetensors" for name in ("kohya", "diffusers", "back")]
    write_tensors(files[0], tensors, {"ss_base_model_version": "sd_v1", "modelspec.title": "cat"})
    for source, target, format in ((0, 1, "diffusers"), (1, 2, "kohya")):
        done = convert_lora(ConvertLoraConfig(lora=files[source], output=files[target], format=format))
        assert done["layers"] == 3 and not done["warnings"]
    assert "unet.down_blocks.0.resnets.0.conv1" in read_lora(files[1]).modules
    back, data = read_tensors(files[2])
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    assert data["modelspec.title"] == "cat" and "lora_adapter_metadata" not in data and "format" not in data


def test_sdxl_files_get_the_original_names(lora_kinds, tmp_path):
    name = "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k"
    shape = torch.Size((16, 2048))
    roles, _ = lora_kinds.lora(shape, 0)
    tensors = {
        f"unet.{name}.lora_A.weight": roles["lora_down.weight"],
        f"unet.{name}.lora_B.weight": roles["lora_up.weight"],
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    convert_lora(ConvertLoraConfig(lora=tmp_path / "x.safetensors", output=tmp_path / "y.safetensors"))
    stored, data = read_tensors(tmp_path / "y.safetensors")
    assert "lora_unet_input_blocks_8_1_transformer_blocks_0_attn2_to_k.alpha" in stored
    assert data["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


# --- from two models --------------------------------------------------------------------------------------------------


def tuned_file(source, target, changes):
    """A checkpoint with matrices added to some of its tensors."""
    tensors, data = read_tensors(source)
    write_tensors(target, {name: value + changes.get(name, 0) for name, value in tensors.items()}, data)
    return target


def low(shape, rank, seed):
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], shape[1:].numel()
    up, down = torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)
    return 0.1 * (up @ down).reshape(shape)


@pytest.fixture
def two_models(single_file, tmp_path):
    """(base, tuned, name -> change): every kind of layer changed by matrices of rank 2, and a norm."""
    tensors, _ = read_tensors(single_file)
    names = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.0.in_layers.2.weight",
        "model.diffusion_model.output_blocks.2.0.emb_layers.1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
    }
    changes = {name: low(tensors[name].shape, 2, seed) for seed, name in enumerate(sorted(names))}
    changes["model.diffusion_model.out.0.weight"] = torch.full_like(tensors["model.diffusion_model.out.0.weight"], 0.01)
    return single_file, tuned_file(single_file, tmp_path / "tuned.safetensors", changes), changes


def test_what_was_added_to_a_model_comes_out_as_a_lora(two_models, tmp_path):
    base, tuned, changes = two_models
    config = {"base": str(base), "tuned": str(tuned), "output": tmp_path / "x.safetensors"}
    done = extract_lora(ExtractLoraConfig(**config, rank=2, conv_rank=2))
    energy = {name: value.square().sum().item() for name, value in changes.items()}
    assert done["layers"] == 5 and done["energy_kept"] == pytest.approx(1, abs=1e-5)
    norm = energy["model.diffusion_model.out.0.weight"]
    assert done["left_out"] == pytest.approx(norm / sum(energy.values()), rel=1e-2)
    modules = read_lora(tmp_path / "x.safetensors").modules
    expected = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_up_blocks_1_resnets_0_conv1",
        "lora_unet_up_blocks_1_resnets_0_time_emb_proj",
        "lora_te_text_model_encoder_layers_1_mlp_fc1",
    }
    assert modules.keys() == expected
    found = sorted(delta_weight(module).norm().item() for module in modules.values())
    assert found == pytest.approx(sorted(e**0.5 for name, e in energy.items() if "out.0" not in name), rel=1e-4)
    module = modules["lora_unet_up_blocks_1_resnets_0_conv1"]
    wanted = changes["model.diffusion_model.output_blocks.2.0.in_layers.2.weight"]
    torch.testing.assert_close(delta_weight(module).reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-3)
    assert module.tensors["lora_down.weight"].shape == (2, *wanted.shape[1:])


def test_without_conv_rank_residual_blocks_stay_out(two_models, tmp_path, capsys, caplog):
    base, tuned, _ = two_models
    flags = ["--base", str(base), "--tuned", str(tuned), "--output", str(tmp_path / "x.safetensors"), "--rank", "1"]
    assert main(["extract-lora", *flags, "--format", "diffusers", "--dtype", "fp16", "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["layers"] == 3 and done["rank"] == [1, 1] and done["energy_kept"] < 1
    assert "is in layers outside of the LoRA" in caplog.text
    modules = read_lora(tmp_path / "x.safetensors").modules
    assert modules.keys() == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.down_blocks.0.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
    }


def test_models_that_do_not_differ_or_do_not_match_are_refused(two_models, tmp_path):
    base, _, _ = two_models
    config = {"base": str(base), "output": tmp_path / "x.safetensors"}
    with pytest.raises(ValueError, match="do not differ in any layer"):
        extract_lora(ExtractLoraConfig(**config, tuned=str(base)))
    with pytest.raises(ValueError, match="different parts"):
        extract_lora(ExtractLoraConfig(**config, tuned="demo"))
    with pytest.raises(ValueError, match="conv_rank is -1"):
        ExtractLoraConfig(**config, tuned=str(base), conv_rank=-1)


def test_a_folder_and_a_file_have_the_same_text_encoder(single_file, tmp_path):
    from retune.training.models.diffusers import load_model

    model = load_model(single_file, tokenizer=single_file.parent / "clip_tokenizer")
    model.text_encoder.network.save_pretrained(tmp_path / "folder" / "text_encoder")
    model.denoiser.network.save_pretrained(tmp_path / "folder" / "unet")
    of_file, of_folder = open_text_encoders(str(single_file)), open_text_encoders(str(tmp_path / "folder"))
    assert of_file.keys() == of_folder.keys() and len(of_file) > 20
    assert all(torch.equal(value, of_folder[name]) for name, value in of_file.items())
    assert open_unet(str(tmp_path / "folder")).keys() == open_unet(str(single_file)).keys()


def test_text_encoders_of_sdxl_and_sd2_files_have_comfyuis_names(tmp_path):
    block = "transformer.resblocks.1.attn.in_proj_weight"
    names = {
        "clip_l": "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
        "clip_g": f"conditioner.embedders.1.model.{block}",
        "clip_h": f"cond_stage_model.model.{block}",
    }
    weights = {encoder: torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) for encoder in names}
    write_tensors(tmp_path / "x.safetensors", {names[encoder]: value for encoder, value in weights.items()})
    found = open_text_encoders(str(tmp_path / "x.safetensors"))
    path = "transformer.text_model.encoder.layers.1.self_attn"
    assert torch.equal(found[f"text_encoders.clip_l.{path}.q_proj.weight"], weights["clip_l"])
    for encoder in ("clip_g", "clip_h"):
        for part, rows in zip("qkv", weights[encoder].chunk(3), strict=True):
            assert torch.equal(found[f"text_encoders.{encoder}.{path}.{part}_proj.weight"], rows)
    assert len(found) == 7
