"""Blended text encoders in ComfyUI: closed forms, stock nodes on the results, originals untouched."""

from types import SimpleNamespace

import pytest
import torch
from retune.nodes.blend import RetuneBlendTextEncoders
from retune.nodes.clips.t5_clip import clone_with_projection, load_t5_clip, t5_parts
from retune.nodes.common.weights import patched_weight
from retune.training.common.rng import generator
from retune.training.models.concepts import Concept
from retune.training.text_encoder.projection import Projection

pytestmark = pytest.mark.comfyui
PROMPT = "two (small:1.3) red circles"


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=generator(seed, "blend test")) * scale


def blend(weights, *clips, space="weights"):
    given = {f"clip{place}": clip for place, clip in enumerate(clips)}
    with torch.inference_mode():
        return RetuneBlendTextEncoders.execute(given, weights, space).args[0]


def encode(clip, text=PROMPT):
    """Stock CLIPTextEncode."""
    from nodes import CLIPTextEncode

    with torch.inference_mode():
        return CLIPTextEncode().encode(clip, text)[0]


def said(clip, text=PROMPT):
    """Context and pooled output."""
    ((context, more),) = encode(clip, text)
    return context.clone(), more["pooled_output"]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(said(one), said(two), strict=True))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def small(kind, seed=0, dtype=torch.float32):
    """A CLIP of small size that belongs to the test; every weight drawn."""
    import comfy.sd
    from comfy import sd1_clip, sdxl_clip

    classes = {
        "SD1.5": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
        "SDXL": (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer),
    }[kind]
    config = {"num_hidden_layers": 3, "intermediate_size": 64, "hidden_size": 32, "num_attention_heads": 4}
    configs = {f"clip_{letter}_model_config": dict(config) for letter in "lg"}
    with torch.inference_mode():
        target = SimpleNamespace(clip=classes[0], tokenizer=classes[1], params={})
        clip = comfy.sd.CLIP(target, model_options={"dtype": dtype, **configs})
        for place, value in enumerate(clip.cond_stage_model.state_dict().values()):
            value.copy_(drawn(*value.shape, seed=1000 * seed + place, scale=0.1))
    return clip


def state_of(clip):
    return {name: value.clone() for name, value in clip.cond_stage_model.state_dict().items()}


def loaded_by_hand(clip, state):
    with torch.inference_mode():
        for name, value in clip.cond_stage_model.state_dict().items():
            value.copy_(state[name])
    return clip


def lora_for(clip, seed=0):
    """A LoRA of rank 2 on a CLIP-L's attention, in kohya's names."""
    lora = {}
    for name, value in clip.patcher.model.state_dict().items():
        if name.endswith(("q_proj.weight", "v_proj.weight")) and "clip_l." in name:
            rows, columns = value.shape
            layer = name.removeprefix("clip_l.transformer.").removesuffix(".weight").replace(".", "_")
            lora[f"lora_te_{layer}.lora_up.weight"] = drawn(rows, 2, seed=seed, scale=0.3)
            lora[f"lora_te_{layer}.lora_down.weight"] = drawn(2, columns, seed=seed + 1, scale=0.3)
    return lora


def with_lora(clip, seed=0, strength=1.0):
    """A clone with a LoRA, as the stock loader puts it on."""
    from comfy.sd import load_lora_for_models

    with torch.inference_mode():
        return load_lora_for_models(None, clip, lora_for(clip, seed), 0.0, strength)[1]


# --- in weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SD1.5", "SDXL"])
def test_blended_weights_are_those_set_by_hand(comfyui, kind):
    one, two = small(kind), small(kind, seed=1)
    before = [state_of(clip) for clip in (one, two)]
    own = said(one), said(two)
    found = blend("0.3, 0.7", one, two)
    expected = {name: 0.3 * before[0][name] + 0.7 * before[1][name] for name in before[0]}
    hand = loaded_by_hand(small(kind), expected)
    for left, right in zip(said(found), said(hand), strict=True):
        close(left, right)
    assert not torch.allclose(said(found)[0], 0.3 * own[0][0] + 0.7 * own[1][0], atol=1e-3)  # not what they say
    for clip, state, words in zip((one, two), before, own, strict=True):
        assert all(map(torch.equal, said(clip), words))  # and loaded again, without the patches of the blend
        assert all(torch.equal(value, state[name]) for name, value in state_of(clip).items())
    for weights, same in (("1, 0", one), ("0 1", two)):
        assert equal(blend(weights, one, two), same)


def test_loras_count_as_part_of_the_weights_and_go_on_top(demo):
    _, clip, _ = demo
    tuned, halfway = with_lora(clip), with_lora(clip, strength=0.5)
    found = blend("0.5, 0.5", clip, tuned)
    close(said(found)[0], said(halfway)[0])
    close(said(blend("0.5, 0.5", tuned, clip))[0], said(halfway)[0])
    close(said(with_lora(found, strength=0.5))[0], said(tuned)[0])
    attention = {
        name for name in clip.cond_stage_model.state_dict() if name.endswith(("q_proj.weight", "v_proj.weight"))
    }
    assert set(found.patcher.patches) == attention  # what is alike costs nothing


def test_a_clip_l_goes_into_sdxls_pair(comfyui, caplog):
    pair, tuned = small("SDXL"), small("SD1.5", seed=1)
    own, other = state_of(pair), state_of(tuned)
    for weights, share in (("0.25, 0.75", 0.75), ("0, 1", 1.0), ("1, 0", 0.0)):
        mixed = {n: (1 - share) * own[n] + share * other[n] if n in other else own[n] for n in own}
        hand = loaded_by_hand(small("SDXL"), mixed)
        found = blend(weights, pair, tuned)
        close(said(found), said(hand))
        assert not any(name.startswith("clip_g.") for name in found.patcher.patches)
    assert torch.equal(said(blend("0, 1", pair, tuned))[0], said(hand_of("SDXL", own | other))[0])
    with pytest.raises(ValueError, match="text encoder 2 has clip_g, which text encoder 1 .*Connect the one with most"):
        blend("0.5, 0.5", tuned, pair)


def hand_of(kind, state):
    return loaded_by_hand(small(kind), state)


def test_half_precision_is_kept(comfyui):
    pair, tuned = small("SDXL", dtype=torch.float16), small("SD1.5", seed=1, dtype=torch.float16)
    tuned = with_lora(tuned)
    found = blend("0, 1", pair, tuned)
    for name, own in tuned.cond_stage_model.state_dict().items():
        ((_, (_, (value,)), *_),) = found.patcher.patches.get(name) or [(1, ("set", (own,)))]
        assert value.dtype == own.dtype
        assert torch.equal(
            patched_weight(found.patcher, name), patched_weight(tuned.patcher, name).to(own.dtype).float()
        )


def test_t5s_blend_with_their_projections(t5, comfyui):
    with torch.inference_mode():
        other = clone_with_projection(t5, Projection(64, 768, seed=5).scaled(3.0))
        key = next(name for name, value in other.cond_stage_model.named_parameters() if name.endswith("wo.weight"))
        shape = other.cond_stage_model.state_dict()[key].shape
        other.add_patches({key: ("diff", (drawn(*shape),))}, 0.4)
        half = t5.clone()
        half.add_patches({key: ("diff", (drawn(*shape),))}, 0.2)
        maps = [t5_parts(clip).projection for clip in (t5, other)]
        middle = Projection(64, 768)
        middle.linear.weight.data = 0.5 * maps[0].linear.weight * maps[0].scale + 1.5 * maps[1].linear.weight
        half = clone_with_projection(half, middle)
    assert maps[1].scale == 3
    close(said(blend("0.5, 0.5", t5, other))[0], said(half)[0])
    assert torch.equal(said(blend("0, 1", t5, other))[0], said(other)[0])


def test_words_come_from_all_encoders(demo, caplog):
    from retune.nodes.clips.concept_tokens import with_concepts

    _, clip, _ = demo
    heart, star = (Concept(token, {"clip_l": drawn(2, 128, seed=s)}) for s, token in enumerate(("<heart>", "<star>")))
    another = Concept("<heart>", {"clip_l": drawn(1, 128, seed=7)})
    one, two = with_concepts(clip, [heart]), with_concepts(with_lora(clip), [star, another])
    both = with_concepts(with_lora(clip, strength=0.6), [star, another])
    for space in ("weights", "embeddings"):
        text = "<star> <heart>"
        found = said(blend("0.4, 0.6", one, two, space=space), text)[0]
        if space == "weights":
            close(found, said(both, text)[0])
        else:
            close(found, 0.4 * said(with_concepts(clip, [star, another]), text)[0] + 0.6 * said(two, text)[0])
    assert "<heart> differs" in caplog.text
    assert said(one, "<star>")[0].shape == (1, 77, 128)  # and it still knows nothing of the star


def test_what_weights_cannot_hold_is_refused(demo, clips, t5):
    from nodes import CLIPSetLastLayer

    _, clip, _ = demo
    with pytest.raises(ValueError, match='has .* for clip_l.* text encoder 1 has .* space "embeddings"'):
        blend("0.5, 0.5", clip, clips["SD1.5"])
    with pytest.raises(ValueError, match="has t5"):
        blend("0.5, 0.5", clip, t5)
    with pytest.raises(ValueError, match="stops at layer -2.*behind the blend"):
        blend("0.5, 0.5", clip, CLIPSetLastLayer().set_last_layer(clip, -2)[0])
    with pytest.raises(ValueError, match="expected 2, one for each"):
        blend("1", clip, clip)
    with pytest.raises(ValueError, match="text encoder 2 is empty"):
        blend("0.5, 0.5", clip, None)
    with pytest.raises(ValueError, match="no weights of its own"):
        blend("0.5, 0.5", blend("0.5, 0.5", clip, with_lora(clip), space="embeddings"), clip)
    narrow = clone_with_projection(t5, Projection(64, 32))
    with pytest.raises(ValueError, match="projection of text encoder 2"):
        blend("0.5, 0.5", t5, narrow)


# --- in embeddings ----------------------------------------------------------------------------------------------------


def test_blended_embeddings_are_the_weighted_sum(demo):
    _, clip, _ = demo
    others = [clip, with_lora(clip), with_lora(clip, seed=5)]
    shares = (0.2, 0.5, 0.3)
    found = blend("0.2 0.5 0.3", *others, space="embeddings")
    for place in (0, 1):
        close(said(found)[place], sum(w * said(each)[place] for w, each in zip(shares, others, strict=True)))
    close(said(found.clone())[0], said(found)[0])
    nested = blend("0.5, 0.5", found, clip, space="embeddings")
    close(said(nested)[0], 0.5 * said(found)[0] + 0.5 * said(clip)[0])
    for weights, same in (("1, 0", clip), ("0, 1", others[1])):
        assert equal(blend(weights, clip, others[1], space="embeddings"), same)


def test_stock_nodes_reach_every_encoder_of_a_blend(demo):
    from retune.nodes.bridge.lora_patches import Row, apply_loras, lora_of

    from nodes import CLIPSetLastLayer

    model, clip, _ = demo
    tuned = with_lora(clip)
    found = blend("0.4, 0.6", clip, tuned, space="embeddings")
    before = said(found)[0]
    lora = with_lora(found, seed=9)
    close(said(lora)[0], 0.4 * said(with_lora(clip, seed=9))[0] + 0.6 * said(with_lora(tuned, seed=9))[0])
    rows = [Row(lora_of("own loader", lora_for(clip, seed=9)), 0.0, 1.0)]
    with torch.inference_mode():
        assert equal(apply_loras(model, found, rows)[1], lora)
    skip = [CLIPSetLastLayer().set_last_layer(each, -2)[0] for each in (found, clip, tuned)]
    close(said(skip[0])[0], 0.4 * said(skip[1])[0] + 0.6 * said(skip[2])[0])
    assert torch.equal(said(found)[0], before)


def test_a_blend_of_an_sdxl_pair_reads_both_texts(small_sdxl_clip):
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    size = {f"{name}{end}": 64 for name in ("", "target_") for end in ("width", "height")} | {"crop_w": 0, "crop_h": 0}
    tuned = with_lora(small_sdxl_clip)
    found = blend("0.5, 0.5", small_sdxl_clip, tuned, space="embeddings")
    with torch.inference_mode():
        texts = {"text_g": "a cat", "text_l": "in winter"}
        one, two, both = (
            CLIPTextEncodeSDXL.execute(c, **size, **texts).args[0] for c in (small_sdxl_clip, tuned, found)
        )
    assert both[0][1]["target_width"] == 64
    close(both[0][0], 0.5 * one[0][0] + 0.5 * two[0][0])
    close(both[0][1]["pooled_output"], 0.5 * one[0][1]["pooled_output"] + 0.5 * two[0][1]["pooled_output"])


def test_unlike_encoders_of_one_width_are_blended(demo, caplog):
    from retune.nodes.clips.blended_clip import TOKENS

    _, clip, _ = demo
    with torch.inference_mode():
        t5 = load_t5_clip("demo", Projection(96, 128))
    found = blend("0.5, 0.5", clip, t5, space="embeddings")
    context, pooled = said(found)
    own, other = said(clip), said(t5)
    length = other[0].shape[1]
    assert context.shape == (1, 77, 128)
    if 77 % length:
        close(context[:, :length], 0.5 * own[0][:, :length] + 0.5 * other[0])
        close(context[:, length:], 0.5 * own[0][:, length:] + 0.5 * other[0][:, -1:])
    assert torch.equal(pooled, own[1])
    tokens = found.tokenize(PROMPT)
    assert TOKENS in tokens and found.encode_from_tokens(tokens).shape == (1, 77, 128)
    tokens["l"] = found.tokenize("another")["l"]
    with pytest.raises(ValueError, match="a text for each encoder of a pair"):
        found.encode_from_tokens(tokens)
    with pytest.raises(ValueError, match="tokens are another CLIP's"):
        found.encode_from_tokens(clip.tokenize(PROMPT))


def test_a_timestep_resampler_blends_band_by_band(demo):
    projections = [Projection(96, 128, "timestep resampler", tokens=5, layers=1, seed=seed) for seed in (0, 1)]
    with torch.inference_mode():
        one, two = (load_t5_clip("demo", projection) for projection in projections)
    found = encode(blend("0.5, 0.5", one, two, space="embeddings"))
    assert len(found) == 23
    for (left, more), (first, same), (second, _) in zip(found, encode(one), encode(two), strict=True):
        close(left, 0.5 * first + 0.5 * second)
        assert more["start_percent"] == same["start_percent"] and more["end_percent"] == same["end_percent"]
    with pytest.raises(ValueError, match="give 1, 23 conditionings"):
        encode(blend("0.5, 0.5", demo[1], one, space="embeddings"))


def test_what_a_sum_cannot_do_is_refused(demo, clips, tmp_path):
    import comfy.hooks
    import comfy.sd
    from comfy_extras.nodes_hooks import SetClipHooks
    from comfy_extras.nodes_model_merging import CLIPSave
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.scale import RetuneScaleTextEncoder

    model, clip, vae = demo
    found = blend("0.4, 0.6", clip, with_lora(clip), space="embeddings")
    with pytest.raises(ValueError, match="context: batch x width is 1 x 128, 1 x 32"):
        blend("0.5, 0.5", clip, clips["SD1.5"], space="embeddings")
    with pytest.raises(ValueError, match="no weights of its own"):
        CLIPSave().save(found, "blend")
    with pytest.raises(ValueError, match="no weights of its own"):
        with text_to_image(model, found, vae):
            pass
    with pytest.raises(ValueError, match="expected a T5"):
        RetuneScaleTextEncoder.execute(found, "target std", 0.2)
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    (hooked,) = SetClipHooks().apply_hooks(found, False, True, hooks)
    with pytest.raises(ValueError, match="no weights of its own"):
        encode(hooked)
    (hooked,) = SetClipHooks().apply_hooks(clip, False, True, hooks)
    with pytest.raises(ValueError, match="text encoder 2 has hooks"):
        blend("0.5, 0.5", clip, hooked)
