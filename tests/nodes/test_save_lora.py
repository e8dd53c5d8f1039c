"""Save LoRA: every algorithm's file gives W' as computed by hand, through ComfyUI's own loader and through ours."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.comfyui

UNET = "diffusion_model."
UNET_LAYERS = {
    "sd15": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        "output_blocks.5.1.transformer_blocks.0.attn1.to_out.0",
    ),
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        "output_blocks.2.1.transformer_blocks.1.ff.net.0.proj",
    ),
}
POINTS = {"sd15": "middle_block.1.proj_in", "sdxl": "input_blocks.8.1.proj_out"}
RESNET = ("input_blocks.4.0.in_layers.2", "input_blocks.3.0.op", "output_blocks.3.0.skip_connection")
CONVOLUTIONS = {"sd15": (*RESNET, "output_blocks.2.1.conv"), "sdxl": (*RESNET, "output_blocks.2.2.conv")}
TEXT_LAYERS = {
    "sd15": ("SD1.5", ["clip_l"]),
    "sdxl": ("SDXL", ["clip_l", "clip_g"]),
}
TEXT_PATHS = ("text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.2.mlp.fc2")
T5_PATHS = ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wi_0")


def weights_of(patcher):
    with torch.inference_mode():
        try:
            patcher.patch_model(torch.device("cpu"))
            return {name: value.clone() for name, value in patcher.model.state_dict().items()}
        finally:
            patcher.unpatch_model(torch.device("cpu"))


@pytest.fixture
def save(comfyui):
    """`save(lora, ...)`: the node's file."""
    from retune.nodes.save_lora import RetuneSaveLora

    def run(lora, format="kohya", **options):
        with torch.inference_mode():
            return Path(RetuneSaveLora.execute(lora, format, "test/lora", **options).result[0])

    return run


def made(make, weights, prefix, layers, seed=0):
    """(LORA_MODEL, weight's name -> what becomes of it) for layers whose weights are `<layer>.weight`."""
    tensors, expected = {}, {}
    for number, layer in enumerate(layers):
        weight = weights[f"{layer}.weight"]
        parts, result = make(weight.shape, seed + 10 * number)
        tensors |= {f"{prefix}{layer}.{role}": value for role, value in parts.items()}
        expected[f"{layer}.weight"] = result(weight)
    return tensors, expected


def check(before, after, expected):
    for name, value in expected.items():
        assert (value - before[name]).norm() > 1e-2 * before[name].norm()
        assert (after[name] - value).norm() <= 1e-4 * value.norm(), name
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(expected)


def apply(model, clip, file):
    from retune.nodes.bridge.lora_patches import Row, apply_loras, lora_of
    from retune.training.formats.lora import read_lora_tensors

    with torch.inference_mode():
        row = Row(lora_of(file.name, *read_lora_tensors(file)), 1.0, 1.0)
        model, clip, (use,) = apply_loras(model, clip, [row])
    assert not use.warnings()
    return model, clip


def load_stock(model, clip, file):
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, clip, load_file(file), 1.0, 1.0)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "kind", ["LoRA", "flat LoRA", "LoHa", "LoKr", "LoKr, whole", "DoRA, inputs", "DoRA, outputs", "full"]
)
def test_kohya_files_give_the_weights_worked_out_by_hand(request, clips, lora_kinds, save, family, kind):
    model, _ = request.getfixturevalue(family)
    name, encoders = TEXT_LAYERS[family]
    clip, make = clips[name], lora_kinds.KINDS[kind]
    before, text_before = weights_of(model), weights_of(clip.patcher)
    layers = [*UNET_LAYERS[family], POINTS[family], *CONVOLUTIONS[family]]
    tensors, expected = made(make, before, "", [UNET + layer for layer in layers])
    text = [f"{encoder}.transformer.{path}" for encoder in encoders for path in TEXT_PATHS]
    text_tensors, text_expected = made(make, text_before, "text_encoders.", text, seed=500)
    file = save(tensors | text_tensors)
    loaders = [apply] if kind == "DoRA, outputs" else [apply, load_stock]
    for load in loaders:
        patched, patched_clip = load(model, clip, file)
        check(before, weights_of(patched), expected)
        check(text_before, weights_of(patched_clip.patcher), text_expected)
    assert all(key.startswith(("lora_unet_", "lora_te")) for key in load_file(file))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "DoRA, inputs", "full"])
def test_a_t5s_layers_come_back_through_apply_lora(sd15, t5, lora_kinds, save, kind):
    before = weights_of(t5.patcher)
    layers = [f"t5base.transformer.{path}" for path in T5_PATHS]
    tensors, expected = made(lora_kinds.KINDS[kind], before, "text_encoders.", layers)
    file = save(tensors)
    _, patched = apply(sd15[0], t5, file)
    check(before, weights_of(patched.patcher), expected)
    assert "lora_te1_encoder_block_0_layer_0_SelfAttention_q" in {key.split(".")[0] for key in load_file(file)}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA, outputs"])
def test_diffusers_files_come_back_through_apply_lora(request, clips, lora_kinds, save, family, kind):
    model, _ = request.getfixturevalue(family)
    name, encoders = TEXT_LAYERS[family]
    clip, make = clips[name], lora_kinds.KINDS[kind]
    before, text_before = weights_of(model), weights_of(clip.patcher)
    layers = [*UNET_LAYERS[family], POINTS[family], *CONVOLUTIONS[family]]
    tensors, expected = made(make, before, "", [UNET + layer for layer in layers])
    tensors[f"{UNET}{layers[0]}.alpha"] = torch.tensor(lora_kinds.ALPHA)
    text = [f"{encoder}.transformer.{path}" for encoder in encoders for path in TEXT_PATHS]
    text_tensors, text_expected = made(make, text_before, "text_encoders.", text, seed=500)
    file = save(tensors | text_tensors, "diffusers")
    patched, patched_clip = apply(model, clip, file)
    check(before, weights_of(patched), expected)
    check(text_before, weights_of(patched_clip.patcher), text_expected)


def test_every_layer_of_either_unet_has_a_name_that_comfyui_knows(request, save):
    """LoRAs of rank 1 on all weights with two axes or more; stock keys are all used."""
    import comfy.lora

    for family in ("sd15", "sdxl"):
        model, _ = request.getfixturevalue(family)
        shapes = {k: v.shape for k, v in model.model.state_dict().items() if k.startswith(UNET) and v.ndim > 1}
        tensors = {}
        for name, shape in shapes.items():
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.lora_down.weight"] = torch.ones(1, *shape[1:])
            tensors[f"{layer}.lora_up.weight"] = torch.ones(shape[0], 1, *(1 for _ in shape[2:]))
        stored = load_file(save(tensors))
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        found = {keys[name.split(".")[0]] for name in stored}
        assert found == set(shapes)
        styles = {"down_blocks" in name for name in stored if "_blocks_1_" in name and "mid" not in name}
        assert (True in styles) == (family == "sd15")


def test_core_train_loras_keys_are_saved(sd15, save):
    """As ComfyUI's Train LoRA names things: norms and biases are full differences."""
    model, _ = sd15
    before = weights_of(model)
    norm, bias = f"{UNET}input_blocks.1.0.in_layers.0.weight", f"{UNET}input_blocks.1.0.in_layers.2.bias"
    tensors = {
        f"{norm.removesuffix('.weight')}.diff": torch.ones(before[norm].shape),
        f"{bias.removesuffix('.bias')}.diff_b": torch.ones(before[bias].shape),
    }
    patched, _ = load_stock(model, None, save(tensors))
    check(before, weights_of(patched), {norm: before[norm] + 1, bias: before[bias] + 1})


def test_metadata_of_a_run(sd15, lora_kinds, save, tmp_path):
    from dataclasses import asdict

    from retune.training.config.run import TrainModelConfig
    from retune.training.config.training_settings import TrainingSettings
    from retune.training.data.images import save_png

    config = asdict(
        TrainModelConfig(run_name="my run", learning_rate=3e-4, settings=TrainingSettings(precision="bf16"))
    )
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"identity": {"kind": "lora"}, "config": config, "prediction_type": "epsilon"})
    )
    for name, value in (("000010_00", 0.1), ("000200_00", 0.9), ("000200_01", 0.5), ("000200_grid", 0.2)):
        save_png(torch.full((3, 96, 64), value), run / "samples" / f"{name}.png")
    tensors, _ = made(lora_kinds.lora, weights_of(sd15[0]), "", [UNET + layer for layer in UNET_LAYERS["sd15"]])
    file = save(tensors, run=run, trigger_words=" sks cat ", dtype="bf16")
    with safe_open(file, "pt") as opened:
        data = opened.metadata()
        dtypes = {name.split(".", 1)[1]: opened.get_tensor(name).dtype for name in opened.keys()}
    assert dtypes == {"alpha": torch.float32, "lora_down.weight": torch.bfloat16, "lora_up.weight": torch.bfloat16}
    expected = {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "3", "ss_network_alpha": "1.5", "ss_network_args": "{}", "ss_output_name": "my run",
        "ss_learning_rate": "0.0003", "ss_mixed_precision": "bf16", "ss_min_snr_gamma": "5.0", "ss_loss_type": "l2",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "my run", "modelspec.resolution": "512x512",
        "modelspec.trigger_phrase": "sks cat", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {key: data.get(key) for key in expected} == expected
    assert data["modelspec.hash_sha256"] == "0x" + data["sshs_model_hash"]
    head, _, body = data["modelspec.thumbnail"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/jpeg;base64" and picture.size == (64, 96)
    assert abs(picture.getpixel((10, 10))[0] - 0.9 * 255) < 3


@pytest.mark.parametrize(
    "prefix, named", [("retune/lora", "retune/a run_0"), (" ", "retune/a run_0"), ("mine", "mine_0")]
)
def test_a_file_is_called_as_its_run_and_shown_with_its_size(sd15, lora_kinds, tmp_path, prefix, named):
    from retune.nodes.save_lora import RetuneSaveLora

    tensors, _ = made(lora_kinds.lora, weights_of(sd15[0]), "", [UNET + layer for layer in UNET_LAYERS["sd15"]])
    output = RetuneSaveLora.execute(tensors, "kohya", prefix, run=tmp_path / "a run")
    path = Path(output.result[0])
    assert f"/loras/{named}" in path.as_posix()
    assert output.ui["text"][:2] == [str(path), f"{path.name}: {path.stat().st_size / 1024:.1f} KB"]
    assert f"/loras/{named}" in RetuneSaveLora.execute(tensors, "kohya", named[:-2]).result[0].replace("\\", "/")


def test_the_node_refuses_what_leaves_its_folder_and_what_does_not_fit(sd15, lora_kinds, save):
    from retune.nodes.save_lora import RetuneSaveLora

    tensors, _ = made(lora_kinds.loha, weights_of(sd15[0]), "", [UNET + layer for layer in UNET_LAYERS["sd15"]])
    with pytest.raises(ValueError, match=r"filename_prefix is '\.\./x'"):
        RetuneSaveLora.execute(tensors, "kohya", "../x")
    with pytest.raises(ValueError, match="it is LoHa, and diffusers' format holds LoRA and DoRA alone.*resize-lora"):
        save(tensors, "diffusers")
