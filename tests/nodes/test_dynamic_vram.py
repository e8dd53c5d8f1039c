"""Models under ComfyUI's dynamic VRAM: our loaders leave a recipe, other loaders' weights are copied, none changes."""

import pytest
import torch
from retune.training.text_encoder.projection import Projection

from .test_training_layers import quantised_layer


def state_of(patcher):
    return {name: value.clone() for name, value in patcher.model.state_dict().items()}


def expect_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.fixture
def demo_of_files(dynamic_vram, demo):
    assert all(type(patcher) is dynamic_vram for patcher in (demo[0], demo[1].patcher, demo[2].patcher))
    return demo


def without_recipes(*patchers):
    for patcher in patchers:
        patcher.cached_patcher_init = None


@pytest.mark.parametrize("recipes", [True, False])
def test_a_static_clone_has_the_weights_and_none_of_the_original_s(demo_of_files, sampled, recipes):
    from comfy.model_patcher import ModelPatcher
    from retune.nodes.bridge.static import MANAGED, static_clip, static_clone, static_vae

    model, clip, vae = demo_of_files
    if not recipes:
        without_recipes(model, clip.patcher, vae.patcher)
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    with torch.inference_mode():
        model.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))})
        drawn, decoded = sampled(model, clip), vae.decode(torch.ones(1, 4, 8, 8)).clone()
    originals = (model, clip.patcher, vae.patcher)
    before = [state_of(patcher) for patcher in originals]
    with torch.inference_mode():
        statics = static_clone(model), static_clip(clip), static_vae(vae)
        patchers = [statics[0], statics[1].patcher, statics[2].patcher]
        for patcher, original, state in zip(patchers, originals, before, strict=True):
            assert type(patcher) is ModelPatcher and patcher.model is not original.model
            expect_same(state_of(patcher), state)
            assert not any(value.is_inference() for value in patcher.model.state_dict().values())
            if not recipes:
                assert not {name for module in patcher.model.modules() for name in vars(module)} & set(MANAGED)
            assert patcher.cached_patcher_init == original.cached_patcher_init
        assert torch.equal(sampled(*statics[:2]), drawn)
        assert torch.equal(statics[2].decode(torch.ones(1, 4, 8, 8)), decoded)
        shared = {value.data_ptr() for original in originals for value in original.model.state_dict().values()}
        assert not shared & {value.data_ptr() for patcher in patchers for value in patcher.model.state_dict().values()}
        assert torch.equal(sampled(model, clip), drawn)
    for original, state in zip(originals, before, strict=True):
        expect_same(state_of(original), state)


def test_comfyui_alone_cannot_make_one_without_a_recipe(demo_of_files):
    model = demo_of_files[0]
    without_recipes(model)
    with pytest.raises(RuntimeError, match="Cannot create non-dynamic delegate"):
        model.clone(disable_dynamic=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_static_t5_is_the_t5_with_its_projection(dynamic_vram, comfyui, dtype):
    from retune.nodes.bridge.static import static_clip
    from retune.nodes.clips.t5_clip import clone_with_projection, load_t5_clip, t5_parts

    with torch.inference_mode():
        clip = clone_with_projection(
            load_t5_clip("demo", Projection(96, 128), dtype=dtype), Projection(96, 128, seed=1)
        )
        expected = clip.encode_from_tokens(clip.tokenize("two small blue squares")).clone()
        static = static_clip(clip)
        assert not static.patcher.is_dynamic() and static.cond_stage_model is static.patcher.model
        assert torch.equal(static.encode_from_tokens(static.tokenize("two small blue squares")), expected)
        assert torch.equal(t5_parts(static).projection.linear.weight, t5_parts(clip).projection.linear.weight)


def saved_clip(clip, path):
    """The demo's CLIP as Save Text Encoder writes it, opened again."""
    from retune.nodes.clips.saved_clip import open_text_encoder, save_clip

    (file,), _ = save_clip(clip, "dynamic", {})
    return open_text_encoder(file)[0]


def saved_t5(clip, path):
    from retune.nodes.clips.saved_clip import open_text_encoder, saved_text_encoder
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.text_encoder.file import save_text_encoder

    save_text_encoder(path, saved_text_encoder(load_t5_clip("demo", Projection(96, 128, seed=2))))
    return open_text_encoder(path)[0]


def kept_beside_a_t5(clip, path):
    from retune.nodes.clips.t5_clip import load_t5_clip

    return load_t5_clip("demo", Projection(96, 128), keep_clip=clip)


def with_a_word(clip, path):
    from retune.nodes.clips.concept_tokens import with_concepts
    from retune.training.models.concepts import Concept

    return with_concepts(clip, [Concept("<thing>", {"clip_l": torch.linspace(-1, 1, 256).view(2, 128)})])


@pytest.mark.parametrize("load", [saved_clip, saved_t5, kept_beside_a_t5, with_a_word])
def test_what_our_loaders_make_has_a_static_clone_that_encodes_alike(demo_of_files, tmp_path, load):
    from retune.nodes.bridge.static import static_clip

    with torch.inference_mode():
        clip = load(demo_of_files[1], tmp_path / "saved.safetensors")
        assert clip.patcher.is_dynamic()
        expected, before = clip.encode_from_tokens(clip.tokenize("a red <thing>")).clone(), state_of(clip.patcher)
        static = static_clip(clip)
        assert not static.patcher.is_dynamic() and type(static.tokenizer) is type(clip.tokenizer)
        assert torch.equal(static.encode_from_tokens(static.tokenize("a red <thing>")), expected)
    expect_same(state_of(clip.patcher), before)


def test_file_and_model_may_differ_in_dtype(dynamic_vram, comfyui):
    """A file in fp32 for a model in bf16, as ComfyUI loads VAEs: every kind of layer, read again or copied."""
    import comfy.model_management
    import comfy.ops
    from retune.nodes.bridge.static import static_clone
    from retune.nodes.common.weights import patched_weight

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.device = None
            self.linear = comfy.ops.disable_weight_init.Linear(64, 96, dtype=torch.bfloat16)
            self.conv = comfy.ops.disable_weight_init.Conv2d(64, 96, 3, dtype=torch.bfloat16)
            self.norm = comfy.ops.disable_weight_init.LayerNorm(64, dtype=torch.bfloat16)

    def load(disable_dynamic=False):
        from comfy.model_patcher import ModelPatcher

        model = Model()
        comfy.model_management.archive_model_dtypes(model)
        kind = ModelPatcher if disable_dynamic else dynamic_vram
        patcher = kind(model, torch.device("cpu"), torch.device("cpu"))
        model.load_state_dict(file, assign=patcher.is_dynamic())
        patcher.cached_patcher_init = (load, ())
        return patcher

    random = torch.Generator().manual_seed(0)
    shapes = {"linear.weight": (96, 64), "linear.bias": (96,), "conv.weight": (96, 64, 3, 3), "conv.bias": (96,)}
    shapes |= {"norm.weight": (64,), "norm.bias": (64,)}
    file = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    patcher = load()
    read_again = static_clone(patcher)
    without_recipes(patcher)
    for loaded in (False, True):
        if loaded:
            comfy.model_management.load_models_gpu([patcher])
        for static in (read_again, static_clone(patcher)):
            expect_same(static.model.state_dict(), {name: value.bfloat16() for name, value in file.items()})
            assert static.model_size() == sum(2 * value.numel() for value in file.values())
        for name, value in file.items():
            assert torch.equal(patched_weight(patcher, name), value.bfloat16().float())


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4"])
def test_quantised_weights_are_copied_as_they_are(dynamic_vram, comfyui, kind):
    import comfy.model_management
    from retune.nodes.bridge.static import static_clone

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.device = None
            self.layer, self.stands_for = quantised_layer(kind, torch.linspace(-2, 2, 64 * 128).view(64, 128), None)

    with torch.inference_mode():
        model = Model()
        comfy.model_management.archive_model_dtypes(model)
        patcher = dynamic_vram(model, torch.device("cpu"), torch.device("cpu"))
        static = static_clone(patcher)
    one, other = static.model.layer.weight, model.layer.weight
    assert type(one) is type(other) and one.nbytes == other.nbytes and one.data_ptr() != other.data_ptr()
    assert torch.equal(one.dequantize(), model.stands_for) and not one.is_inference()


def test_what_cannot_be_copied_is_refused_with_a_reason(demo_of_files):
    from retune.nodes.bridge.static import static_clone

    model = demo_of_files[0]
    without_recipes(model)
    computed = torch.ones(1, requires_grad=True) * 2
    model.model.computed = computed
    with pytest.raises(ValueError, match="BaseModel .* cannot be copied .*graph.* --disable-dynamic-vram"):
        static_clone(model)


def test_a_bypass_lora_is_refused(demo_of_files, sampled):
    """ComfyUI binds it to the layers of the very model that it was put on, and would leave it out without a word."""
    import comfy.weight_adapter
    from comfy.weight_adapter.bypass import BypassInjectionManager
    from retune.nodes.bridge.static import static_clone

    model, clip, _ = demo_of_files
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    width, context = model.model.state_dict()[f"{key}.weight"].shape
    factors = torch.ones(width, 2), torch.ones(2, context)
    manager = BypassInjectionManager()
    manager.add_adapter(f"{key}.weight", comfy.weight_adapter.LoRAAdapter(set(), (*factors, 2.0, None, None, None)))
    with_lora = model.clone()
    with_lora.set_injections("bypass_lora", manager.create_injections(with_lora.model))
    drawn = sampled(with_lora, clip)
    with pytest.raises(ValueError, match=r"bypass.*Load LoRA.*--disable-dynamic-vram"):
        static_clone(with_lora)
    assert torch.equal(sampled(with_lora, clip), drawn) and not torch.equal(sampled(model, clip), drawn)


def test_states_follow_the_projection_to_its_device(comfyui):
    """With --lowvram and without dynamic VRAM ComfyUI keeps text encoders on the CPU; "meta" stands for the GPU."""
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.nodes.clips.t5_clip import load_t5_clip

    encoder = ComfyTextEncoder(load_t5_clip("demo", Projection(96, 128)))
    encoder.projection.to("meta")
    with torch.no_grad():
        context = encoder.encode(encoder.tokenize(["a red circle"])).context
    assert context.device.type == "meta" and context.shape[2] == 128


@pytest.mark.parametrize("file", [torch.float32, torch.float16])
def test_the_fingerprints_do_not_depend_on_what_is_loaded(demo_of_files, file):
    """A file in another dtype than the VAE's: dynamic VRAM casts weights when it loads them."""
    from comfy.model_management import load_models_gpu
    from retune.nodes.bridge.autoencoder import ComfyAutoencoder
    from retune.nodes.bridge.text_encoder import fingerprint_of

    model, clip, vae = demo_of_files
    for name, value in vae.first_stage_model.named_parameters():
        path, _, attribute = name.rpartition(".")
        owner = vae.first_stage_model.get_submodule(path)
        owner._parameters[attribute] = torch.nn.Parameter(value.detach().to(file), requires_grad=False)
        setattr(owner, f"{attribute}_comfy_model_dtype", torch.bfloat16)
    vae.vae_dtype = torch.bfloat16

    def fingerprints():
        return ComfyAutoencoder(vae, model.model.latent_format).fingerprint, fingerprint_of(clip)

    before = fingerprints()
    load_models_gpu([vae.patcher, clip.patcher])
    assert vae.patcher.backup and fingerprints() == before
