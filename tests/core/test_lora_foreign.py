"""LoRA files as other tools name, scale and damage them: the same weights, or a reason that names the file."""

import io
import json
import math
import time
import zipfile

import peft
import pytest
import torch
from retune.training.commands.lora_files import ConvertLoraConfig, ResizeLoraConfig, convert_lora, resize_lora
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.formats.lora import Lora, LoraModule, parse_lora, read_lora
from retune.training.formats.lora_keys import is_text_layer, kohya_aliases, split_key
from retune.training.formats.lora_names import TEXT, UNET, Naming, detect_naming
from retune.training.formats.lora_report import LoraReport, layout_of
from retune.training.formats.lora_save import save_lora
from retune.training.recipes.apply_results import merged
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {
    f"{BLOCK}.attn1.to_q": (24, 16),
    f"{BLOCK}.attn2.to_q": (24, 16),
    f"{BLOCK}.attn1.to_out.0": (16, 24),
    "mid_block.attentions.0.proj_in": (16, 16),
    "up_blocks.1.resnets.1.conv1": (16, 8, 3, 3),
}
CLIP = "text_model.encoder.layers.3.self_attn.q_proj"
T5 = "encoder.block.1.layer.1.DenseReluDense.wi_0"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pair(layer, rank=2, rows=8, columns=6, down=DOWN, up=UP):
    return {layer + down: drawn(rank, columns), layer + up: drawn(rows, rank, seed=1)}


def network():
    """torch's layers under a UNet's names."""
    root = nn.Module()
    for seed, (path, shape) in enumerate(LAYERS.items()):
        parent = root
        for part in path.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        kernel = shape[2:]
        layer = nn.Conv2d(shape[1], shape[0], kernel, padding=1) if kernel else nn.Linear(shape[1], shape[0])
        layer.weight.data, layer.bias.data = drawn(*shape, seed=seed), drawn(shape[0], seed=seed)
        parent.add_module(path.rpartition(".")[2], layer)
    return root


# --- peft's kinds -----------------------------------------------------------------------------------------------------

TARGETS = {"target_modules": ["to_q", "to_out.0", "proj_in", "conv1"]}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, **TARGETS),
    "rsLoRA, patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"attn2.to_q": 2},
        alpha_pattern={r"^down_blocks.*attn2\.to_q": 6, "proj_in": 3},
        **TARGETS,
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, **TARGETS),
    "LoRA with biases": lambda: peft.LoraConfig(r=4, lora_alpha=8, lora_bias=True, **TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=8, **TARGETS),
    "LoHa, Tucker": lambda: peft.LoHaConfig(r=4, alpha=2, use_effective_conv2d=True, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=1, alpha=2, **TARGETS),
    "LoKr, both low": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, **TARGETS),
    "LoKr, Tucker": lambda: peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, **TARGETS),
    "LoKr, whole": lambda: peft.LoKrConfig(r=512, alpha=1024, alpha_pattern={"proj_in": 256}, **TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=8, total_step=10, target_modules=["to_q", "to_out.0"]),
}


def trained(kind):
    """A peft model with random tensors."""
    model = peft.get_peft_model(network(), KINDS[kind]())
    for seed, (name, value) in enumerate(model.named_parameters()):
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            value.data = drawn(*value.shape, seed=100 + seed).abs() + 0.1
    return model


def weights_of(module):
    """ComfyUI's name -> weight or bias."""
    naming = Naming.from_unet_config(CONFIG)
    names = {name: name.rpartition(".") for name, _ in module.named_parameters()}
    layers = {name: f"{naming.comfyui_name('unet.' + path)}.{part}" for name, (path, _, part) in names.items()}
    return {layers[name]: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_peft_gives_the_weights_that_peft_merges(tmp_path, kind):
    model, before = trained(kind), weights_of(network())
    model.save_pretrained(tmp_path)
    wanted = {n: v for n, v in weights_of(model.merge_and_unload()).items() if not torch.equal(v, before[n])}
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    found = merged(lora, before, 1.0, CONFIG)
    assert {n for n, v in found.items() if not torch.equal(v, before[n])} == set(wanted)
    assert sum(name.endswith("weight") for name in wanted) == (3 if kind == "AdaLoRA" else 5)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    save_lora(tmp_path / "k.safetensors", lora)  # without peft's settings, it does the same
    again = merged(read_lora(tmp_path / "k.safetensors"), before, 1.0, CONFIG)
    for name, value in wanted.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "LoKr, whole", "AdaLoRA"])
@pytest.mark.parametrize("adapter", ["default", "default_0", "style v2"])
def test_the_adapters_name_in_a_models_own_state_is_no_part_of_a_layers(kind, adapter):
    model = trained(kind)
    state = {k: v for k, v in model.state_dict().items() if any(p in k for p in ("lora_", "hada_", "lokr_"))}
    plain = parse_lora("plain", peft.get_peft_model_state_dict(model))
    named = parse_lora("named", {k.replace(".default", f".{adapter}"): v for k, v in state.items()})
    assert named.modules.keys() == plain.modules.keys() and not named.other_keys
    for layer, module in plain.modules.items():
        assert module.tensors.keys() == named.modules[layer].tensors.keys()


def test_two_adapters_in_one_file_are_refused():
    tensors = {}
    for adapter in ("a", "b"):
        tensors |= pair("unet.mid.to_q", down=f".lora_A.{adapter}.weight", up=f".lora_B.{adapter}.weight")
    with pytest.raises(ValueError, match=r"two.safetensors: .*lora_A.a.weight and .*lora_A.b.weight.*one adapter"):
        parse_lora("two.safetensors", tensors)


def test_a_peft_file_without_its_settings_says_what_is_taken(tmp_path, caplog):
    tensors = pair("base_model.model.mid_block.attentions.0.proj_in", down=".lora_A.weight", up=".lora_B.weight")
    write_tensors(tmp_path / "renamed.safetensors", tensors)
    convert_lora(ConvertLoraConfig(lora=tmp_path / "renamed.safetensors", output=tmp_path / "k.safetensors"))
    assert "renamed.safetensors is peft's, without the adapter_config.json" in caplog.text
    report = LoraReport(read_lora(tmp_path / "renamed.safetensors"), 1.0, 1.0, model_layers=1)
    assert any("alpha = rank is taken" in line for line in report.warnings())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": math.nan}, "lora_alpha in its adapter settings is nan; expected a finite number"),
        ({"lora_alpha": 1e39}, "NaN or infinity in alpha of mid.to_q"),
        ({"lora_alpha": "much"}, "lora_alpha in its adapter settings is 'much'"),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": math.inf}}, "alpha of 'to_q' is inf"),
        ({"lora_alpha": 4, "alpha_pattern": [1]}, "alpha_pattern in its adapter settings is .1.; expected an object"),
        ({"lora_alpha": 4, "alpha_pattern": {"(a+)+(": 1}}, "no regular expression"),
        ({"lora_alpha": 4, "r": 0}, "r in its adapter settings is 0"),
        ({"peft_type": "VERA"}, "its adapter is peft's 'VERA'; expected LoRA, AdaLoRA, LoHa or LoKr"),
        ({"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "relative to changed base weights"),
        ({"lora_alpha": 4, "use_qalora": True}, "use_qalora in its adapter settings is True"),
        ([1], "lora_adapter_metadata is damaged .its content is a list; expected an object"),
    ],
)
def test_damaged_settings_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=rf"x.safetensors.*{message}"):
        parse_lora("x.safetensors", pair("mid.to_q"), {"lora_adapter_metadata": json.dumps(config)})


def test_settings_that_nest_or_repeat_without_end_are_refused_at_once():
    start = time.process_time()
    for text in ("[" * 100_000, json.dumps({"lora_alpha": 1, "alpha_pattern": {"(a|a)*b": 1}}), "{"):
        tensors = pair("a" * 60 + ".to_q")
        if "pattern" in text:
            assert parse_lora("x.safetensors", tensors, {"lora_adapter_metadata": text}).modules
            continue
        with pytest.raises(ValueError, match="x.safetensors: its metadata entry lora_adapter_metadata is damaged"):
            parse_lora("x.safetensors", tensors, {"lora_adapter_metadata": text})
    assert time.process_time() - start < 5


def test_thousands_of_layers_with_patterns_of_their_own_are_read_in_seconds():
    tensors, alphas = {}, {}
    for number in range(4000):
        tensors |= pair(f"unet.down.{number}.to_q", rank=1, rows=1, columns=1)
        alphas[f"down.{number}.to_q"] = number + 1
    settings = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": alphas})
    start = time.process_time()
    modules = parse_lora("x", tensors, {"lora_adapter_metadata": settings}).modules
    assert time.process_time() - start < 5
    assert all(modules[f"unet.down.{number}.to_q"].alpha == number + 1 for number in range(4000))


# --- names ------------------------------------------------------------------------------------------------------------

PATH = f"{BLOCK}.attn1.to_q"
ORIGINAL = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "name",
    [
        PATH,
        f"unet.{PATH}",
        f"base_model.model.{PATH}",
        f"unet.base_model.model.{PATH}",
        f"base_model.model.unet.{PATH}",
        f"module.{PATH}",
        f"unet._orig_mod.{PATH}",
        PATH.replace(".to_q", ".processor.to_q"),
        PATH.replace("down_blocks.0", "_orig_mod.down_blocks.0").replace(".attn1", "._orig_mod.attn1"),
        "lycoris_" + PATH.replace(".", "_"),
        ORIGINAL.removeprefix(UNET),
        f"model.{ORIGINAL}",
        f"unet.{ORIGINAL.removeprefix(UNET)}",
    ],
)
def test_a_layer_of_the_unet_is_known_by_every_name(name):
    lora = parse_lora("x", pair(name))
    assert detect_naming(lora, unet_config=CONFIG).comfyui_name(name) == ORIGINAL
    assert not is_text_layer(name) and layout_of(lora) != "other" or name.startswith(("input", "model"))
    kohya = "lora_unet_" + PATH.replace(".", "_"), "lora_unet_" + ORIGINAL.removeprefix(UNET).replace(".", "_")
    assert {*kohya, ORIGINAL} & set(kohya_aliases(name))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (CLIP, f"clip_l.transformer.{CLIP}"),
        (CLIP.removeprefix("text_model."), f"clip_l.transformer.{CLIP}"),
        (f"base_model.model.{CLIP}", f"clip_l.transformer.{CLIP}"),
        (f"text_encoder.base_model.model.{CLIP}", f"clip_l.transformer.{CLIP}"),
        (f"text_encoder_2.module.{CLIP}", f"clip_g.transformer.{CLIP}"),
        (f"clip_g.transformer.{CLIP}", f"clip_g.transformer.{CLIP}"),
        (T5, f"t5.transformer.{T5}"),
        (f"t5xxl.transformer.{T5}", f"t5.transformer.{T5}"),
        (f"text_encoder_3.{T5}", f"t5.transformer.{T5}"),
        ("lora_te2_" + T5.replace(".", "_"), f"t5.transformer.{T5}"),
        ("lora_te3_" + T5.replace(".", "_"), f"t5.transformer.{T5}"),
    ],
)
def test_a_layer_of_a_text_encoder_is_known_by_every_name(name, layer):
    assert Naming().comfyui_name(name) == TEXT + layer and is_text_layer(name)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", ["transformer.single_blocks.3.attn.to_q", "base_model.model.foo.bar", "foo.bar"])
def test_names_that_are_not_understood_are_not_written(tmp_path, name, format):
    write_tensors(tmp_path / "odd.safetensors", pair(f"unet.{PATH}") | pair(name))
    with pytest.raises(ValueError, match=f"odd.safetensors has {name}"):
        convert_lora(
            ConvertLoraConfig(lora=tmp_path / "odd.safetensors", output=tmp_path / "out.safetensors", format=format)
        )
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("number", ["", "1", "2", "3"])
@pytest.mark.parametrize("path", [CLIP, T5])
def test_a_text_encoder_alone_keeps_the_name_it_came_with(tmp_path, number, path):
    name = f"lora_te{number}_" + path.replace(".", "_")
    write_tensors(tmp_path / "x.safetensors", pair(name, rank=4) | {f"{name}.alpha": torch.tensor(2.0)})
    out = tmp_path / "out.safetensors"
    resize_lora(ResizeLoraConfig(lora=tmp_path / "x.safetensors", output=out, rank=2))
    assert list(read_lora(out).modules) == [name]
    convert_lora(ConvertLoraConfig(lora=tmp_path / "x.safetensors", output=out))
    assert list(read_lora(out).modules) == [name]
    family = read_tensors(out)[1]["ss_base_model_version"]
    known = {"": "sd_v1", "2": "sdxl_base_v1-0"} if path == CLIP else {}
    assert family == known.get(number, "unknown")
    convert_lora(ConvertLoraConfig(lora=tmp_path / "x.safetensors", output=out, base="SDXL"))
    asked = number if path == T5 or number == "2" else "1"
    assert list(read_lora(out).modules) == [f"lora_te{asked}_" + path.replace(".", "_")]


def test_one_layer_by_two_names_is_refused():
    lora = parse_lora("twice.safetensors", pair(f"unet.{PATH}", 2, 24, 16) | pair(PATH, 2, 24, 16))
    with pytest.raises(ValueError, match=f"twice.safetensors has unet.{PATH} and {PATH}, which are one layer"):
        merged(lora, weights_of(network()), 1.0, CONFIG)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.mid.to_k.ia3_l", "IA3"),
        ("lora_unet_mid_to_k.on_input", "IA3"),
        ("base_model.model.mid.to_k.oft_R.weight", r"peft's OFT \(oft_R\)"),
        ("base_model.model.mid.to_k.oft_R.default_0.weight", r"peft's OFT"),
        ("lora_unet_mid_to_k.oft_diag", "LyCORIS's OFT of an early version"),
        ("base_model.model.mid.to_k.boft_R.default", "BOFT"),
        ("base_model.model.mid.to_k.vera_lambda_b", "VeRA"),
        ("base_model.model.mid.to_k.hra_u", "an adapter of peft's that is no LoRA"),
        ("base_model.model.shared.lora_embedding_A", "token embeddings"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_other_adapters_say_what_they_are(key, message, beside):
    tensors = {key: torch.ones(4, 4)} | (pair("unet.mid.to_q") if beside else {})
    with pytest.raises(ValueError, match=f"x.safetensors: it holds .*{message}.*extract-lora"):
        parse_lora("x.safetensors", tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.diffusion_model.out.2.weight": torch.ones(4)}, "holds no LoRA.*It is a checkpoint"),
        ({"bundle_emb.cat.clip_l": torch.ones(2, 8)}, "It is an embedding"),
        ({"x.qweight": torch.ones(2, 8)}, "It is a quantised model"),
        (pair("x") | {"x.lora_up.weight": torch.ones(8, 2, dtype=torch.int32)}, "is of int32; expected floating"),
        (pair("x") | {"x.lora_up.weight": torch.ones(8, 2, dtype=torch.complex64)}, "is of complex64"),
        (pair("x") | {"x.lora_up.weight": torch.full((8, 2), 1e39, dtype=torch.float64)}, "NaN or infinity in x"),
        (pair("x") | {"x.alpha": torch.tensor(1e300, dtype=torch.float64)}, "NaN or infinity in x.alpha"),
        (pair("x", rank=0), "is empty"),
        (pair("x") | {"x.lora_down.weight": torch.tensor(1.0)}, "ranks differ"),
        ({"x.lora_down.weight": torch.ones(1, 20_000), "x.lora_up.weight": torch.ones(20_000, 1)}, "20000 x 20000"),
        (
            {f"x.hada_w{i}_{p}": torch.ones(9, 0) if p == "a" else torch.ones(0, 9) for i in "12" for p in "ab"},
            "is empty",
        ),
        ({"x.oft_blocks": torch.ones(4, 3, 5)}, r"its oft_blocks are \(4, 3, 5\); expected square blocks"),
        ({f"x.{p}.weight": torch.ones(i, 9) for i, p in enumerate(("a1", "a2", "b1", "b2"), 2)}, "ranks differ"),
        ({f"x.lokr_w{i}": torch.ones(1000, 1000) for i in "12"}, "expected at most 134217728 numbers"),
    ],
)
def test_layers_that_are_no_difference_are_refused(tensors, message):
    with pytest.raises(ValueError, match=f"x.safetensors.*{message}"):
        parse_lora("x.safetensors", tensors)


def test_names_with_huge_numbers_or_parts_cost_nothing():
    start = time.process_time()
    big = "9" * 5000
    names = [
        "lora_unet_down_blocks_0_resnets_999999999_conv1",
        "lora_unet_input_blocks_999999999_1_proj_in",
        f"lora_unet_up_blocks_{big}_attentions_{big}_proj_in",
        "lora_unet_" + "a_" * 200_000 + "b",
        f"text_encoder.text_model.encoder.layers.{big}.mlp.fc1",
        "unet." + "down_blocks.0." * 20_000 + "to_q",
    ]
    for name in names:
        lora = Lora("x", {name: LoraModule(name, {}, {})}, (), {})
        naming = detect_naming(lora)
        naming.comfyui_name(name)
        assert naming.layers_per_block <= 99
    with pytest.raises(ValueError, match="x.safetensors: it has a key of 400028 characters"):
        parse_lora("x.safetensors", pair(names[3]))
    assert time.process_time() - start < 5
    for config in ({"layers_per_block": 10**9}, {"layers_per_block": [1, 2]}, {"down_block_types": "Down"}, {}):
        broken = {} if not config else CONFIG | config
        with pytest.raises(ValueError, match="of the UNet's config is"):
            Naming.from_unet_config(broken)


def test_sizes_are_compared_before_a_difference_is_computed():
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{layer}.lokr_w1": torch.ones(11_000, 1), f"{layer}.lokr_w2": torch.ones(1, 11_000)}
    start = time.process_time()
    with pytest.raises(ValueError, match=r"x.safetensors: layer .* changes \(11000, 11000\); expected \(16, 16\)"):
        merged(parse_lora("x.safetensors", tensors), weights_of(network()), 1.0, CONFIG)
    assert time.process_time() - start < 1
    with pytest.raises(ValueError, match=r"changes \(3, 1\); expected \(16, 1\)"):
        merged(parse_lora("x", {f"{layer}.diff_b": torch.ones(3)}), weights_of(network()), 1.0, CONFIG)


def test_what_is_left_out_of_a_model_is_said(caplog):
    tensors = pair(f"unet.{PATH}", 2, 24, 16) | pair("unet.mid_block.foo") | {"conv_out.bias": torch.ones(4)}
    merged(parse_lora("x.safetensors", tensors), weights_of(network()), 1.0, CONFIG)
    assert "x.safetensors: 1 layers are not in the model and are left out: unet.mid_block.foo" in caplog.text
    assert "x.safetensors: 1 tensors are not in the model and are left out: conv_out.bias" in caplog.text


def contains_itself():
    state = {"state_dict": pair("x")}
    state["state_dict"]["state_dict"] = state
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (contains_itself, "contains itself"),
        (lambda: {"x.lora_down.weight": torch.ones(1).expand(10**6, 10**6)}, "unfold to"),
        (lambda: {"state_dict": {"state_dict": pair("x")}}, "holds no LoRA"),
        (lambda: {1: torch.ones(2, 2), "x": "y"}, "holds no LoRA"),
        (lambda: [torch.ones(2)], "holds no LoRA"),
        (lambda: {"x.lora_down.weight": torch.ones(2, 2).to_sparse()}, "sparse"),
    ],
)
def test_pickles_that_are_no_plain_tensors_are_refused_at_once(tmp_path, content, message):
    torch.save(content(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=f"odd.pt.*{message}"):
        read_lora(tmp_path / "odd.pt")


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    stored = io.BytesIO()
    torch.save({"x.lora_down.weight": torch.zeros(20 << 20)}, stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="b.pt: its content unpacks to 80 MB"):
        read_lora(tmp_path / "b.pt")


def test_settings_next_to_a_peft_file_are_damaged_or_no_file(tmp_path):
    save_file(pair("base_model.model.mid.to_q"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="adapter_config.json is damaged or no UTF-8 text"):
        read_lora(tmp_path / "adapter_model.safetensors")
    for text, message in (
        ("{", " is damaged or no JSON"),
        ('{"lora_alpha": "x"}', ": lora_alpha in its adapter settings"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json{message}"):
            read_lora(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    assert read_lora(tmp_path / "adapter_model.safetensors").modules


@pytest.mark.parametrize("key", ["unet.a.lora_A.weight.x", "lora_A.default.weight", "unet.a.lora_A.bias", ".alpha"])
def test_what_only_looks_like_a_key_is_none(key):
    assert split_key(key) == (key, None)
