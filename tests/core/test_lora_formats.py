"""LoRA files: keys, layers, ranks, alphas, what is refused, block weights, reports."""

import json
import math

import pytest
import torch
from retune.training.formats.lora import dora_axis, parse_lora, read_lora
from retune.training.formats.lora_blocks import block_names, block_weights
from retune.training.formats.lora_keys import kohya_aliases, split_key
from retune.training.formats.lora_report import LoraReport, base_of_lora, kinds_of, layout_of
from safetensors.torch import save_file

LAYER = "lora_unet_mid_block_attentions_0_proj_in"


def pair(layer=LAYER, rank=4, rows=8, columns=6, down=".lora_down.weight", up=".lora_up.weight"):
    return {layer + down: torch.ones(rank, columns), layer + up: torch.ones(rows, rank)}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_a_b.lora_down.weight", ("lora_unet_a_b", "lora_down.weight")),
        ("lora_te1_x.alpha", ("lora_te1_x", "alpha")),
        ("unet.a.to_q.lora_A.weight", ("unet.a.to_q", "lora_down.weight")),
        ("unet.a.to_q.lora_B.default.weight", ("unet.a.to_q", "lora_up.weight")),
        ("unet.a.processor.to_q_lora.up.weight", ("unet.a.processor.to_q", "lora_up.weight")),
        ("text_encoder.q_proj.lora_linear_layer.down.weight", ("text_encoder.q_proj", "lora_down.weight")),
        ("unet.a.lora.down.weight", ("unet.a", "lora_down.weight")),
        ("unet.a.lora_magnitude_vector", ("unet.a", "dora_scale")),
        ("diffusion_model.out.2.diff_b", ("diffusion_model.out.2", "diff_b")),
        ("lora_unet_a.hada_w1_a", ("lora_unet_a", "hada_w1_a")),
        ("model.diffusion_model.out.2.weight", ("model.diffusion_model.out.2.weight", None)),
        ("bundle_emb.cat.alpha", ("bundle_emb.cat.alpha", None)),
    ],
)
def test_keys_are_split_into_layer_and_part(key, expected):
    assert split_key(key) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("unet.mid_block.attn1.to_out.0", "lora_unet_mid_block_attn1_to_out_0"),
        ("unet.mid_block.attn1.processor.to_out", "lora_unet_mid_block_attn1_to_out_0"),
        ("unet.input_blocks.1.1.proj_in", "lora_unet_input_blocks_1_1_proj_in"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder_2.encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        ("base_model.model.down_blocks.0.x", "lora_unet_down_blocks_0_x"),
        ("lycoris_down_blocks_0_x", "lora_unet_down_blocks_0_x"),
    ],
)
def test_other_tools_names_are_known_by_kohyas(layer, expected):
    assert next(kohya_aliases(layer)) == layer and expected in kohya_aliases(layer)
    assert list(kohya_aliases("lora_unet_x")) == ["lora_unet_x"]


def test_layers_know_kind_rank_alpha_and_shape():
    tensors = pair() | {f"{LAYER}.alpha": torch.tensor(2.0)}
    module = parse_lora("a", tensors).modules[LAYER]
    assert (module.kind, module.rank, module.alpha, module.shape) == ("LoRA", 4, 2.0, (8, 6))
    conv = {f"{LAYER}.lora_down.weight": torch.ones(2, 5, 3, 3), f"{LAYER}.lora_up.weight": torch.ones(8, 2, 1, 1)}
    module = parse_lora("a", conv | {f"{LAYER}.dora_scale": torch.ones(8)}).modules[LAYER]
    assert (module.kind, module.rank, module.alpha, module.shape) == ("LoCon with DoRA", 2, None, (8, 45))
    assert module.tensors["dora_scale"].shape == (8, 1)


def test_magnitudes_say_their_axis():
    assert dora_axis(torch.ones(8, 1), (8, 8)) == 0 and dora_axis(torch.ones(1, 8), (8, 8)) == 1
    assert dora_axis(torch.ones(8, 1, 1, 1), (8, 5, 3, 3)) == 0 and dora_axis(torch.ones(1, 5, 1, 1), (8, 5, 3, 3)) == 1
    assert dora_axis(torch.ones(1, 8, 1, 1), (8, 5, 3, 3)) == 0  # peft's convolution, renamed by diffusers' converter
    with pytest.raises(ValueError, match="7 numbers; expected 8 outputs or .5,. inputs"):
        dora_axis(torch.ones(7), (8, 5))


def test_pefts_alpha_comes_from_the_metadata():
    names = {n: f"unet.mid.{n}" for n in ("to_q", "to_v")} | {"text": "text_encoder.fc1"}
    tensors = {}
    for name in names.values():
        tensors |= pair(name, down=".lora_A.weight", up=".lora_B.weight")
    settings = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_v": 3}, "text_encoder.lora_alpha": 5}
    settings |= {"text_encoder.use_rslora": True}
    modules = parse_lora("a", tensors, {"lora_adapter_metadata": json.dumps(settings)}).modules
    assert [modules[names[n]].alpha for n in ("to_q", "to_v")] == [6, 3]
    assert modules[names["text"]].alpha == pytest.approx(5 * math.sqrt(4))
    assert parse_lora("a", tensors).modules[names["to_q"]].alpha is None
    with pytest.raises(ValueError, match="lora_adapter_metadata is damaged .not JSON"):
        parse_lora("a", tensors, {"lora_adapter_metadata": "{"})


def test_a_peft_folder_brings_its_settings(tmp_path):
    save_file(
        pair("base_model.model.mid.to_q", down=".lora_A.weight", up=".lora_B.weight"),
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 9, "r": 4}')
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    assert lora.modules["base_model.model.mid.to_q"].alpha == 9 and layout_of(lora) == "peft"
    with pytest.raises(FileNotFoundError):
        read_lora(tmp_path / "gone.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.lora_up.weight": None}, f"layer {LAYER} lacks lora_up.weight"),
        ({f"{LAYER}.lora_up.weight": torch.ones(8, 3)}, "whose ranks differ"),
        ({f"{LAYER}.lora_up.weight": torch.ones(8)}, "whose ranks differ"),
        ({f"{LAYER}.lora_mid.weight": torch.ones(4, 3, 3, 3)}, "its core is"),
        ({f"{LAYER}.lora_up.weight": torch.full((8, 4), math.nan)}, f"NaN or infinity in {LAYER}.lora_up.weight"),
        ({f"{LAYER}.alpha": torch.tensor(math.inf)}, f"NaN or infinity in {LAYER}.alpha"),
        ({f"{LAYER}.alpha": torch.ones(2)}, "alpha of"),
        ({f"{LAYER}.hada_w1_a": torch.ones(8, 4)}, "lacks hada_w1_b"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "lacks lokr_w2_a"),
        ({f"{LAYER}.diff": torch.ones(8, 6)}, "two kinds"),
    ],
)
def test_what_is_no_whole_lora_is_refused(change, message):
    tensors = {name: value for name, value in (pair() | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
        parse_lora("a.safetensors", tensors)


def test_float8_files_are_read():
    lora = parse_lora("a", {name: value.to(torch.float8_e4m3fn) for name, value in pair().items()})
    assert lora.modules[LAYER].shape == (8, 6)


UNETS = {
    "SD1.x": ([1, 2, 4, 5, 7, 8], 12, [3, 4, 5, 6, 7, 8, 9, 10, 11], 17, 26),
    "SDXL": ([4, 5, 7, 8], 9, [0, 1, 2, 3, 4, 5], 12, 20),
}


def unet_names(family):
    inputs, count, outputs, *_ = UNETS[family]
    names = ["diffusion_model.time_embed.0.weight", "diffusion_model.middle_block.1.transformer_blocks.0.x.weight"]
    for side, attention in (("input", inputs), ("output", outputs)):
        names += [f"diffusion_model.{side}_blocks.{i}.0.weight" for i in range(count)]
        names += [f"diffusion_model.{side}_blocks.{i}.1.transformer_blocks.0.x.weight" for i in attention]
    return names


@pytest.mark.parametrize("family", UNETS)
def test_block_lists_have_the_lengths_users_know(family):
    names = unet_names(family)
    *_, short, full = UNETS[family]
    assert 1 + len(block_names(names, with_attention=True)) == short and 1 + len(block_names(names)) == full
    for length in (short, full):
        weights = block_weights(",".join(str(i) for i in range(length)), names)
        assert weights.weight_for("clip_l.transformer.x.weight") == weights.weight_for(names[0]) == 0
        last = f"diffusion_model.output_blocks.{UNETS[family][2][-1]}.1.transformer_blocks.0.x.weight"
        listed = block_names(names, with_attention=length == short)
        assert weights.weight_for(last) == 1 + listed.index(f"OUT{UNETS[family][2][-1]:02}")
        assert weights.weight_for(names[1]) == 1 + listed.index("M00")
        assert weights.weight_for("diffusion_model.input_blocks.0.0.weight") == (0 if length == short else 1)
    with pytest.raises(ValueError, match=rf"has {short + 1} numbers; expected {short} .* or {full}"):
        block_weights("1," * short + "1", names)


def test_expressions_count_in_order_and_the_rest_is_1():
    names = unet_names("SD1.x")
    weights = block_weights("input_blocks\\.4\\.=0.5\n\ninput_blocks=2; attn9=3", names)
    assert weights.weight_for("diffusion_model.input_blocks.4.0.weight") == 0.5
    assert weights.weight_for("diffusion_model.input_blocks.11.0.weight") == 2 and weights.weight_for("middle") == 1
    assert weights.unmatched(names) == ["attn9"] and block_weights(" ", names).weight_for("x") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,a,1", "has 'a'; expected a number"),
        ("in=nan", "has 'nan'; expected a number"),
        ("(=1", "not a regular expression"),
        ("attn=1\n(a{999}){999}=1", "repetitions"),
        ("a=1\nb", "has the line 'b'; expected regex=weight"),
    ],
)
def test_block_weights_that_mean_nothing_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        block_weights(text, unet_names("SD1.x"))
    with pytest.raises(ValueError, match="no input_blocks; expected lines"):
        block_weights("1,1", ["diffusion_model.double_blocks.0.img_attn.qkv.weight"])


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD1.x"),
        ({"ss_base_model_version": "sd_1.5"}, "SD1.x"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_base_model_version": "sd_v1"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD2.x"),
        ({"ss_v2": "True"}, "SD2.x"),
        ({"ss_v2": "False"}, ""),
        ({"modelspec.architecture": "unknown/lora", "ss_base_model_version": "unknown"}, ""),
        ({"ss_base_model_version": "flux1"}, "flux1"),
    ],
)
def test_the_base_is_told_by_metadata(metadata, family):
    assert base_of_lora(parse_lora("a", pair(), metadata)).family == family


@pytest.mark.parametrize(("width", "family"), [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL"), (640, "")])
def test_or_by_the_width_of_cross_attention(width, family):
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert base_of_lora(parse_lora("a", pair(layer, columns=width))).family == family


def test_the_report_says_what_the_file_is_and_what_became_of_it():
    tensors = pair() | pair("lora_te_text_model_x") | {f"{LAYER}.alpha": torch.tensor(2.0), "note": torch.ones(1)}
    lora = parse_lora("a.safetensors", tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert (layout_of(lora), kinds_of(lora), lora.key_count) == ("kohya", "LoRA", 6)
    text_keys = [key for key in tensors if "te_text" in key]
    use = LoraReport(lora, 0.5, 1.0, "SD1.x", has_clip=False, model_layers=1, unused=[*lora.other_keys, *text_keys])
    text = use.text()
    assert "a.safetensors: kohya LoRA, rank 4, alpha in part, base SDXL (ss_base_model_version sdxl_base_v1-0)" in text
    assert "strength 0.5 on the model, 1 on the text encoder" in text and "3 of 6 keys used: 1 layers" in text
    assert use.warnings() == [
        "a.safetensors was made for SDXL (ss_base_model_version sdxl_base_v1-0); the model is SD1.x.",
        "a.safetensors: 1 of 6 keys were not used: note.",
    ]
    nothing = LoraReport(lora, 1.0, 1.0, "SDXL", unused=list(tensors))
    assert "no key fits this model, nothing was applied" in nothing.warnings()[0]
