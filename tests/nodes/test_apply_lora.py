"""LoRA files of every layout and kind on ComfyUI's models: W' as computed by hand, evaluated as ComfyUI does."""

import json
import logging
import pickle
import re
from itertools import count as counted
from pathlib import Path

import pytest
import torch
from retune.training.models import ldm
from safetensors.torch import save_file

pytestmark = pytest.mark.comfyui

RANK = 3
UNET_KEY = "diffusion_model."
NUMBERS = counted(1)
WORKFLOWS = Path(__file__).parents[1] / "workflows"


def drawn(*shape, seed=0, scale=0.3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- models -----------------------------------------------------------------------------------------------------------


def weights_of(patcher):
    """All weights with patches, as ComfyUI puts them in effect before it samples; the patcher is left without."""
    with torch.inference_mode():
        try:
            patcher.patch_model(torch.device("cpu"))
            return {name: value.clone() for name, value in patcher.model.state_dict().items()}
        finally:
            patcher.unpatch_model(torch.device("cpu"))


def differ(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def lora_path(ending=".safetensors"):
    """A new name in models/loras."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{next(NUMBERS)}{ending}"


def write(tensors, metadata=None):
    path = lora_path()
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path.name


def apply(model, clip=None, *loras, off=(), **options):
    """(MODEL, CLIP, report) of the node; loras: a file's name, or (name, strength_model, strength_clip, blocks).

    off: numbers of rows that are not enabled.
    """
    from retune.nodes.lora import RetuneApplyLora

    count = {"count": str(max(1, len(loras))), "lora_1": "none", "strength_model_1": 1.0, "strength_clip_1": 1.0}
    for number, lora in enumerate(loras, 1):
        name, *more = lora if isinstance(lora, tuple) else (lora,)
        strength_model, strength_clip, blocks = (*more, *(1.0, 1.0, "")[len(more) :])
        row = {"lora": name, "strength_model": strength_model, "strength_clip": strength_clip, "blocks": blocks}
        row["enabled"] = number not in off
        count |= {f"{name}_{number}": value for name, value in row.items()}
    with torch.inference_mode():
        return RetuneApplyLora.execute(model, count, clip=clip, **options).result


# --- kinds: tensors of one layer by LyCORIS's names, and the weight that comes of it ----------------------------------


def product(a, b):
    return a.reshape(a.shape[0], -1) @ b.reshape(b.shape[0], -1)


def lora(shape, seed=0, alpha=1.5):
    kernel = shape[2:]
    down, up = drawn(RANK, *shape[1:], seed=seed), drawn(shape[0], RANK, *(1 for _ in kernel), seed=seed + 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return tensors, lambda w: w + alpha / RANK * product(up, down).reshape(shape)


def lora_without_alpha(shape, seed=0):
    tensors, result = lora(shape, seed, alpha=float(RANK))
    del tensors["alpha"]
    return tensors, result


def lora_half(shape, seed=0):
    tensors, _ = lora(shape, seed)
    tensors = {name: value.half() for name, value in tensors.items()}
    up, down = tensors["lora_up.weight"].float(), tensors["lora_down.weight"].float()
    return tensors, lambda w: w + 0.5 * product(up, down).reshape(shape)


def flattened(shape, seed=0):
    """As ComfyUI's own trainer saves a convolution."""
    tensors, result = lora(shape, seed)
    return {name: value.flatten(1) if value.ndim else value for name, value in tensors.items()}, result


def locon_tucker(shape, seed=0):
    up, down = drawn(shape[0], RANK, 1, 1, seed=seed), drawn(RANK, shape[1], 1, 1, seed=seed + 1)
    mid = drawn(RANK, RANK, *shape[2:], seed=seed + 2)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(2.0)}
    change = torch.einsum("om,mnhw,ni->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    return tensors, lambda w: w + 2 / RANK * change


def loha_difference(shape, seed, alpha):
    columns = shape[1:].numel()
    a1, a2 = (drawn(shape[0], RANK, seed=seed + i, scale=0.7) for i in (0, 1))
    b1, b2 = (drawn(RANK, columns, seed=seed + i, scale=0.7) for i in (2, 3))
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(alpha)}
    return tensors, alpha / RANK * ((a1 @ b1) * (a2 @ b2)).reshape(shape)


def loha(shape, seed=0):
    tensors, change = loha_difference(shape, seed, 2.0)
    return tensors, lambda w: w + change


def loha_tucker(shape, seed=0):
    tensors, changes = {"alpha": torch.tensor(1.0)}, []
    for i in (1, 2):
        core, rows = drawn(RANK, RANK, *shape[2:], seed=seed + i), drawn(RANK, shape[0], seed=seed + 2 + i)
        columns = drawn(RANK, shape[1], seed=seed + 4 + i)
        tensors |= {f"hada_t{i}": core, f"hada_w{i}_a": rows, f"hada_w{i}_b": columns}
        changes.append(torch.einsum("rshw,ro,si->oihw", core, rows, columns))
    return tensors, lambda w: w + changes[0] * changes[1] / RANK


def kron(a, b):
    """(p r, q s, ...) of a (p, q) and b (r, s, ...)."""
    product = torch.einsum("pq,rs...->prqs...", a, b)
    return product.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1], *b.shape[2:])


def lokr(shape, seed=0):
    """Both factors whole: alpha means nothing."""
    w1, w2 = drawn(4, 4, seed=seed), drawn(shape[0] // 4, shape[1] // 4, *shape[2:], seed=seed + 1)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, lambda w: w + kron(w1, w2)


def lokr_low_rank(shape, seed=0):
    w1, a = drawn(4, 4, seed=seed), drawn(shape[0] // 4, RANK, seed=seed + 1)
    b = drawn(RANK, shape[1:].numel() // 4, seed=seed + 2)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(2.0)}
    w2 = (a @ b).reshape(shape[0] // 4, shape[1] // 4, *shape[2:])
    return tensors, lambda w: w + 2 / RANK * kron(w1, w2)


def lokr_both_low_rank(shape, seed=0):
    tensors, _ = lokr_low_rank(shape, seed)
    a, b = drawn(4, RANK, seed=seed + 8), drawn(RANK, 4, seed=seed + 9)
    w2 = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(shape[0] // 4, shape[1] // 4, *shape[2:])
    del tensors["lokr_w1"]
    return tensors | {"lokr_w1_a": a, "lokr_w1_b": b}, lambda w: w + 2 / RANK * kron(a @ b, w2)


def lokr_tucker(shape, seed=0):
    w1, core = drawn(4, 4, seed=seed), drawn(RANK, RANK, *shape[2:], seed=seed + 1)
    a, b = drawn(RANK, shape[0] // 4, seed=seed + 2), drawn(RANK, shape[1] // 4, seed=seed + 3)
    tensors = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return tensors, lambda w: w + kron(w1, torch.einsum("rshw,ro,si->oihw", core, a, b)) / RANK


def norms(w, axis):
    return w.transpose(0, axis).flatten(1).norm(dim=1)


def dora(axis, kind=lora):
    """m (W + dW) / ||W + dW||, one m per output (axis 0) or input (1)."""

    def make(shape, seed=0):
        tensors, result = kind(shape, seed)
        sizes = [shape[axis] if i == axis else 1 for i in range(len(shape))]
        scale = drawn(shape[axis], seed=seed + 5).abs() + 0.5
        return tensors | {
            "dora_scale": scale.reshape(sizes)
        }, lambda w: result(w) * (scale / norms(result(w), axis)).reshape(sizes)

    return make


def flat_dora(shape, seed=0):
    """One number per output without further axes, as some converters write it."""
    tensors, result = dora(0)(shape, seed)
    return tensors | {"dora_scale": tensors["dora_scale"].flatten()}, result


def full(shape, seed=0):
    return {"diff": drawn(*shape, seed=seed)}, lambda w: w + drawn(*shape, seed=seed)


def whole(shape, seed=0):
    return {"set_weight": drawn(*shape, seed=seed)}, lambda w: drawn(*shape, seed=seed)


def oft(shape, seed=0):
    """Cayley: every block of 8 outputs is rotated by (I + Q)(I - Q)^-1, Q = B - B^T."""
    blocks = drawn(shape[0] // 8, 8, 8, seed=seed, scale=0.1)
    q = blocks - blocks.mT
    rotation = (torch.eye(8) + q) @ torch.linalg.inv(torch.eye(8) - q)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    return tensors, lambda w: torch.einsum("knm,kn...->km...", rotation, w.reshape(-1, 8, *shape[1:])).reshape(shape)


LINEAR = "output_blocks.5.1.transformer_blocks.0.attn2.to_k"
SQUARE = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
POINT = "middle_block.1.proj_in"
CONV = "input_blocks.4.0.in_layers.2"
KINDS = {
    "LoRA": (lora, (LINEAR, SQUARE, POINT), "LoRA"),
    "LoRA without alpha": (lora_without_alpha, (LINEAR, CONV), "LoCon + LoRA"),
    "LoRA in fp16": (lora_half, (LINEAR,), "LoRA"),
    "LoCon": (lora, (CONV,), "LoCon"),
    "flattened LoCon": (flattened, (CONV,), "LoRA"),
    "LoCon, tucker": (locon_tucker, (CONV,), "LoCon"),
    "LoHa": (loha, (LINEAR, CONV), "LoHa"),
    "LoHa, tucker": (loha_tucker, (CONV,), "LoHa"),
    "LoKr": (lokr, (LINEAR, CONV), "LoKr"),
    "LoKr, low rank": (lokr_low_rank, (LINEAR, CONV), "LoKr"),
    "LoKr, both low rank": (lokr_both_low_rank, (LINEAR,), "LoKr"),
    "LoKr, tucker": (lokr_tucker, (CONV,), "LoKr"),
    "DoRA, outputs": (dora(0), (LINEAR, SQUARE, POINT, CONV), "DoRA"),
    "DoRA, inputs": (dora(1), (LINEAR, SQUARE, CONV), "DoRA"),
    "DoRA, flat": (flat_dora, (LINEAR, SQUARE), "DoRA"),
    "LoHa with DoRA": (dora(0, loha), (LINEAR,), "LoHa with DoRA"),
    "LoKr with DoRA": (dora(1, lokr_low_rank), (LINEAR,), "LoKr with DoRA"),
    "full": (full, (LINEAR, POINT), "full diff"),
    "whole weight": (whole, (LINEAR,), "full diff"),
    "OFT": (oft, (LINEAR, CONV), "OFT"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_weight_worked_out_by_hand(sd15, kind):
    model, _ = sd15
    make, layers, name = KINDS[kind]
    before, tensors, expected = weights_of(model), {}, {}
    for seed, layer in enumerate(layers):
        key = f"{UNET_KEY}{layer}.weight"
        parts, result = make(before[key].shape, seed=10 * seed)
        tensors |= {f"lora_unet_{layer.replace('.', '_')}.{part}": value for part, value in parts.items()}
        expected[key] = result(before[key])
    file = write(tensors)
    patched, _, report = apply(model, None, file)
    after = weights_of(patched)
    for key, value in expected.items():
        assert (value - before[key]).abs().max() > 0.01
        torch.testing.assert_close(after[key], value, atol=2e-5, rtol=2e-5)
    assert differ(before, after) == set(expected)
    assert f"kohya {name}" in report and f"{len(tensors)} of {len(tensors)} keys used" in report
    assert not differ(before, weights_of(model))
    halved = weights_of(apply(model, None, (file, 0.5))[0])
    for key, value in expected.items():  # half the way, whatever the kind
        torch.testing.assert_close(halved[key], (before[key] + value) / 2, atol=2e-5, rtol=2e-5)


# --- layouts ----------------------------------------------------------------------------------------------------------


def underscored(prefix):
    return lambda path: prefix + path.replace(".", "_")


def dotted(prefix):
    return lambda path: prefix + path


def processor(path):
    """diffusers before peft: only attention, no index after to_out."""
    return "unet." + re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1", path)


KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}
PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
ADAPTER = {"down": ".lora_A.default_0.weight", "up": ".lora_B.default_0.weight"}
OLD = {"down": "_lora.down.weight", "up": "_lora.up.weight"}
UNET_LAYOUTS = {  # how a layer is called, by its diffusers (True) or original name; endings; what the report says
    "kohya": (underscored("lora_unet_"), True, KOHYA, "kohya"),
    "kohya, original names": (underscored("lora_unet_"), False, KOHYA, "kohya"),
    "diffusers": (dotted("unet."), True, PEFT, "diffusers"),
    "diffusers before peft": (processor, True, OLD, "diffusers"),
    "peft": (dotted("base_model.model."), True, PEFT, "peft"),
    "LyCORIS": (underscored("lycoris_"), True, KOHYA, "LyCORIS"),
    "LyCORIS, original names": (underscored("lycoris_"), False, KOHYA, "LyCORIS"),
    "ComfyUI": (dotted("diffusion_model."), False, KOHYA, "ComfyUI"),
    "OneTrainer": (dotted("unet."), False, KOHYA, "OneTrainer"),
    "diffusers before peft, no component": (lambda p: processor(p).removeprefix("unet."), True, OLD, "diffusers"),
    "peft's state, no component": (dotted(""), True, PEFT, "diffusers"),
    "another adapter": (dotted("unet."), True, ADAPTER, "diffusers"),
    "peft in a pipeline": (dotted("unet.base_model.model."), True, PEFT, "peft"),
    "compiled": (dotted("unet._orig_mod."), True, PEFT, "diffusers"),
}


def attention_layers(model):
    names = model.model.state_dict()
    return [
        n.removeprefix(UNET_KEY).removesuffix(".weight") for n in names if re.search(r"attn\d\.to_\w+(\.0)?\.weight", n)
    ]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", UNET_LAYOUTS)
def test_every_layout_reaches_every_attention_layer_of_the_unet(request, layout, family):
    model, names = request.getfixturevalue(family)
    call, by_diffusers, endings, title = UNET_LAYOUTS[layout]
    before, tensors, expected = weights_of(model), {}, {}
    layers = attention_layers(model)
    for seed, layer in enumerate(layers):
        name = call(ldm.rename(layer, names) if by_diffusers else layer)
        expected |= {f"{UNET_KEY}{layer}.weight": add_layer(tensors, before, f"{UNET_KEY}{layer}", name, endings, seed)}
    patched, _, report = apply(model, None, write(tensors))
    after = weights_of(patched)
    assert len(expected) > 90 and differ(before, after) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(after[key], value, atol=1e-5, rtol=1e-5)
    assert f": {title}" in report and f"used: {len(layers)} layers of the model, 0 of the text encoder" in report
    assert "not used" not in report
    check_warnings(report, call("x"))


def check_warnings(report, name):
    """None, but for peft's files without the settings that have their alpha."""
    warnings = [line for line in report.splitlines() if "warning" in line]
    assert len(warnings) == ("base_model.model." in name)
    assert all("without the adapter_config.json that has its alpha" in line for line in warnings)


def add_layer(tensors, weights, layer, name, endings, seed):
    """Puts a random LoRA for `layer` into `tensors` under a name; the weight that comes of it."""
    weight = weights[f"{layer}.weight"]
    parts, result = lora(weight.shape, seed) if "alpha" in endings else lora_without_alpha(weight.shape, seed)
    roles = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    tensors |= {name + ending: parts[roles[role]] for role, ending in endings.items()}
    return result(weight)


def text_path(key):
    return key.partition(".transformer.")[2]


TEXT_LAYOUTS = {  # (CLIP, part of it), how a layer is called, endings
    "kohya SD1.5": ("SD1.5", "clip_l", underscored("lora_te_"), KOHYA),
    "kohya SD2": ("SD2", "clip_h", underscored("lora_te_"), KOHYA),
    "kohya SDXL 1": ("SDXL", "clip_l", underscored("lora_te1_"), KOHYA),
    "kohya SDXL 2": ("SDXL", "clip_g", underscored("lora_te2_"), KOHYA),
    "diffusers SD1.5": ("SD1.5", "clip_l", dotted("text_encoder."), PEFT),
    "diffusers SDXL 1": ("SDXL", "clip_l", dotted("text_encoder."), PEFT),
    "diffusers SDXL 2": ("SDXL", "clip_g", dotted("text_encoder_2."), PEFT),
    "transformers 5": ("SD1.5", "clip_l", lambda p: "text_encoder." + p.removeprefix("text_model."), PEFT),
    "peft": ("SD1.5", "clip_l", dotted("base_model.model."), PEFT),
    "peft, another adapter": ("SD1.5", "clip_l", dotted("text_encoder.base_model.model."), ADAPTER),
    "transformers' state": ("SDXL", "clip_l", lambda p: p.removeprefix("text_model."), PEFT),
    "T5's state": ("T5", "t5base", dotted(""), PEFT),
    "OneTrainer SD1.5": ("SD1.5", "clip_l", dotted("clip_l."), KOHYA),
    "OneTrainer SDXL 2": ("SDXL", "clip_g", dotted("clip_g."), KOHYA),
    "ComfyUI SDXL": ("SDXL", "clip_g", dotted("text_encoders.clip_g.transformer."), KOHYA),
    "kohya T5": ("T5", "t5base", underscored("lora_te_"), KOHYA),
    "OneTrainer T5": ("T5", "t5base", underscored("lora_te3_"), KOHYA),
    "diffusers T5": ("T5", "t5base", dotted("text_encoder."), PEFT),
    "ComfyUI T5": ("T5", "t5base", dotted("text_encoders.t5base.transformer."), KOHYA),
}


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_every_layout_reaches_every_layer_of_the_text_encoder(sd15, clips, t5, layout):
    family, part, call, endings = TEXT_LAYOUTS[layout]
    clip = t5 if family == "T5" else clips[family]
    before, tensors, expected = weights_of(clip.patcher), {}, {}
    wanted = (
        rf"^{part}\.transformer\.(text_model\.encoder\.layers|encoder\.block)\..*(attn|mlp|Attention|Dense).*weight$"
    )
    for seed, key in enumerate(key for key in before if re.search(wanted, key) and "relative" not in key):
        layer = key.removesuffix(".weight")
        expected[key] = add_layer(tensors, before, layer, call(text_path(layer)), endings, seed)
    _, patched, report = apply(sd15[0], clip, write(tensors))
    after = weights_of(patched.patcher)
    assert len(expected) >= 14 and differ(before, after) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(after[key], value, atol=1e-5, rtol=1e-5)
    assert f"used: 0 layers of the model, {len(expected)} of the text encoder" in report
    check_warnings(report, call("text_model.x"))
    assert not differ(before, weights_of(clip.patcher))


# --- several files, strengths, blocks ---------------------------------------------------------------------------------


def kohya(layer, parts):
    return {f"lora_unet_{layer.replace('.', '_')}.{part}": value for part, value in parts.items()}


def test_several_files_add_up_as_the_formula_says(sd15, clips):
    model, clip = sd15[0], clips["SD1.5"]
    before, text_before = weights_of(model), weights_of(clip.patcher)
    text = "text_model.encoder.layers.1.mlp.fc1"
    key, text_key = f"{UNET_KEY}{LINEAR}.weight", f"clip_l.transformer.{text}.weight"
    files, change, text_change = [], 0, 0
    for seed, (strength_model, strength_clip) in enumerate([(0.7, 0.2), (-1.3, 1.0), (1.0, -0.5)]):
        parts, result = lora(before[key].shape, 10 * seed, alpha=1.0 + seed)
        text_parts, text_result = loha(text_before[text_key].shape, 10 * seed)
        named = {f"lora_te_{text.replace('.', '_')}.{part}": value for part, value in text_parts.items()}
        files.append((write(kohya(LINEAR, parts) | named), strength_model, strength_clip))
        change += strength_model * (result(before[key]) - before[key])
        text_change += strength_clip * (text_result(text_before[text_key]) - text_before[text_key])
    for order in (files, files[::-1]):
        patched, patched_clip, _ = apply(model, clip, *order)
        torch.testing.assert_close(weights_of(patched)[key], before[key] + change, atol=2e-5, rtol=2e-5)
        found = weights_of(patched_clip.patcher)[text_key]
        torch.testing.assert_close(found, text_before[text_key] + text_change, atol=2e-5, rtol=2e-5)


def test_kinds_that_depend_on_the_weight_add_up_in_any_order(sd15):
    model, _ = sd15
    before, key = weights_of(model), f"{UNET_KEY}{SQUARE}.weight"
    weight, files, change = before[key], [], 0
    for seed, (make, strength) in enumerate([(dora(0), 1.0), (dora(1), 0.6), (oft, 1.0), (whole, 0.3), (lora, 1.0)]):
        parts, result = make(weight.shape, 10 * seed)
        files.append((write(kohya(SQUARE, parts)), strength))
        change += strength * (result(weight) - weight)
    for order in (files, files[::-1], files[2:] + files[:2]):
        after = weights_of(apply(model, None, *order)[0])
        torch.testing.assert_close(after[key], weight + change, atol=5e-5, rtol=5e-5)
        assert differ(before, after) == {key}


def test_a_dora_stands_on_the_patches_that_were_there_before(sd15):
    """A second node behind the first reads the patched weight, as a training on it would have."""
    model, key = sd15[0], f"{UNET_KEY}{LINEAR}.weight"
    first, first_result = lora(weights_of(model)[key].shape, 1)
    second, second_result = dora(0)(weights_of(model)[key].shape, 2)
    once, _, _ = apply(model, None, write(kohya(LINEAR, first)))
    twice, _, _ = apply(once, None, write(kohya(LINEAR, second)))
    expected = second_result(first_result(weights_of(model)[key]))
    torch.testing.assert_close(weights_of(twice)[key], expected, atol=2e-5, rtol=2e-5)


def many(model, clip=None, seed=0):
    """A LoRA on all attention layers and, for a SD1.x CLIP, its feed-forward layers."""
    tensors, weights = {}, model.model.state_dict()
    for i, layer in enumerate(attention_layers(model)):
        tensors |= kohya(layer, lora(weights[f"{UNET_KEY}{layer}.weight"].shape, seed + 3 * i)[0])
    for key, value in (clip.cond_stage_model.state_dict() if clip else {}).items():
        if re.search(r"mlp\.fc\d\.weight$", key):
            name = underscored("lora_te_")(text_path(key.removesuffix(".weight")))
            tensors |= {f"{name}.{part}": part_value for part, part_value in lora(value.shape, seed)[0].items()}
    return tensors


def test_at_strength_0_or_switched_off_nothing_changes_bit_for_bit(sd15, clips):
    model, clip = sd15[0], clips["SD1.5"]
    before, text_before = weights_of(model), weights_of(clip.patcher)
    tensors = many(model, clip)
    file = write(tensors)
    zero_blocks = ",".join(["0"] * 17)
    for row, off, options in (
        ((file, 0.0, 0.0), (), {}),
        ((file, 1.0, 1.0, zero_blocks), (), {}),
        ((file, 1.0, 1.0), (1,), {}),
        ("none", (), {}),
        ("none", (), {"trained": tensors, "trained_strength_model": 0.0, "trained_strength_clip": 0.0}),
    ):
        patched, patched_clip, report = apply(model, clip, row, off=off, **options)
        assert not differ(before, weights_of(patched)) and not differ(text_before, weights_of(patched_clip.patcher))
        assert not patched.patches and not patched_clip.patcher.patches and patched is not model
    for strengths, changed in (((1.0, 0.0), (True, False)), ((0.0, 1.0), (False, True))):
        patched, patched_clip, report = apply(model, clip, (file, *strengths))
        found = (differ(before, weights_of(patched)), differ(text_before, weights_of(patched_clip.patcher)))
        assert tuple(bool(names) for names in found) == changed
        assert f"{len(tensors)} of {len(tensors)} keys used" in report
    assert apply(model, clip, "none")[2] == "no LoRA chosen"


def test_a_trained_lora_works_as_its_file(sd15, clips):
    model, clip = sd15[0], clips["SD1.5"]
    tensors = many(model, clip) | kohya(CONV, full(weights_of(model)[f"{UNET_KEY}{CONV}.weight"].shape)[0])
    from_file = apply(model, clip, (write(tensors), 0.7, 0.4))
    grown = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    trained = apply(model, clip, "none", trained=grown, trained_strength_model=0.7, trained_strength_clip=0.4)
    assert not differ(weights_of(from_file[0]), weights_of(trained[0]))
    assert not differ(weights_of(from_file[1].patcher), weights_of(trained[1].patcher))
    assert trained[2].startswith("trained: kohya LoRA") and "used: 129 layers" in trained[2]


@pytest.mark.parametrize("kind", [lora, dora(0), full, lokr])
def test_a_trained_lora_on_a_model_that_has_it_is_said_to_count_twice(sd15, clips, kind, caplog):
    model, clip = sd15[0], clips["SD1.5"]
    trained, other = (kohya(CONV, kind(weights_of(model)[f"{UNET_KEY}{CONV}.weight"].shape, n)[0]) for n in (0, 1))
    once = apply(model, clip, trained=trained, trained_strength_model=0.7)
    assert "twice" not in once[2] + apply(*once[:2], trained=other)[2]
    again = apply(*once[:2], trained=trained)
    assert "it is on this model already and is now applied twice" in again[2] and "applied twice" in caplog.text


@pytest.mark.parametrize(
    ("family", "blocks", "expected"),
    [
        (
            "sd15",
            "0.5,1,0,0,0,0,0,2,0,0,0,0,0,0,0,0,0.25",
            {"input_blocks.1.": 1, "middle_block.": 2, "output_blocks.11.": 0.25},
        ),
        ("sdxl", "1,0,3,0,0,0,0.5,0,0,0,0,0", {"input_blocks.5.": 3, "output_blocks.0.": 0.5}),
        ("sdxl", ",".join("1" if i == 9 else "0" for i in range(20)), {"input_blocks.8.": 1}),
        ("sd15", "middle_block=0.5\nattn2.to_k$|attn2.to_k.w=2\n.=0", {"middle_block.": 0.5, "attn2.to_k.": 2}),
    ],
)
def test_block_weights(request, family, blocks, expected):
    model, _ = request.getfixturevalue(family)
    tensors = many(model)
    whole = weights_of(apply(model, None, write(tensors))[0])
    found = weights_of(apply(model, None, (write(tensors), 1.0, 1.0, blocks))[0])
    before, seen = weights_of(model), set()
    for layer in attention_layers(model):
        key = f"{UNET_KEY}{layer}.weight"
        place = next((place for place in expected if place in f"{layer}."), None)
        factor = expected.get(place, 0)
        seen |= {place} if factor else set()
        torch.testing.assert_close(found[key], before[key] + factor * (whole[key] - before[key]), atol=1e-5, rtol=1e-5)
    assert seen == set(expected)


def test_base_is_the_text_encoders_weight(sd15, clips):
    model, clip = sd15[0], clips["SD1.5"]
    file, key = write(many(model, clip)), "clip_l.transformer.text_model.encoder.layers.0.mlp.fc2.weight"
    before = weights_of(clip.patcher)[key]
    whole = weights_of(apply(model, clip, (file, 1.0, 0.8))[1].patcher)[key]
    for blocks, factor in (("0.5" + ",1" * 16, 0.5), ("0.25" + ",1" * 25, 0.25), (r"layers\.0\.mlp=3", 3)):
        found = weights_of(apply(model, clip, (file, 1.0, 0.8, blocks))[1].patcher)[key]
        torch.testing.assert_close(found, before + factor * (whole - before), atol=1e-5, rtol=1e-5)


def test_the_report_counts_what_block_weights_silence_and_names_idle_expressions(sd15, caplog):
    model, file = sd15[0], write(many(sd15[0]))
    report = apply(model, None, (file, 1.0, 1.0, "attn1=0"))[2]
    assert "64 layers have block weight 0" in report and "warning" not in report
    with caplog.at_level(logging.WARNING, "retune"):
        report = apply(model, None, (file, 1.0, 1.0, "attn9=0"))[2]
    assert "attn9 fit no parameter's name" in report and "attn9" in caplog.text
    with pytest.raises(ValueError, match="has 3 numbers; expected 17 .BASE, IN01, .* or 26"):
        apply(model, None, (file, 1.0, 1.0, "1,1,1"))


# --- the trainers' own code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_peft_and_diffusers_save_gives_what_peft_merges(sd15, sd15_unet, tmp_path, use_dora):
    peft = pytest.importorskip("peft")
    from copy import deepcopy

    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    network = deepcopy(sd15_unet)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=use_dora, target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"],
        rank_pattern={"attn2.to_v": 2}, alpha_pattern={"attn2.to_v": 5},
    )  # fmt: skip
    network.add_adapter(config)
    for seed, (name, value) in enumerate(network.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            value.data.copy_(drawn(*value.shape, seed=seed, scale=0.2))
        elif "lora_magnitude" in name:
            value.data.mul_(1 + drawn(*value.shape, seed=seed, scale=0.2))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(network), **_collate_lora_metadata({"unet": network})
    )
    path = lora_path()
    (tmp_path / "pytorch_lora_weights.safetensors").rename(path)
    patched, _, report = apply(sd15[0], None, path.name)
    network.fuse_lora()
    network.unload_lora()
    before, after = weights_of(sd15[0]), weights_of(patched)
    expected = before | {f"{UNET_KEY}{n}": v for n, v in ldm.to_ldm(network.state_dict(), sd15[1]).items()}
    assert differ(before, after) == differ(before, expected) and len(differ(before, after)) > 100
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=2e-5, rtol=2e-5)
    assert f"diffusers {'DoRA' if use_dora else 'LoRA'}" in report and "rank 2 to 4, alpha 5 to 6" in report
    assert "warning" not in report and "base SD1.x (cross-attention reads a width of 768)" in report


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("lora", {}),
        ("lora", {"use_tucker": True}),
        ("lora", {"dora_wd": True}),
        ("lora", {"dora_wd": True, "wd_on_out": False}),
        ("lora", {"rs_lora": True}),
        ("loha", {"use_tucker": True}),
        ("loha", {"dora_wd": True}),
        ("lokr", {"factor": 4}),
        ("lokr", {"factor": 4, "decompose_both": True, "use_tucker": True}),
    ],
)
def test_what_lycoris_saves_gives_what_lycoris_merges(sd15, sd15_unet, algorithm, options):
    lycoris = pytest.importorskip("lycoris")
    from copy import deepcopy

    network = deepcopy(sd15_unet)
    targets = {"target_module": ["Transformer2DModel", "ResnetBlock2D"], "target_name": []}
    lycoris.LycorisNetwork.apply_preset(targets)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alpha = 2 if algorithm == "lora" else 4  # its merge_to scales LoHa and LoKr by alpha / r twice
        dims = {"linear_dim": 4, "conv_dim": 4, "linear_alpha": alpha, "conv_alpha": alpha}
        wrapped = lycoris.create_lycoris(network, 1.0, algo=algorithm, **dims, **options)
    wrapped.apply_to()
    for seed, (name, value) in enumerate(wrapped.named_parameters()):
        if "dora" in name:
            value.data.mul_(1 + drawn(*value.shape, seed=seed, scale=0.1))
        else:
            value.data.add_(drawn(*value.shape, seed=seed, scale=0.05))
    tensors = {name: value.detach().clone() for name, value in wrapped.state_dict().items()}
    wrapped.merge_to(1.0)
    patched, _, report = apply(sd15[0], None, write(tensors))
    before, after = weights_of(sd15[0]), weights_of(patched)
    merged = {name: value for name, value in network.state_dict().items() if "lycoris" not in name}
    expected = before | {f"{UNET_KEY}{name}": value for name, value in ldm.to_ldm(merged, sd15[1]).items()}
    assert differ(before, after) == differ(before, expected) and len(differ(before, after)) > 100
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=5e-5, rtol=5e-5)
    assert ": LyCORIS (diffusers names)" in report and "warning" not in report


def test_a_kohya_file_gives_what_comfyuis_own_loader_gives(sd15, clips):
    import comfy.sd

    model, clip = sd15[0], clips["SD1.5"]
    tensors = many(model, clip)
    with torch.inference_mode():
        stock = comfy.sd.load_lora_for_models(model, clip, dict(tensors), 0.8, 0.6)
    own = apply(model, clip, (write(tensors), 0.8, 0.6))
    assert not differ(weights_of(stock[0]), weights_of(own[0]))
    assert not differ(weights_of(stock[1].patcher), weights_of(own[1].patcher))


# --- files that are not what they should be ---------------------------------------------------------------------------


def refused(model, clip, file, message):
    """The node raises a ValueError that says `message`, and leaves no patches anywhere."""
    with pytest.raises(ValueError, match=message):
        apply(model, clip, file)
    assert not model.patches and (clip is None or not clip.patcher.patches)


def test_damaged_files_are_refused_with_a_reason(sd15, tmp_path):
    model, good = sd15[0], many(sd15[0])
    path = lora_path()
    save_file(good, path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:100], b"", b"\x00" * 4096, pickle.dumps({"a": [1.0]})):
        path.write_bytes(data)
        refused(model, None, path.name, f"{path.name} is damaged or no safetensors file")
    torch.save(good, path)
    refused(model, None, path.name, "no safetensors file")
    pickled = lora_path(".pt")
    torch.save({"state_dict": good}, pickled)
    assert "warning" not in apply(model, None, pickled.name)[2]
    pickled.write_bytes(pickled.read_bytes()[:5000])
    refused(model, None, pickled.name, "damaged or holds more than tensors")
    torch.save({"a": tmp_path}, pickled)  # an object, which a pickle may run code for
    refused(model, None, pickled.name, "damaged or holds more than tensors")
    refused(model, None, "gone.safetensors", "file is 'gone.safetensors'; expected one of the files in models/loras")


def test_files_without_a_whole_lora_are_refused(sd15):
    model, good = sd15[0], many(sd15[0])
    layer = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    up = f"{layer}.lora_up.weight"
    refused(model, None, write({}), "holds no LoRA and no tensors at all")
    refused(model, None, write({"model.diffusion_model.out.2.weight": torch.ones(2)}), "holds no LoRA, but model.diff")
    refused(model, None, write({n: v for n, v in good.items() if n != up}), f"{layer} lacks lora_up.weight")
    refused(model, None, write(good | {up: good[up][:, :2]}), f"{layer}: its factors are .* whose ranks differ")
    for bad in (float("nan"), float("inf")):
        spoilt = good[up].clone()
        spoilt[0, 0] = bad
        refused(model, None, write(good | {up: spoilt}), f"NaN or infinity in {up}; ")
    refused(model, None, write(good | {f"{layer}.alpha": torch.ones(3)}), f"alpha of {layer} has the shape")
    two = {f"{layer}.diff": torch.zeros(32, 32)}
    refused(model, None, write(good | two), f"{layer}: it holds two kinds of LoRA at once")


def test_a_lora_of_another_width_is_refused_whole(sd15, sdxl, clips):
    """Many layers of the two families have the same names and shapes: none of them may be applied."""
    narrow = many(sdxl[0]) | {n: v for n, v in many(sd15[0], clips["SD1.5"]).items() if n.startswith("lora_te")}
    refused(
        sd15[0], clips["SD1.5"], write(narrow, {"ss_base_model_version": "sdxl_base_v1-0"}),
        "does not fit this model: lora_unet_.* \\(made for .* expected .*made for SDXL .* model is SD1.x. Nothing",
    )  # fmt: skip
    layer = LINEAR.replace(".", "_")
    wrong = {f"lora_unet_{layer}.diff": torch.zeros(4, 4)}
    refused(sd15[0], None, write(wrong), "made for 4 x 4; expected 128 x 768")
    twice = kohya(LINEAR, lora((128, 768))[0]) | {f"{UNET_KEY}{LINEAR}.{n}": v for n, v in lora((128, 768))[0].items()}
    refused(
        sd15[0], None, write(twice), f"lora_unet_{layer} .is the layer {UNET_KEY}{LINEAR} again; expected each once"
    )
    scale = {f"lora_unet_{layer}.dora_scale": torch.ones(7, 1)}
    good = kohya(LINEAR, lora((128, 768))[0])
    refused(sd15[0], None, write(good | scale), "dora_scale has 7 numbers; expected 128 outputs or .768")


def test_a_lora_for_something_else_is_said_to_do_nothing(sd15, caplog):
    tensors = {f"lora_unet_double_blocks_{i}_img_attn_qkv.{n}": v for i in (0, 1) for n, v in lora((8, 8))[0].items()}
    with caplog.at_level(logging.WARNING, "retune"):
        patched, _, report = apply(sd15[0], None, write(tensors, {"modelspec.architecture": "flux-1-dev/lora"}))
    assert not patched.patches and "0 of 6 keys used" in report
    for text in (report, caplog.text):
        assert "no key fits this model, nothing was applied: lora_unet_double_blocks_0_img_attn_qkv" in text
        assert "was made for flux-1-dev (modelspec.architecture flux-1-dev/lora); the model is SD1.x" in text


def test_unknown_keys_are_counted_and_some_are_named(sd15, caplog):
    good = kohya(LINEAR, lora((128, 768))[0])
    layer = torch.zeros(1, 4)
    junk = {
        f"lora_unet_nowhere_{i}.{n}": layer if n == "lora_down.weight" else layer.T
        for i in range(5000)
        for n in ("lora_down.weight", "lora_up.weight")
    }
    with caplog.at_level(logging.WARNING, "retune"):
        patched, _, report = apply(sd15[0], None, write(good | junk))
    assert list(patched.patches) == [f"{UNET_KEY}{LINEAR}.weight"]
    assert "3 of 10003 keys used" in report and "and 9980 more" in report and len(report) < 3000
    assert "10000 of 10003 keys were not used: lora_unet_nowhere_" in caplog.text and len(caplog.text) < 1000


def test_text_keys_without_a_clip_are_no_fault_and_bundled_embeddings_are_named(sd15, clips, caplog):
    model, clip = sd15[0], clips["SD1.5"]
    file = write(many(model, clip))
    with caplog.at_level(logging.WARNING, "retune"):
        _, none, report = apply(model, None, file)
    assert none is None and not caplog.text and "the keys of the text encoder need the clip input" in report
    bundled = {"bundle_emb.cat.clip_l": torch.ones(2, 768)}
    report = apply(model, clip, write(many(model, clip) | bundled, {"ot_branch": "master"}))[2]
    assert "OneTrainer LoRA" in report and "1 of " in report and "not used: bundle_emb.cat.clip_l" in report


def test_biases_are_used_where_there_are_any(sd15):
    model, _ = sd15
    before, bias = weights_of(model), drawn(64)
    name = f"lora_unet_{CONV.replace('.', '_')}"
    tensors = {f"{name}.diff": drawn(*before[f"{UNET_KEY}{CONV}.weight"].shape), f"{name}.diff_b": bias}
    norm = "input_blocks.4.1.transformer_blocks.0.norm1"
    tensors |= {
        f"lora_unet_{norm.replace('.', '_')}.{part}": drawn(64, seed=s) for s, part in ((1, "w_norm"), (2, "b_norm"))
    }
    without = f"lora_unet_{SQUARE.replace('.', '_')}.diff_b"  # to_q has no bias
    patched, _, report = apply(model, None, write(tensors | {without: bias}))
    after = weights_of(patched)
    for key, change in (
        (f"{CONV}.bias", bias),
        (f"{norm}.weight", drawn(64, seed=1)),
        (f"{norm}.bias", drawn(64, seed=2)),
    ):
        torch.testing.assert_close(after[UNET_KEY + key], before[UNET_KEY + key] + change)
    assert "4 of 5 keys used: 2 layers of the model" in report and f"not used: {without}" in report


# --- in use -----------------------------------------------------------------------------------------------------------


def test_it_draws_as_a_model_with_the_summed_weights_and_leaves_the_base_alone(demo, sampled):
    from retune.nodes.common.weights import with_unet_weights

    model, clip, _ = demo
    weights, layers = weights_of(model), attention_layers(model)
    before = sampled(model, clip)
    tensors, sums = {}, {}
    for i, layer in enumerate(layers):
        parts, result = dora(0)(weights[f"{UNET_KEY}{layer}.weight"].shape, 3 * i)
        tensors |= kohya(layer, parts)
        sums[f"{layer}.weight"] = result(weights[f"{UNET_KEY}{layer}.weight"])
    patched, patched_clip, _ = apply(model, clip, write(tensors))
    picture = sampled(patched, patched_clip)
    torch.testing.assert_close(picture, sampled(with_unet_weights(model, sums), clip), atol=1e-4, rtol=1e-4)
    assert (picture - before).abs().max() > 0.05
    assert torch.equal(sampled(model, clip), before)
    assert not differ(weights, {name: value.clone() for name, value in model.model.state_dict().items()})


def test_a_t5_of_this_package_says_something_else_with_a_lora(sd15, t5):
    def encode(clip):
        with torch.inference_mode():
            return clip.encode_from_tokens(clip.tokenize("a red circle")).clone()

    tensors = {}
    for key, value in t5.cond_stage_model.state_dict().items():
        if ".SelfAttention." in key and value.shape == (64, 64):
            name = underscored("lora_te_")(text_path(key.removesuffix(".weight")))
            tensors |= {f"{name}.{part}": part_value for part, part_value in lora(value.shape)[0].items()}
    plain = encode(t5)
    changed = encode(apply(sd15[0], t5, write(tensors))[1])
    assert changed.shape == plain.shape and (changed - plain).abs().max() > 1e-3
    assert torch.equal(encode(t5), plain)


def test_through_a_server_from_an_api_prompt(comfyui_server):
    """The nested inputs as ComfyUI's own executor builds them; a file that changes under its name is read again."""
    prompt = json.loads((WORKFLOWS / "apply_loras.json").read_text(encoding="utf-8"))
    folder = comfyui_server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)

    def write_demo_lora(name, strength):
        from retune.training.demo.files import weights_path
        from safetensors.torch import load_file

        tensors = {}
        for key, value in load_file(weights_path("demo.safetensors")).items():
            if key.startswith(ldm.UNET_PREFIX) and key.endswith("attn2.to_v.weight"):
                layer = key.removeprefix(ldm.UNET_PREFIX).removesuffix(".weight")
                tensors |= kohya(layer, {n: v * strength for n, v in lora(value.shape)[0].items()})
        save_file(tensors, folder / name)

    def pixels(outputs):
        image = outputs["7"]["images"][0]
        return load_image(comfyui_server.base_directory / "output" / image["subfolder"] / image["filename"])

    from retune.training.data.images import load_image

    row = prompt["2"]["inputs"]
    names = [row["count.lora_1"], row["count.lora_2"]]
    for name in names:
        write_demo_lora(name, 1.0)
    first = comfyui_server.run(prompt)
    report = first["2"]["text"][0]
    assert [line.split(":")[0] for line in report.splitlines() if ": kohya LoRA" in line] == names
    write_demo_lora(names[0], 2.0)
    second = comfyui_server.run(prompt)
    row |= {"count.enabled_1": False, "count.enabled_2": False}
    plain = comfyui_server.run(prompt)
    assert plain["2"]["text"][0] == "no LoRA chosen"
    pictures = [pixels(one) for one in (first, second, plain)]
    assert all((a - b).abs().max() > 0.05 for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True))
    row |= {"count.enabled_1": True, "count.lora_1": "gone.safetensors"}
    with pytest.raises((RuntimeError, ValueError), match="gone.safetensors"):
        comfyui_server.run(prompt)
