"""Checkpoints of other kinds and layouts: SD2.x and distilled SDXL load, scaled fp8 is unfolded, the rest is named."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from retune.training.common.files import write_tensors
from retune.training.common.foreign import open_tensors, read_tensors
from retune.training.models import checkpoint, ldm
from retune.training.models.diffusers import load_denoiser, load_model
from retune.training.models.quantised import unfolded
from retune.training.models.recast import is_quantised
from torch.utils._python_dispatch import _disable_current_modes

KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k."
WEIGHT = f"{ldm.UNET_PREFIX}{KEY}weight"


def shapes_only(names):
    return {name: torch.zeros(1) for name in names}


KINDS = {
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a LoRA;peft": ["base_model.model.unet.down_blocks.0.attn2.to_k.lora_A.weight"],
    "SD3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight"],
    "Flux;diffusers": ["single_transformer_blocks.0.attn.to_q.weight"],
    "a transformer": ["model.diffusion_model.layers.0.attention.qkv.weight"],
    "Stable Cascade": ["model.diffusion_model.clip_txt_mapper.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "a ControlNet;bare": ["input_blocks.0.0.weight", "zero_convs.0.0.weight"],
    "a UNet with diffusers' names": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a VAE": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "a text encoder": ["text_model.embeddings.token_embedding.weight"],
    "a T5 text encoder": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "an embedding": ["clip_g", "clip_l"],
    "a video model or motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_kinds_say_what_they_are(tmp_path, kind):
    write_tensors(tmp_path / "it.safetensors", shapes_only(KINDS[kind]))
    with pytest.raises(
        ValueError, match=f"the tensors of {kind.partition(';')[0]}.*; expected SD1.x.* (Use|Give)"
    ) as it:
        load_denoiser(tmp_path / "it.safetensors")
    assert str(it.value).startswith("it.safetensors: ")


def test_paths_of_other_kinds_say_what_they_are(tmp_path):
    for name, words in {
        "q4.gguf": "It is a GGUF file, whose weights are quantised. Use the fp16 or fp8",
        "old.ckpt": "It is a pickled checkpoint, which may hold code. Load it in ComfyUI and save it",
        "model_index.json": "It is a JSON file. Give the folder that it is in",
        "notes.txt": "It is a file of another kind",
    }.items():
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(
            ValueError, match=f"model is .*{name}; expected a diffusers folder or a .safetensors.*{words}"
        ):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match="expected a diffusers folder.* Nothing is there"):
        load_model(tmp_path / "none")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="cut.safetensors is damaged or no safetensors file"):
        load_model(tmp_path / "cut.safetensors")


def test_folders_of_other_kinds_say_what_they_are(tmp_path):
    def folder(name, *parts, **files):
        for part in parts:
            (tmp_path / name / part).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / name

    flux = folder("flux", "transformer", "vae", model_index={"_class_name": "FluxPipeline"})
    part = folder("unet", config={"_class_name": "UNet2DConditionModel"})
    files = folder("checkpoints")
    files.mkdir()
    write_tensors(files / "a.safetensors", shapes_only(["x"]))
    for path, words in (
        (flux, "lacks unet.*It is a 'FluxPipeline', without a UNet that reads text; use Stable Diffusion"),
        (part, "lacks unet.*It is a 'UNet2DConditionModel' alone.*give the folder that holds it"),
        (files, "lacks unet.*It holds a.safetensors: give that file"),
    ):
        with pytest.raises(ValueError, match=words):
            load_denoiser(path)
    folder("video", "unet")
    (tmp_path / "video" / "unet" / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    with pytest.raises(ValueError, match="it is a 'UNet3DConditionModel'; expected UNet2DConditionModel"):
        load_denoiser(tmp_path / "video")


@pytest.mark.parametrize("dtype, own_dtypes", [("F16", False), ("F16", True), ("F32", False), ("F32", True)])
def test_loading_needs_no_more_than_the_model(single_file, tmp_path, live_bytes, dtype, own_dtypes, monkeypatch):
    """Weights lie in the file until each is copied: neither its content nor a part of it is in RAM twice."""
    reads = []

    @contextmanager
    def uncounted(path):
        with open_tensors(path) as file:
            reads.append(path)

            def read(name):
                with _disable_current_modes():  # what is mapped takes no memory
                    return file.read(name)

            yield replace(file, read=read)

    monkeypatch.setattr(checkpoint, "open_tensors", uncounted)
    if dtype == "F16":
        changed(single_file, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    with live_bytes() as memory:
        options = {"own_dtypes": own_dtypes, "own_text": own_dtypes}
        model = load_model(single_file, tokenizer=tmp_path / "clip_tokenizer", **options)
        if own_dtypes:
            model.denoiser.store_in(torch.bfloat16)
    networks = (model.denoiser.network, model.text_encoder.network, model.autoencoder.network)
    weights = [p for network in networks for p in network.parameters()]
    sizes, seen = [p.nbytes for p in weights], sum(p.nbytes for p in weights if not is_quantised(p))
    assert reads and seen <= memory.peak <= 1.05 * sum(sizes) + 4 * max(sizes)
    kept = {name: p.detach().clone() for name, p in model.denoiser.network.named_parameters()}
    single_file.write_bytes(b"")  # nothing of it is mapped any more
    assert all(torch.equal(p, kept[name]) for name, p in model.denoiser.network.named_parameters())


def changed(file, change, about=None):
    tensors, metadata = read_tensors(file)
    change(tensors)
    write_tensors(file, tensors, {**metadata, **(about or {})})
    return file


SPECIAL = {
    "is distilled for few steps": lambda t: t.update({f"{ldm.UNET_PREFIX}time_embed.cond_proj.weight": torch.zeros(2)}),
    "bitsandbytes' 4 bits": lambda t: t.update({f"{WEIGHT}.absmax": torch.zeros(1)}),
    "quanto's": lambda t: t.update({f"{WEIGHT}._data": torch.zeros(1, dtype=torch.int8)}),
    "to_k.weight is I8; expected fp32": lambda t: t.update({WEIGHT: torch.zeros(32, 32, dtype=torch.int8)}),
    "to_k.weight has values that are no finite numbers": lambda t: t[WEIGHT].mul_(float("nan")),
    r"attn1.to_q.weight is \(8, 8\); expected \(32, 32\)": lambda t: t.update(
        {WEIGHT.replace("attn2.to_k", "attn1.to_q"): torch.zeros(8, 8)}
    ),
    "the largest number after input_blocks.1.1.transformer_blocks. is 999999999": lambda t: t.update(
        {f"{ldm.UNET_PREFIX}input_blocks.1.1.transformer_blocks.999999999.norm1.weight": torch.zeros(1)}
    ),
}


@pytest.mark.parametrize("words", SPECIAL)
def test_unets_that_would_train_wrongly_are_named(single_file, words):
    with pytest.raises(ValueError, match=f"tiny.safetensors: .*{words}"):
        load_denoiser(changed(single_file, SPECIAL[words]))


@pytest.mark.parametrize("part", ["unet", "vae", "clip"])
def test_metadata_makes_no_layers(single_file, tmp_path, part):
    """A number of layers in `retune.config` that the file does not have: its shapes count, or it is refused at once."""
    config = json.loads(read_tensors(single_file)[1]["retune.config"])
    config[part] |= {"layers_per_block": 10**9, "num_hidden_layers": 10**9, "block_out_channels": [10**9] * 2}
    changed(single_file, lambda tensors: None, {"retune.config": json.dumps(config)})
    if part == "clip":
        with pytest.raises(ValueError, match="tiny.safetensors: num_hidden_layers is 1000000000; expected .* 1 to 2"):
            load_model(single_file, tokenizer=tmp_path / "clip_tokenizer")
    else:
        assert load_model(single_file, tokenizer=tmp_path / "clip_tokenizer")
    config[part] = "large"
    changed(single_file, lambda tensors: None, {"retune.config": json.dumps(config)})
    with pytest.raises(ValueError, match=f"tiny.safetensors: {part} in its metadata is no object"):
        load_model(single_file, tokenizer=tmp_path / "clip_tokenizer")


def test_a_unet_without_the_prefix_loads(single_file, tiny_model, tmp_path):
    tensors, metadata = read_tensors(single_file, ldm.UNET_PREFIX)
    bare = {name.removeprefix(ldm.UNET_PREFIX): value for name, value in tensors.items()}
    write_tensors(tmp_path / "bare.safetensors", bare | {"v_pred": torch.zeros(0)}, metadata)
    found = load_denoiser(tmp_path / "bare.safetensors")
    assert found.prediction_type == "v"
    known = dict(tiny_model.denoiser.network.named_parameters())
    assert all(torch.equal(value, known[name]) for name, value in found.network.named_parameters())


def scaled(layout):
    """(change of a file's tensors, metadata): one weight in fp8 with a scale, in ComfyUI's layouts of it."""
    layer, form = WEIGHT.removesuffix(".weight"), {"format": "float8_e4m3fn"}

    def change(tensors):
        value = tensors[WEIGHT]
        scale = value.abs().max() / 448 if layout != "rows" else value.abs().amax(1, keepdim=True) / 448
        tensors[WEIGHT] = (value / scale).to(torch.float8_e4m3fn)
        tensors[f"{layer}.{'scale_weight' if layout == 'old' else 'weight_scale'}"] = scale.clone()
        if layout == "old":
            tensors[f"{ldm.UNET_PREFIX}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
            tensors[f"{layer}.scale_input"] = torch.ones(())
        elif layout == "new":
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
            tensors[f"{layer}.input_scale"] = torch.ones(())

    return change, {"_quantization_metadata": json.dumps({"layers": {layer: form}})} if layout == "rows" else {}


@pytest.mark.parametrize("layout", ["old", "new", "rows"])
def test_scaled_fp8_is_weight_times_scale(single_file, layout):
    change, about = scaled(layout)
    original = read_tensors(single_file)[0][WEIGHT]
    changed(single_file, change, about)
    stored, _ = read_tensors(single_file)
    scale = stored[f"{WEIGHT.removesuffix('.weight')}.{'scale_weight' if layout == 'old' else 'weight_scale'}"]
    network = load_denoiser(single_file).network
    found = network.get_parameter("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight")
    assert torch.equal(found, stored[WEIGHT].float() * scale)
    torch.testing.assert_close(found, original, rtol=0.07, atol=original.abs().max().item() / 448)


def test_other_formats_and_lost_scales_are_refused():
    layer = {"a.weight": torch.zeros(4, 4), "a.weight_scale": torch.ones(1)}
    form = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match="layer a is quantised as 'mxfp8'; expected fp8"):
        unfolded(layer | {"a.comfy_quant": form}, {})
    with pytest.raises(ValueError, match="layer a is quantised as 'nvfp4'"):
        unfolded(layer, {"_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}'})
    with pytest.raises(ValueError, match="scale of a.weight has 3 values; expected 1 or 4"):
        unfolded(layer | {"a.weight_scale": torch.ones(3)}, {})
    with pytest.raises(ValueError, match="b.scale_weight scales b.weight, which it lacks"):
        unfolded({"b.scale_weight": torch.ones(1)}, {})


DISTILLED = {
    "SSD-1B": {
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Segmind Vega": {
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA-700M": {
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, [2], [5]],
        "reverse_transformer_layers_per_block": [[5, 5], [2, 2], 1],
        "mid_block_type": None,
    },
}


@pytest.mark.parametrize("kind", DISTILLED)
def test_distilled_sdxl_is_described_by_its_shapes(kind):
    """Other depths on the way up than on the way down, and a smaller middle or none."""
    from diffusers import UNet2DConditionModel

    shape = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": [1, 1, 1],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1600,
    }
    with torch.device("meta"):
        state = UNet2DConditionModel(**shape, **DISTILLED[kind]).state_dict()
    in_file = ldm.to_ldm(state, ldm.unet_names(shape | DISTILLED[kind]))
    read = ldm.unet_config({name: value.shape for name, value in in_file.items()}, num_heads=1)
    with torch.device("meta"):
        again = UNet2DConditionModel(**read).state_dict()
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in state.items()}
    assert ldm.to_diffusers(in_file, ldm.unet_names(read)).keys() == state.keys()


@torch.no_grad()
@pytest.mark.parametrize("prefix", ldm.SD2_CLIP_PREFIXES)
def test_an_sd2_file_loads_with_its_text_encoder(single_file, tmp_path, prefix, open_clip_tensors):
    """OpenCLIP's layout; states before the last layer, after the final norm; padded with "!", as in ComfyUI."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tensors, metadata = read_tensors(single_file)
    config = json.loads(metadata["retune.config"])
    words = open_clip_tensors(config["clip"]["vocab_size"], width=64, hidden=128, projected=64)
    config["clip"] = None
    tensors = {name: value for name, value in tensors.items() if not name.startswith("cond_stage_model.")}
    tensors |= {prefix + name: value for name, value in (words | {"logit_scale": torch.tensor(4.6)}).items()}
    write_tensors(tmp_path / "sd2.safetensors", tensors, {"retune.config": json.dumps(config)})
    encoder = load_model(tmp_path / "sd2.safetensors", tokenizer=tmp_path / "clip_tokenizer").text_encoder
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1}
    about = CLIPTextConfig(
        vocab_size=len(words["token_embedding.weight"]), projection_dim=64, hidden_act="quick_gelu", **sizes
    )
    theirs = CLIPTextModelWithProjection(about).eval()
    theirs.load_state_dict(convert_open_clip_checkpoint(theirs, words, prefix=""))
    tokens = encoder.tokenize(["a red circle on the left", ""])
    assert all(set(windows[0][-40:]) == {0} for windows in tokens)
    states = theirs(torch.tensor([windows[0] for windows in tokens]), output_hidden_states=True).hidden_states[-2]
    expected = next(m for n, m in theirs.named_modules() if n.endswith("final_layer_norm"))(states)
    torch.testing.assert_close(encoder.encode(tokens).context, expected, atol=1e-5, rtol=1e-5)
    assert encoder.name == "clip_h" and encoder.pooled_width == 0


def test_a_folder_of_fp16_files_alone_loads(diffusers_folder, tiny_model):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (diffusers_folder / part / f"{stem}.safetensors").rename(diffusers_folder / part / f"{stem}.fp16.safetensors")
    found = load_model(diffusers_folder)
    assert found.denoiser.fingerprint == tiny_model.denoiser.fingerprint
    assert found.text_encoder.fingerprint == tiny_model.text_encoder.fingerprint


UNET_FILE, TEXT_FILE = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize("file", [UNET_FILE, "vae/diffusion_pytorch_model.safetensors", TEXT_FILE])
def test_weights_that_a_folder_lacks_are_not_made_up(diffusers_folder, file):
    """The libraries only warn, and begin with random or empty ones."""
    changed(diffusers_folder / file, lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(ValueError, match=f"{file.partition('/')[0]}.* lacks 1 tensors such as"):
        load_model(diffusers_folder)


FOLDER_FAULTS = [
    ("unet/config.json", {"layers_per_block": 10**9}, "unet: layers_per_block is 1000000000; expected a whole number"),
    ("unet/config.json", {"block_out_channels": [32, "x"]}, "unet: block_out_channels is 'x'"),
    ("unet/config.json", {"cross_attention_dim": 64}, "unet"),
    (
        "unet/config.json",
        {"block_out_channels": [65536, 65536]},
        "unet: config.json describes .* parameters, and its 1",
    ),
    ("text_encoder/config.json", {"intermediate_size": 10**5}, "text_encoder: config.json describes .* parameters"),
    ("text_encoder/config.json", {"num_hidden_layers": 100}, "text_encoder.*its weights have 2 layers; expected 100"),
    ("text_encoder/config.json", {"num_hidden_layers": None}, "text_encoder: num_hidden_layers is None"),
    ("vae/config.json", {"layers_per_block": -1}, "vae: layers_per_block is -1"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'; expected one of"),
    ("scheduler/scheduler_config.json", {"beta_start": None}, "scheduler.* beta_start is None"),
]


@pytest.mark.parametrize("file, change, words", FOLDER_FAULTS)
def test_settings_of_a_folder_that_fit_no_model_are_named(diffusers_folder, file, change, words):
    about = json.loads((diffusers_folder / file).read_text(encoding="utf-8"))
    (diffusers_folder / file).write_text(json.dumps(about | change), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_model(diffusers_folder)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", UNET_FILE, TEXT_FILE]
)
def test_damaged_files_of_a_folder_are_named(diffusers_folder, file):
    data = (diffusers_folder / file).read_bytes()
    (diffusers_folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=file.partition("/")[0]):
        load_model(diffusers_folder)


def test_a_damaged_tokenizer_is_named(diffusers_folder):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (diffusers_folder / "tokenizer" / name).exists():
            (diffusers_folder / "tokenizer" / name).write_text("[" * 5000, encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        load_model(diffusers_folder)
