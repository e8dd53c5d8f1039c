"""LoRA files that are written: names, metadata, hashes, and what diffusers and peft make of them."""

import hashlib
import json
import struct
from copy import deepcopy

import numpy as np
import pytest
import torch
from retune.training.common.foreign import read_tensors
from retune.training.formats.lora import parse_lora, read_lora
from retune.training.formats.lora_difference import delta_weight
from retune.training.formats.lora_metadata import THUMBNAIL_BYTES, LoraDescription, tag_frequency, thumbnail_uri
from retune.training.formats.lora_names import Naming, detect_naming
from retune.training.formats.lora_save import save_lora
from retune.training.models import ldm

UNET, TEXT = "diffusion_model.", "text_encoders."
SD15 = {
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "input_blocks.8.1.proj_in": "down_blocks_2_attentions_1_proj_in",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
    "output_blocks.3.1.transformer_blocks.0.attn2.to_out.0":
        "up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
    "output_blocks.11.0.in_layers.2": "up_blocks_3_resnets_2_conv1",
    "output_blocks.2.1.conv": "up_blocks_0_upsamplers_0_conv",
    "input_blocks.6.0.op": "down_blocks_1_downsamplers_0_conv",
    "input_blocks.4.0.emb_layers.1": "down_blocks_1_resnets_0_time_emb_proj",
    "time_embed.0": "time_embedding_linear_1",
    "input_blocks.0.0": "conv_in",
}  # fmt: skip


def pair(layer, rank=2, rows=8, columns=6):
    return {f"{layer}.lora_down.weight": torch.ones(rank, columns), f"{layer}.lora_up.weight": torch.ones(rows, rank)}


def loras(*layers, **sizes):
    tensors = {}
    for layer in layers:
        tensors |= pair(layer, **sizes)
    return parse_lora("x", tensors)


# --- names ------------------------------------------------------------------------------------------------------------


def test_sd15_names_are_diffusers_with_underscores_and_come_back():
    naming = Naming.from_family("SD1.x")
    for path, name in SD15.items():
        assert naming.kohya_name(UNET + path) == "lora_unet_" + name
        assert naming.comfyui_name("lora_unet_" + name) == UNET + path
        component, dotted = naming.diffusers_path(UNET + path)
        assert component == "unet" and dotted.replace(".", "_") == name
        assert naming.comfyui_name(f"unet.{dotted}") == UNET + path


def test_sdxl_names_are_the_original_ones():
    naming = Naming.from_family("SDXL")
    for path in ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "output_blocks.2.2.conv", "label_emb.0.2"):
        assert naming.kohya_name(UNET + path) == "lora_unet_" + path.replace(".", "_")
        assert naming.comfyui_name(naming.kohya_name(UNET + path)) == UNET + path
    path = "output_blocks.5.2.conv"
    assert naming.diffusers_path(UNET + path) == ("unet", "up_blocks.1.upsamplers.0.conv")
    assert naming.comfyui_name("unet.up_blocks.1.upsamplers.0.conv") == UNET + path


CLIP = "text_model.encoder.layers.3.self_attn.q_proj"
T5 = "encoder.block.1.layer.1.DenseReluDense.wi_0"


@pytest.mark.parametrize(
    ("family", "layer", "kohya", "diffusers"),
    [
        ("SD1.x", f"clip_l.transformer.{CLIP}", "lora_te_", f"text_encoder.{CLIP}"),
        ("SD2.x", f"clip_h.transformer.{CLIP}", "lora_te_", f"text_encoder.{CLIP}"),
        ("SDXL", f"clip_l.transformer.{CLIP}", "lora_te1_", f"text_encoder.{CLIP}"),
        ("SDXL", f"clip_g.transformer.{CLIP}", "lora_te2_", f"text_encoder_2.{CLIP}"),
        ("SD1.x", f"t5base.transformer.{T5}", "lora_te1_", None),
        ("SD1.x", f"clip_l.transformer.{CLIP.replace('self_attn.q_proj', 'layer_norm1')}", None, None),
    ],
)
def test_text_encoders(family, layer, kohya, diffusers):
    naming = Naming.from_family(family)
    path = layer.partition(".transformer.")[2].replace(".", "_")
    assert naming.kohya_name(TEXT + layer) == (kohya and kohya + path)
    assert naming.diffusers_path(TEXT + layer) == (diffusers and tuple(diffusers.split(".", 1)))
    if kohya:
        for name in {kohya + path, diffusers or f"text_encoder.{T5}"}:
            assert naming.comfyui_name(name) == (TEXT + layer).replace("t5base", "t5")


def test_the_layout_of_an_odd_unet_is_found_in_its_layers():
    """The demo model's: one layer per block, attention in the two coarser of three resolutions."""
    config = {
        "block_out_channels": (64, 96, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 128,
    }
    names = ldm.unet_names(config)
    layers = [f"{UNET}{name}.proj_in" for name, path in names.items() if "attentions" in path]
    assert len(layers) == 7
    for naming in (detect_naming(loras(*layers)), detect_naming(loras(*layers), unet_config=config)):
        assert (naming.family, naming.layers_per_block) == ("", 1)
        for layer in layers:
            expected = names[layer.removeprefix(UNET).removesuffix(".proj_in")].replace(".", "_")
            assert naming.kohya_name(layer) == f"lora_unet_{expected}_proj_in"


@pytest.mark.parametrize(
    ("layers", "family"),
    [
        ([f"{UNET}input_blocks.1.1.proj_in"], "SD1.x"),
        ([f"{UNET}output_blocks.11.0.in_layers.2"], "SD1.x"),
        ([f"{UNET}output_blocks.0.1.proj_in"], "SDXL"),
        ([f"{UNET}input_blocks.7.1.transformer_blocks.9.ff.net.2"], "SDXL"),
        ([f"{UNET}middle_block.1.proj_in", f"{TEXT}clip_g.transformer.{CLIP}"], "SDXL"),
        ([f"{UNET}middle_block.1.proj_in", f"{TEXT}clip_h.transformer.{CLIP}"], "SD2.x"),
        ([f"{UNET}middle_block.1.proj_in"], ""),
        ([f"{TEXT}clip_l.transformer.{CLIP}"], "SD1.x"),
        ([f"{TEXT}t5base.transformer.{T5}"], ""),
        (["lora_unet_up_blocks_3_attentions_0_proj_in", "lora_unet_down_blocks_0_attentions_1_proj_in"], "SD1.x"),
    ],
)
def test_the_family_is_told_by_the_layers(layers, family):
    assert detect_naming(loras(*layers)).family == family
    assert detect_naming(loras(*layers), "SDXL").family == "SDXL"


@pytest.mark.parametrize(("width", "family"), [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL")])
def test_or_by_the_width_of_cross_attention(width, family):
    layer = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    assert detect_naming(loras(layer, columns=width)).family == family


def test_a_base_that_the_layers_contradict_is_refused():
    with pytest.raises(ValueError, match="a UNet of 2 layers per block .SD1.x. lacks.*Choose the base"):
        detect_naming(loras(f"{UNET}input_blocks.3.1.proj_in"), "SD1.x")
    with pytest.raises(ValueError, match="base is 'SD3'; expected auto, SD1.x"):
        detect_naming(loras("x"), "SD3")


# --- diffusers and peft -----------------------------------------------------------------------------------------------


BOTH = ("input_blocks.3.0.op", "output_blocks.4.0.in_layers.2", "middle_block.0.emb_layers.1")
FAMILY_LAYERS = {
    "sd15_unet": ("input_blocks.1.1.transformer_blocks.0.attn2.to_k", "output_blocks.5.1.proj_out", *BOTH)
    + ("output_blocks.2.1.conv",),
    "sdxl_unet": ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", "output_blocks.2.1.proj_out", *BOTH)
    + ("input_blocks.8.1.transformer_blocks.1.ff.net.2", "output_blocks.2.2.conv", "output_blocks.8.0.skip_connection"),
}
PATHS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1", "encoder.layers.1.self_attn.out_proj"]


@pytest.fixture
def text_encoders():
    """A small CLIP-L and CLIP-G of random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
        first = CLIPTextModel(CLIPTextConfig(hidden_size=32, projection_dim=32, **small))
        second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=64, projection_dim=64, **small))
    return first.eval(), second.eval()


def trained(make, unet, texts, family, seed=0):
    """(LORA_MODEL, the parts, component -> module's name -> its weight); the second layer has an alpha of its own."""
    names = ldm.unet_names(unet.config)
    parts = {"unet": unet, "text_encoder": texts[0]} | ({"text_encoder_2": texts[1]} if family == "sdxl_unet" else {})
    layers = [("unet", ldm.rename(layer, names), UNET + layer) for layer in FAMILY_LAYERS[family]]
    for component, encoder in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        if component in parts:
            layers += [(component, path, f"{TEXT}{encoder}.transformer.text_model.{path}") for path in PATHS]
    tensors, expected = {}, {name: {} for name in parts}
    for number, (component, path, layer) in enumerate(layers):
        module = dict(parts[component].named_modules())
        path = path if path in module else f"text_model.{path}"
        weight = module[path].weight.detach()
        roles, result = make(weight.shape, seed + 10 * number)
        if number == 1 and "dora_scale" not in roles:
            roles, result = scaled(roles, weight, result)
        tensors |= {f"{layer}.{role}": value for role, value in roles.items()}
        expected[component][path] = result(weight)
    return tensors, parts, expected


def scaled(roles, weight, result):
    """Twice the alpha, so twice the change."""
    return roles | {"alpha": roles["alpha"] * 2}, lambda w: 2 * result(w) - w


def pipeline(parts):
    """A diffusers pipeline of copies, without tokenizers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    small = {"block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",)}
    vae = AutoencoderKL(up_block_types=("UpDecoderBlock2D",), latent_channels=4, **small)
    parts = {name: deepcopy(part) for name, part in parts.items()} | {"vae": vae, "scheduler": DDIMScheduler()}
    if "text_encoder_2" in parts:
        return StableDiffusionXLPipeline(tokenizer=None, tokenizer_2=None, **parts)
    return StableDiffusionPipeline(tokenizer=None, safety_checker=None, feature_extractor=None, **parts)


def loaded_by_diffusers(file, parts):
    """Component -> module's name -> merged weight, through load_lora_weights."""
    pipe = pipeline(parts)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return {component: merged(getattr(pipe, component)) for component in parts}


def merged(network):
    """Name of each module that peft has put an adapter on -> its weight with the adapter merged."""
    found = {name: module for name, module in network.named_modules() if hasattr(module, "merge")}
    for module in found.values():
        module.merge()
    return {name: module.base_layer.weight.detach() for name, module in found.items()}


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("family", ["sd15_unet", "sdxl_unet"])
@pytest.mark.parametrize(
    ("kind", "format"),
    [("LoRA", "diffusers"), ("LoRA", "kohya"), ("flat LoRA", "diffusers"), ("DoRA, outputs", "diffusers")],
)
def test_diffusers_loads_the_weights_worked_out_by_hand(
    request, lora_kinds, text_encoders, tmp_path, family, kind, format
):
    unet = request.getfixturevalue(family)
    tensors, parts, expected = trained(lora_kinds.KINDS[kind], unet, text_encoders, family)
    save_lora(tmp_path / "x.safetensors", tensors, format)
    found = loaded_by_diffusers(tmp_path / "x.safetensors", parts)
    for component, weights in expected.items():
        check(found[component], weights)


def test_a_plain_peft_model_takes_the_unets_part(sd15_unet, lora_kinds, text_encoders, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    tensors, _, expected = trained(lora_kinds.lora, sd15_unet, text_encoders, "sd15_unet")
    save_lora(tmp_path / "x.safetensors", tensors, "diffusers")
    stored, data = read_tensors(tmp_path / "x.safetensors")
    settings = json.loads(data["lora_adapter_metadata"])
    of_unet = {key.removeprefix("unet."): value for key, value in settings.items() if key.startswith("unet.")}
    network = inject_adapter_in_model(LoraConfig(**of_unet), deepcopy(sd15_unet))
    weights = {key.removeprefix("unet."): value for key, value in stored.items() if key.startswith("unet.")}
    assert not set_peft_model_state_dict(network, weights).unexpected_keys
    check(merged(network), expected["unet"])


def test_patterns_that_begin_with_a_caret_are_read():
    """As diffusers itself writes ranks and alphas that differ from the rest."""
    settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"^mid.to_v": 5}}
    tensors = pair("unet.mid.to_q") | pair("unet.mid.to_v")
    lora = parse_lora("x", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert [lora.modules[f"unet.mid.{n}"].alpha for n in ("to_q", "to_v")] == [2, 5]


REFUSED = {
    "LoHa": "it is LoHa, and diffusers' format holds LoRA and DoRA alone",
    "LoKr": "it is LoKr",
    "full": "it is full diff",
    "DoRA, inputs": "its DoRA has a magnitude per input, and peft knows one per output alone",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_diffusers_cannot_express_is_refused_before_anything_is_written(lora_kinds, tmp_path, kind):
    roles, _ = lora_kinds.KINDS[kind](torch.Size((16, 8)), 0)
    layer = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    with pytest.raises(ValueError, match=f"{layer}: {REFUSED[kind]}.*Save it as kohya"):
        save_lora(tmp_path / "x.safetensors", {f"{layer}.{role}": v for role, v in roles.items()}, "diffusers")
    assert not list(tmp_path.iterdir())


def test_other_layers_that_diffusers_lacks_are_refused(lora_kinds, tmp_path):
    plain, layer = pair(f"{UNET}middle_block.1.proj_out"), f"{UNET}middle_block.1.proj_in"
    dora = {f"{layer}.{role}": value for role, value in lora_kinds.dora(0)(torch.Size((16, 8, 1, 1)), 0)[0].items()}
    for tensors, message in (
        (pair(f"{UNET}double_blocks.0.img_attn.qkv"), "diffusers' loader takes no such layer"),
        (pair(f"{TEXT}t5xxl.transformer.{T5}"), "diffusers' loader takes no such layer"),
        (pair(layer) | {f"{layer}.diff_b": torch.ones(8)}, "it has diff_b"),
        (plain | dora, "DoRA in a part of its layers"),
    ):
        with pytest.raises(ValueError, match=message):
            save_lora(tmp_path / "x.safetensors", tensors, "diffusers")


def test_a_tucker_core_is_multiplied_out(lora_kinds, tmp_path):
    shape, layer = torch.Size((16, 8, 3, 3)), f"{UNET}input_blocks.1.0.in_layers.2"
    roles, result = lora_kinds.tucker(shape, 0)
    save_lora(tmp_path / "x.safetensors", {f"{layer}.{role}": value for role, value in roles.items()}, "diffusers")
    module = read_lora(tmp_path / "x.safetensors").modules["unet.down_blocks.0.resnets.0.conv1"]
    assert module.kind == "LoCon" and module.alpha == lora_kinds.ALPHA
    torch.testing.assert_close(delta_weight(module).reshape(shape), result(torch.zeros(shape)), atol=1e-6, rtol=1e-5)


# --- files and metadata -----------------------------------------------------------------------------------------------


def test_alpha_is_written_out_and_stays_fp32(tmp_path):
    layer = f"{UNET}input_blocks.1.1.proj_in"
    for dtype in ("fp32", "fp16", "bf16"):
        save_lora(tmp_path / "x.safetensors", pair(layer) | {f"{layer}.alpha": torch.tensor([0.3])}, dtype=dtype)
        save_lora(tmp_path / "y.safetensors", pair(layer), dtype=dtype)
        for file, alpha in (("x", 0.3), ("y", 2.0)):
            stored, _ = read_tensors(tmp_path / f"{file}.safetensors")
            found = stored["lora_unet_down_blocks_0_attentions_0_proj_in.alpha"]
            assert found.dtype == torch.float32 and found.shape == () and found == torch.tensor(alpha)


def test_numbers_that_fp16_lacks_are_refused_or_named(tmp_path, caplog):
    layer = f"{UNET}input_blocks.1.1.proj_in"
    with pytest.raises(ValueError, match="holds 1e.05; fp16 ends at 65504"):
        save_lora(tmp_path / "x.safetensors", {k: v * 1e5 for k, v in pair(layer).items()}, dtype="fp16")
    assert not list(tmp_path.iterdir())
    (warning,) = save_lora(tmp_path / "x.safetensors", {k: v * 1e-9 for k, v in pair(layer).items()}, dtype="fp16")
    assert "too small for float16" in warning and warning in caplog.text
    assert not save_lora(tmp_path / "x.safetensors", {k: v * 1e5 for k, v in pair(layer).items()}, dtype="bf16")


def test_layers_without_a_kohya_name_keep_theirs_with_a_warning(tmp_path):
    norm = f"{TEXT}clip_l.transformer.text_model.encoder.layers.0.layer_norm1"
    (warning,) = save_lora(tmp_path / "x.safetensors", {f"{norm}.diff": torch.ones(8)})
    assert f"no name for {norm}" in warning and f"{norm}.diff" in read_tensors(tmp_path / "x.safetensors")[0]


def test_what_is_left_out_or_guessed_is_said(tmp_path):
    layer = f"{UNET}middle_block.1.proj_in"
    warnings = save_lora(tmp_path / "x.safetensors", pair(layer) | {"bundle_emb.cat": torch.ones(4)})
    assert [warning.split(";")[0].split(":")[0] for warning in warnings] == [
        "left out bundle_emb.cat",
        "its layers are as well SD1.x's as SDXL's",
    ]
    assert "lora_unet_mid_block_attentions_0_proj_in.alpha" in read_tensors(tmp_path / "x.safetensors")[0]
    assert not save_lora(tmp_path / "x.safetensors", pair(layer), base="SDXL")
    assert "lora_unet_middle_block_1_proj_in.alpha" in read_tensors(tmp_path / "x.safetensors")[0]
    with pytest.raises(ValueError, match="two layers for lora_unet_mid_block_attentions_0_proj_in"):
        save_lora(tmp_path / "x.safetensors", pair(layer) | pair("unet.mid_block.attentions.0.proj_in"))


def test_other_models_keep_their_names_with_underscores(tmp_path):
    assert not save_lora(tmp_path / "x.safetensors", pair(f"{UNET}double_blocks.0.img_attn.qkv"))
    stored, data = read_tensors(tmp_path / "x.safetensors")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in stored
    assert (data["modelspec.architecture"], data["ss_base_model_version"]) == ("unknown/lora", "unknown")


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_hashes_are_those_that_other_programs_compute(tmp_path, format):
    """Over the file itself: sha256 after the header; and of what lies from 1 MiB on, for a header of ss_* alone."""
    layer = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    random = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(v.shape, generator=random) for key, v in pair(layer, 64, 3000, 3000).items()}
    save_lora(tmp_path / "x.safetensors", tensors, format, description=LoraDescription(title="t", trigger_words="w"))
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    about = header.pop("__metadata__")
    assert about["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert about["modelspec.hash_sha256"] == "0x" + about["sshs_model_hash"]
    training = {key: value for key, value in about.items() if key.startswith("ss_")}
    assert {"ss_network_dim", "ss_base_model_version"} <= training.keys() and len(training) < len(about)
    packed = json.dumps({"__metadata__": training, **header}, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    old = struct.pack("<Q", len(packed)) + packed + body
    assert about["sshs_legacy_hash"] == hashlib.sha256(old[0x100000:0x110000]).hexdigest()[:8]


def test_metadata_is_a_function_of_its_arguments(tmp_path):
    about = LoraDescription(title="A", date="2026-01-02T03:04:05+00:00", trigger_words="sks", thumbnail="data:x")
    layer = f"{UNET}output_blocks.0.1.transformer_blocks.0.attn2.to_k"
    found = []
    for _ in range(2):
        save_lora(tmp_path / "x.safetensors", pair(layer, columns=2048), description=about)
        found.append(read_tensors(tmp_path / "x.safetensors")[1])
    assert found[0] == found[1]
    spec = {key.removeprefix("modelspec."): value for key, value in found[0].items() if key.startswith("modelspec.")}
    spec.pop("hash_sha256")
    assert spec == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "A",
        "resolution": "1024x1024",
        "date": "2026-01-02T03:04:05+00:00",
        "trigger_phrase": "sks",
        "usage_hint": "Trigger words: sks",
        "thumbnail": "data:x",
    }


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("LoRA", "networks.lora", {}),
        ("LoHa", "lycoris.kohya", {"algo": "loha"}),
        ("LoKr", "lycoris.kohya", {"algo": "lokr"}),
        ("full", "lycoris.kohya", {"algo": "full"}),
        ("DoRA, inputs", "lycoris.kohya", {"algo": "locon", "dora_wd": True, "wd_on_output": False}),
        ("DoRA, outputs", "lycoris.kohya", {"algo": "locon", "dora_wd": True, "wd_on_output": True}),
    ],
)
def test_the_network_is_described_as_kohya_does(lora_kinds, tmp_path, kind, module, arguments):
    layer = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    roles, _ = lora_kinds.KINDS[kind](torch.Size((16, 16)), 0)
    convolution, _ = lora_kinds.lora(torch.Size((16, 8, 3, 3)), 0)
    tensors = {f"{layer}.{role}": value for role, value in roles.items()}
    save_lora(tmp_path / "x.safetensors", tensors)
    data = read_tensors(tmp_path / "x.safetensors")[1]
    assert (data["ss_network_module"], json.loads(data["ss_network_args"])) == (module, arguments)
    dimensions = (data.get("ss_network_dim"), data.get("ss_network_alpha"))
    assert dimensions == ((None, None) if kind == "full" else ("3", "1.5"))
    tensors |= {f"{UNET}input_blocks.1.0.in_layers.2.{role}": value for role, value in convolution.items()}
    save_lora(tmp_path / "x.safetensors", tensors)
    data = read_tensors(tmp_path / "x.safetensors")[1]
    assert json.loads(data["ss_network_args"]).items() >= {"conv_dim": "3", "conv_alpha": "1.5"}.items()


def test_tags_are_counted_as_kohya_counts_them():
    assert tag_frequency(["Cat, red ,cat", "cat,,dog"], "10_x") == {"10_x": {"cat": 3, "dog": 1, "red": 1}}


def test_a_thumbnail_is_small_whatever_the_picture(tmp_path):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (512, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    uri = thumbnail_uri(tmp_path / "noise.png")
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) <= THUMBNAIL_BYTES
