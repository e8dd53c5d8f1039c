"""T5 with a projection as ComfyUI's CLIP: equal to the core's, untouched by its clones, managed like any other."""

import gc
import logging

import pytest
import torch
from retune.nodes.bridge import measure, text_encoder
from retune.nodes.clips import saved_clip, t5_clip
from retune.training.common.rng import generator
from retune.training.text_encoder.file import read_text_encoder, save_text_encoder
from retune.training.text_encoder.projection import Projection
from retune.training.text_encoder.scale import PROMPTS
from retune.training.text_encoder.t5 import Padding, load_t5
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

pytestmark = pytest.mark.comfyui

WIDTH = 96
TEXTS = ["a red circle", "two small blue squares on a green ground, and a star", "", *PROMPTS[:6]]
SIZES = {
    "demo size": {"d_model": 64},
    "v1.1 base width": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048},
    "v1.0 base width": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "feed_forward_proj": "relu"},
    "umt5": {"d_model": 64, "umt5": True},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, write_t5_folder):
    root = tmp_path_factory.mktemp("t5")
    return {size: write_t5_folder(root / size.replace(" ", "_"), **config) for size, config in SIZES.items()}


@pytest.fixture
def t5_folder(folders):
    return folders["demo size"]


@pytest.fixture
def clip(comfyui, t5_folder):
    with torch.inference_mode():  # as ComfyUI runs loader nodes
        return t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp32")


def projection(in_width=64, kind="orthogonal", **options):
    return Projection(in_width, WIDTH, kind, **options).scaled(1.3)


def encode(clip, text, **options):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text, **options)).clone()


def encode_all(clip):
    return [encode(clip, text) for text in TEXTS]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [{}, {"pad": "max_tokens", "max_tokens": 40}], ids=["tight", "padded"])
def test_equals_the_core_encoder(comfyui, folders, size, padding):
    chosen = projection(SIZES[size]["d_model"], "mlp" if size == "umt5" else "orthogonal")
    clip = t5_clip.load_t5_clip(folders[size], chosen, dtype="fp32", **padding)
    core = load_t5(folders[size], chosen, padding=Padding(**padding))
    for text in TEXTS:
        (ids,) = core.tokenize([text])
        expected = core.encode([ids]).context
        result = encode(clip, text)
        assert [token for token, _ in clip.tokenize(text)[clip.cond_stage_model.clip_name][0]][: len(ids)] == ids
        assert result.shape == expected.shape
        assert (result - expected).abs().max() < 1e-4
        states, wanted = t5_clip.encode_states(clip, clip.tokenize(text)), core.backbone([ids])
        assert (states.context - wanted.context).abs().max() < 1e-4
        assert (states.mask is None) if wanted.mask is None else torch.equal(states.mask, wanted.mask)


def test_states_are_ordinary_tensors_that_a_projection_trains_on(clip):
    with torch.inference_mode():
        states = t5_clip.encode_states(clip, clip.tokenize(TEXTS[0]))
    trained = t5_clip.t5_parts(clip).projection
    trained(states.context).square().sum().backward()
    assert trained.linear.weight.grad.abs().sum() > 0


def test_fingerprint_follows_what_the_states_depend_on(clip, t5_folder):
    import nodes

    known = t5_clip.backbone_fingerprint(clip)
    assert known == t5_clip.backbone_fingerprint(t5_clip.clone_with_projection(clip, other_projection()))
    padded = t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp32", pad="max_tokens")
    rounded = t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp16")
    (earlier,) = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    assert len({known, *map(t5_clip.backbone_fingerprint, (padded, rounded, earlier))}) == 4
    assert known == t5_clip.backbone_fingerprint(t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp32"))


def test_stock_nodes_encode_and_pooled_is_none(clip):
    import nodes

    with torch.inference_mode():
        ((context, extra),) = nodes.CLIPTextEncode().encode(clip, TEXTS[0])[0]
    assert extra["pooled_output"] is None
    assert torch.equal(context, encode(clip, TEXTS[0]))


def test_last_layer_node(clip, t5_folder):
    import nodes

    (earlier,) = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    core = load_t5(t5_folder, projection())
    (ids,) = core.tokenize([TEXTS[1]])
    states = core.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
    expected = core.projection(core.model.encoder.final_layer_norm(states))
    assert (encode(earlier, TEXTS[1]) - expected).abs().max() < 1e-4
    assert (encode(clip, TEXTS[1]) - core.encode([ids]).context).abs().max() < 1e-4


def test_prompt_weights_move_states_away_from_the_empty_prompt(clip):
    plain, weighted = encode(clip, "a red circle"), encode(clip, "(a red circle:1.5)")
    ids = clip.tokenize("a red circle")["t5base"][0]
    empty = [(1, 1.0)] + [(0, 1.0)] * (len(ids) - 1)
    with torch.inference_mode():
        base = clip.encode_from_tokens({"t5base": [empty]})
    expected = plain + 0.5 * (plain - base)  # the projection is linear
    expected[:, -1] = plain[:, -1]  # </s> keeps weight 1
    assert (weighted - expected).abs().max() < 1e-5
    assert encode(clip, "(a red circle:1.5)", disable_weights=True).shape[1] > weighted.shape[1]


def test_embeddings_of_t5_width_enter_before_t5(comfyui, t5_folder, tmp_path, caplog):
    core = load_t5(t5_folder, projection())
    (ids,) = core.tokenize(["red circle"])
    vectors = core.token_embedding.weight[ids[:-1]].detach().clone()
    save_file({"t5base": vectors}, tmp_path / "known.safetensors")
    save_file({"t5base": torch.zeros(2, 7)}, tmp_path / "narrow.safetensors")
    clip = t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp32", embedding_directory=[str(tmp_path)])
    assert torch.equal(encode(clip, "embedding:known"), encode(clip, "red circle"))
    with caplog.at_level(logging.WARNING):
        encode(clip, "embedding:narrow")
    assert "shape mismatch" in caplog.text


def test_long_prompts_are_cut_with_a_warning(comfyui, t5_folder, caplog):
    clip = t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp32", max_tokens=6)
    core = load_t5(t5_folder, projection(), padding=Padding(max_tokens=6))
    with caplog.at_level(logging.WARNING):
        tokens = clip.tokenize(TEXTS[1])["t5base"]
    assert "is cut to max_tokens = 6" in caplog.text
    assert [[token for token, _ in tokens[0]]] == core.tokenize([TEXTS[1]])
    word_ids = clip.tokenize(TEXTS[1], return_word_ids=True)["t5base"][0]
    assert len(word_ids) == 6 and all(len(entry) == 3 for entry in word_ids)


def other_projection():
    changed = projection(seed=7)
    changed.scale.fill_(0.2)
    return changed


@pytest.mark.parametrize("kind", ["orthogonal", "mlp"])
def test_a_clone_projects_differently_and_the_original_stays(clip, t5_folder, kind):
    import comfy.model_management

    before = encode_all(clip)
    changed = projection(kind=kind, seed=7)
    with torch.inference_mode():
        clone = t5_clip.clone_with_projection(clip, changed)
    expected = t5_clip.load_t5_clip(t5_folder, changed, dtype="fp32")
    for _ in range(2):  # alternating, so that each is put in place and taken out again
        assert same(encode_all(clone), encode_all(expected))
        assert same(encode_all(clip), before)
    comfy.model_management.unload_all_models()
    assert same(encode_all(clip), before)
    assert same(encode_all(clone.clone()), encode_all(expected))
    assert not same(encode_all(clone), before)
    assert clone.cond_stage_model is clip.cond_stage_model
    assert torch.equal(t5_clip.t5_parts(clone).projection.linear.weight, changed.linear.weight)
    assert torch.equal(t5_clip.t5_parts(clip).projection.linear.weight, projection().linear.weight)


def test_a_clone_thrown_away_while_loaded_leaves_the_original(clip):
    before = encode_all(clip)
    clone = t5_clip.clone_with_projection(clip, other_projection())
    encode_all(clone)
    del clone
    gc.collect()
    assert torch.equal(t5_clip.t5_parts(clip).projection.scale, projection().scale)
    assert same(encode_all(clip), before)


def test_stock_tokenizer_options_add_pads(clip):
    longer = clip.clone()
    longer.set_tokenizer_option("t5base_min_length", 20)  # what T5TokenizerOptions does
    plain, padded = encode(clip, TEXTS[0]), encode(longer, TEXTS[0])
    assert padded.shape[1] == 20
    assert (padded[:, : plain.shape[1]] - plain).abs().max() < 1e-5


def test_what_a_clone_was_given_may_change_afterwards(clip):
    changed = other_projection()
    clone = t5_clip.clone_with_projection(clip, changed)
    before = encode_all(clone)
    with torch.no_grad():
        changed.linear.weight.zero_()
        t5_clip.t5_parts(clone).projection.linear.weight.zero_()
    assert same(encode_all(clone), before)


def with_lora(clip):
    """A clone with a LoRA on one of T5's layers."""
    import comfy.lora

    key = "t5base.transformer.encoder.block.0.layer.0.SelfAttention.q"
    source = generator(0, "lora")
    lora = {f"text_encoders.{key}.lora_up.weight": torch.randn(64, 4, generator=source)}
    lora[f"text_encoders.{key}.lora_down.weight"] = torch.randn(4, 64, generator=source)
    patched = clip.clone()
    names = comfy.lora.model_lora_keys_clip(patched.cond_stage_model, {})
    assert patched.add_patches(comfy.lora.load_lora(lora, names), 0.1)
    return patched


def test_lora_on_t5_is_kept_by_a_new_projection(clip, t5_folder):
    before = encode_all(clip)
    patched = with_lora(clip)
    both = t5_clip.clone_with_projection(patched, other_projection())
    assert t5_clip.t5_parts(both).patched and not t5_clip.t5_parts(clip).patched
    for one in (patched, both):  # the core's encoder takes the patched weights, whoever is loaded
        core = text_encoder.core_text_encoder(one)
        for text in TEXTS[:3]:
            (ids,) = core.tokenize([text])
            assert (encode(one, text) - core.encode([ids]).context).abs().max() < 1e-4
    assert not same(encode_all(patched), before)
    encode_all(both)
    stored = load_file(t5_folder / "model.safetensors")
    state = text_encoder.t5_state(clip)
    assert all(torch.equal(stored[name], weight) for name, weight in state.items()) and len(state) == len(stored)
    assert same(encode_all(clip), before)


def test_saving_warns_of_a_lora_that_it_leaves_out(clip, caplog):
    from retune.nodes.saved_text_encoder import RetuneSaveTextEncoder

    for one, warned in ((clip, False), (with_lora(clip), True)):
        caplog.clear()
        output = RetuneSaveTextEncoder.execute(one, "retune/lora")
        (path,), (shown, *warnings) = output.result, output.ui["text"]
        assert shown == path and len(warnings) == warned
        assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == warnings
        assert all("lacks the LoRA" in text and path.endswith(text.split()[0]) for text in warnings)


def test_independent_copy_is_rebuilt_from_the_file(clip):
    clone = t5_clip.clone_with_projection(clip, other_projection())
    expected = encode_all(clone)
    separate = clone.clone()
    separate.patcher = clone.patcher.clone(force_deepcopy=True)
    separate.cond_stage_model = separate.patcher.model
    assert separate.cond_stage_model is not clip.cond_stage_model
    assert same(encode_all(separate), expected)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_encodings_are_bit_equal_with_weights_left_offloaded(clip, share):
    """As with little VRAM: on a CPU ComfyUI always loads everything, so a share is given back after each load."""
    import comfy.model_management
    from comfy.patcher_extension import CallbacksMP

    before, size = encode_all(clip), clip.patcher.model_size()
    comfy.model_management.unload_all_models()
    partial = clip.clone()
    partial.patcher.add_callback(
        CallbacksMP.ON_LOAD, lambda patcher, *_: patcher.partially_unload(patcher.offload_device, share * size)
    )
    assert same(encode_all(partial), before)
    assert clip.cond_stage_model.model_lowvram and partial.patcher.loaded_size() <= (1 - share) * size + 2**12
    assert same(encode_all(clip), before) and not clip.cond_stage_model.model_lowvram


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "default"])
def test_storage_dtypes(comfyui, t5_folder, dtype):
    clip = t5_clip.load_t5_clip(t5_folder, projection(), dtype=dtype)
    reference = t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp32")
    stored = clip.cond_stage_model.t5base.transformer.shared.weight.dtype
    assert stored == (t5_clip.DTYPES[dtype] or torch.float16)
    left, right = encode(clip, TEXTS[1]), encode(reference, TEXTS[1])
    assert left.dtype == torch.float32
    assert 0 < (left - right).abs().max() < 0.1 * right.std()


def test_scale_reaches_the_target_and_leaves_the_original(clip):
    before = encode_all(clip)
    with torch.inference_mode():
        scaled, report = measure.scale_clip(clip, 0.9)
        again, _ = measure.scale_clip(scaled, 0.2)
    assert report.before.std == pytest.approx(measure.clip_std(clip))
    assert measure.clip_std(scaled) == pytest.approx(0.9, rel=1e-5)
    assert measure.clip_std(again) == pytest.approx(0.2, rel=1e-5)
    states = torch.cat([encode(scaled, prompt)[0] for prompt in PROMPTS])  # tight: every token is real
    assert states.std(unbiased=False).item() == pytest.approx(0.9, rel=1e-4)
    assert same(encode_all(clip), before)


def test_std_of_a_stock_clip_leaves_out_start_token_and_pads(comfyui):
    from types import SimpleNamespace

    import comfy.sd
    from comfy import sd1_clip

    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 2}
    target = SimpleNamespace(clip=sd1_clip.SD1ClipModel, tokenizer=sd1_clip.SD1Tokenizer, params={})
    stock = comfy.sd.CLIP(target, model_options={"clip_l_model_config": small, "dtype": torch.float32})
    with torch.no_grad():
        for parameter in stock.cond_stage_model.parameters():
            parameter.normal_()
    context = encode(stock, "a red apple")  # start, 3 words, end, 72 pads
    expected = context[0, 1:5].std(unbiased=False).item()
    assert measure.clip_std(stock, ["a red apple"]) == pytest.approx(expected, rel=1e-5)
    assert not t5_clip.is_t5_clip(stock)
    for function in (t5_clip.t5_parts, text_encoder.t5_state, lambda clip: measure.scale_clip(clip, 0.9)):
        with pytest.raises(ValueError, match="expected a T5 from Load T5"):
            function(stock)


def test_saved_and_loaded_again_is_bit_equal(clip, t5_folder, tmp_path):
    scaled, _ = measure.scale_clip(t5_clip.clone_with_projection(clip, other_projection()), 0.7)
    save_text_encoder(tmp_path / "te.safetensors", saved_clip.saved_text_encoder(scaled))
    saved = read_text_encoder(tmp_path / "te.safetensors")
    saved.check_width(WIDTH)
    loaded = saved_clip.load_saved_text_encoder(saved, [tmp_path, t5_folder.parent])
    assert same(encode_all(loaded), encode_all(scaled))
    assert saved.target_std == 0.7 == saved_clip.saved_text_encoder(loaded).target_std


def test_target_std_goes_with_a_scaled_clip(clip):
    from retune.nodes.bridge.text_encoder import with_projection
    from retune.nodes.scale import RetuneScaleTextEncoder

    def known(one):
        return saved_clip.saved_text_encoder(one).target_std

    def node(*args, **kwargs):
        with torch.inference_mode():
            return RetuneScaleTextEncoder.execute(*args, prompts="a red circle\na star", **kwargs).result[0]

    scaled = node(clip, "target std", 0.7)
    trained = with_projection(scaled, {"linear.weight": torch.zeros(WIDTH, 64)})
    assert known(scaled) == known(trained) == known(with_lora(trained)) == 0.7
    assert known(node(scaled, "off", 0.3)) == 0.7 and known(node(scaled, "target std", 0.3)) == 0.3
    assert known(node(clip, "match reference", 0.3, reference=scaled)) == pytest.approx(0.7, rel=1e-5)
    assert known(clip) is None and known(t5_clip.clone_with_projection(scaled, other_projection())) is None


def test_errors_before_loading(comfyui, t5_folder, tmp_path):
    with pytest.raises(ValueError, match="reads a width of 8; expected 64"):
        t5_clip.load_t5_clip(t5_folder, Projection(8, WIDTH))
    with pytest.raises(ValueError, match="dtype is 'fp4'"):
        t5_clip.load_t5_clip(t5_folder, projection(), dtype="fp4")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "llama.safetensors")
    with pytest.raises(ValueError, match="llama.safetensors: .*decoder-only"):
        t5_clip.load_t5_clip(tmp_path / "llama.safetensors", projection())


def test_real_vocabulary_takes_comfyuis_tokenizer(comfyui, tmp_path):
    from transformers import T5TokenizerFast

    config = T5Config(vocab_size=32128, d_model=64, d_kv=16, num_heads=4, d_ff=64, num_layers=1)
    T5EncoderModel(config).save_pretrained(tmp_path)
    clip = t5_clip.load_t5_clip(tmp_path, projection())
    stock = T5TokenizerFast.from_pretrained(str(comfyui / "comfy" / "text_encoders" / "t5_tokenizer"))
    for prompt in (*PROMPTS, "", "Ünïcode, 日本 & (parentheses)"):
        ids = [token for token, _ in clip.tokenize(prompt, disable_weights=True)["t5base"][0]]
        assert ids == stock(prompt)["input_ids"]


def test_importing_costs_nothing(comfyui):
    import os
    import subprocess
    import sys

    heavy = ("transformers", "tokenizers", "diffusers", "peft", "scipy")
    code = (
        "import comfy.options; comfy.options.enable_args_parsing(False)\n"
        "from comfy.cli_args import args; args.cpu = True\n"
        "import sys, comfy_api.latest; before = set(sys.modules)\n"
        f"import retune.nodes.clips.t5_clip; print([n for n in {heavy} if n in sys.modules and n not in before])"
    )
    environment = os.environ | {"PYTHONPATH": str(comfyui)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout.strip().endswith("[]"), found.stderr
